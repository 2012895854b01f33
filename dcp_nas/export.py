"""Export a checkpoint as ONNX (ordinary convolutions) and as a packed file with one bit per binary weight.

python export.py weights=runs/default/dcp_ggn/seed0/last.ckpt     writes model.onnx and model.packed.pt beside it
"""

import copy
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig
from torch import nn

from common import runs
from common.quant.binary import binary_sign
from common.quant.pack import pack_signs, unpack_signs
from dcp_nas.checkpoint import build_network, load_network
from dcp_nas.operations import BinaryConv2d
from dcp_nas.search_space import Genotype

FORMAT = "dcp-nas-packed-1"


@torch.no_grad()
def deploy_(network: nn.Module) -> nn.Module:
    """Replace every 1-bit convolution by nn.Conv2d with the weights scale o sign(w), in place; evaluation mode."""
    for parent in list(network.modules()):
        for name, conv in list(parent.named_children()):
            if isinstance(conv, BinaryConv2d):
                plain = nn.Conv2d(
                    conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,  # type: ignore[arg-type]
                    conv.groups, bias=False,
                )  # fmt: skip
                plain.weight.copy_(conv.scale() * binary_sign(conv.weight))
                setattr(parent, name, plain.to(conv.weight.device))
    return network.eval()


@torch.no_grad()
def pack(network: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """Content of a packed file: signs as bits, scales, everything else as float32, and how to rebuild the network. state: of the
    checkpoint."""
    binary = {name: m for name, m in network.named_modules() if isinstance(m, BinaryConv2d)}
    own = tuple(f"{name}." for name in binary)
    return {
        "format": FORMAT, "signs": {n: pack_signs(m.weight.flatten()) for n, m in binary.items()},
        "scales": {n: m.scale().flatten().clone() for n, m in binary.items()},
        "state": {k: v for k, v in network.state_dict().items() if not k.startswith(own)},
        "genotype": state["genotype"], "classes": state["classes"], "channels": state["channels"], "size": state["size"],
        "model": state["config"]["model"], "stage": state["config"]["stage"],
    }  # fmt: skip


@torch.no_grad()
def load_packed(path: str | Path) -> nn.Module:
    """The deployed network of a packed file, in evaluation mode. ValueError for another format."""
    content = runs.load_checkpoint(path)
    if content.get("format") != FORMAT:
        raise ValueError(f"{path}: format {content.get('format')!r}, expected {FORMAT!r} as export.py writes it")
    network = build_network(
        genotype=Genotype.parse(content["genotype"]), model=content["model"], stage={**content["stage"], "weights": "real"},
        official_m_grad=False, classes=content["classes"], channels=content["channels"],
    )  # fmt: skip
    weights = {}
    for name, bits in content["signs"].items():
        shape = network.get_submodule(name).weight.shape  # type: ignore[union-attr]
        signs = unpack_signs(bits, shape.numel()).view(shape)  # type: ignore[union-attr, arg-type]
        weights[f"{name}.weight"] = signs * content["scales"][name].view(-1, 1, 1, 1)
    network.load_state_dict({**content["state"], **weights})
    return network.eval()


@torch.no_grad()
def export(weights: str, target: Path, *, tolerance: float = 1e-4) -> dict[str, float]:
    """Write target.onnx and target.packed.pt, and check both against the network.

    Returns sizes in bytes and the largest differences of the outputs relative to the largest output. ValueError if one exceeds
    `tolerance`."""
    network, state = load_network(weights)
    x = torch.randn(2, state["channels"], state["size"], state["size"], generator=torch.Generator().manual_seed(0))
    expected = network(x)
    deployed = deploy_(copy.deepcopy(network))
    onnx, packed = target.with_suffix(".onnx"), target.with_suffix(".packed.pt")
    torch.onnx.export(
        deployed, (x,), onnx, dynamo=True, input_names=["images"], output_names=["logits"], external_data=False, verbose=False,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4096)},),
    )  # fmt: skip
    import onnxruntime

    session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    torch.save(pack(network, state), packed)
    found = {
        "deployed": deployed(x),
        "onnx": torch.from_numpy(session.run(None, {"images": x.numpy()})[0]),
        "packed": load_packed(packed)(x),
    }
    differences = {k: ((v - expected).abs().max() / expected.abs().max()).item() for k, v in found.items()}
    if wrong := {k: v for k, v in differences.items() if v > tolerance}:
        raise ValueError(f"exported outputs differ from the network by more than {tolerance:g}: {wrong}")
    sizes = {"onnx_bytes": onnx.stat().st_size, "packed_bytes": packed.stat().st_size}
    sizes["checkpoint_bytes"] = sum(v.numel() * v.element_size() for v in network.state_dict().values())
    return {**sizes, **differences}


@hydra.main(version_base="1.3", config_path="configs", config_name="export")
def main(cfg: DictConfig) -> None:
    target = Path(cfg.target) if cfg.target else Path(cfg.weights).with_name("model")
    for name, value in export(cfg.weights, target).items():
        print(f"{name:20s} {value:,}" if name.endswith("bytes") else f"{name:20s} differs by {value:.2g}")


if __name__ == "__main__":
    main()
