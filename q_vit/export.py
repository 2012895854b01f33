"""Export a checkpoint: as ONNX whose products run on integers, and packed to its bits.

python export.py weights=runs/default/both/seed0/last.ckpt out=model.onnx               of preset=deployable; also model.packed.pt
python export.py weights=runs/default/both/seed0/last.ckpt out=model.onnx format=qdq    any preset, float products
python export.py weights=twobits_deit_small.pth bits=2 out=model.packed.pt              packed only

format=integer is QuantizeLinear and MatMulInteger: int8 weights, 8-bit codes of activations whatever their width, one scale
behind every product; its logits are those of PyTorch as long as no value lies between two codes. In the packed file weights
have the bits that are claimed; it is storage, which evaluate.py, predict.py and this script read: CPUs have no 2-bit arithmetic.
"""

import os
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from common.hub import publishable
from common.loop import Loaded
from common.onnx_export import export_onnx
from common.quant.integer_onnx import FORMATS, translations
from common.scripts import script
from q_vit.checkpoint import load
from q_vit.deploy import deploy
from q_vit.packing import pack, quantised_weights


@torch.no_grad()
def write_onnx(trained: Loaded, out: Path, *, form: str, tolerance: float) -> dict[str, float]:
    """Writes `out`, compared with the network on random images: {largest, mean difference of logits over their standard
    deviation, bytes}. ValueError, and no file, where the mean is above `tolerance`."""
    about: Any = trained.about
    image = torch.zeros(1, about["channels"], about["size"], about["size"])
    deployed = deploy(trained.model, form)
    beside = out.with_name(f".{out.name}.new.onnx")
    try:
        export_onnx(deployed, image, beside, about=about, tolerance=float("inf"), translations=translations())
        largest, mean = differences(trained.model, beside, image, batches=(1, 5))
        if not mean <= tolerance:
            raise ValueError(f"the exported network differs by {mean:.2g} standard deviations, allowed: {tolerance:g}")
        os.replace(beside, out)
    finally:
        beside.unlink(missing_ok=True)
    return {"largest": largest, "mean": mean, "bytes": out.stat().st_size}


@torch.no_grad()
def differences(model: nn.Module, file: Path, image: torch.Tensor, batches: tuple[int, ...]) -> tuple[float, float]:
    """(largest, mean) |onnxruntime - torch| over the standard deviation of the logits, on random images like `image`."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    generator, gaps = torch.Generator().manual_seed(0), []
    for batch in batches:
        images = torch.randn(batch, *image.shape[1:], generator=generator)
        expected = model(images)
        gaps.append(
            (torch.from_numpy(session.run(None, {"images": images.numpy()})[0]) - expected).abs() / expected.std()
        )
    whole = torch.cat(gaps)
    return whole.max().item(), whole.mean().item()


def write_packed(trained: Loaded, out: Path) -> int:
    """Writes the packed file and returns its bytes."""
    packed = pack(trained.model)
    beside = out.with_name(f".{out.name}.tmp")
    torch.save({**packed, "about": trained.about, "config": trained.config}, beside)
    beside.replace(out)
    return out.stat().st_size


def export(cfg: DictConfig) -> Path:
    """Writes cfg.out and returns its path, of an ONNX file the packed one beside it as well; see configs/export.yaml."""
    out = Path(cfg.out).expanduser()
    if out.suffix not in (".onnx", ".pt"):
        raise ValueError(f"out={cfg.out}: give a name that ends in .onnx, or in .pt for the packed file alone")
    if cfg.format not in FORMATS or not cfg.tolerance > 0:
        raise ValueError(f"format={cfg.format}, allowed: {', '.join(FORMATS)}; tolerance={cfg.tolerance}, allowed: > 0")
    trained = load(cfg.weights, bits=cfg.bits, check_bits=cfg.check_bits)
    parameters = 4 * sum(p.numel() for p in trained.model.parameters())
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".onnx":
        found = write_onnx(trained, out, form=cfg.format, tolerance=cfg.tolerance)
        print(
            f"{out}: {found['bytes'] / 1e6:.3f} MB, {cfg.format}, differs from PyTorch by {found['mean']:.2g} standard "
            f"deviations of the logits on average, {found['largest']:.2g} at most"
        )
    if quantised_weights(trained.model) or out.suffix == ".pt":
        packed = out if out.suffix == ".pt" else out.with_name(f"{out.stem}.packed.pt")
        print(f"{packed}: {write_packed(trained, packed) / 1e6:.3f} MB, float32 parameters {parameters / 1e6:.3f} MB")
    return out


main = script("export", publishable(export))


if __name__ == "__main__":
    main()
