"""Parameters, 1-bit weights, BOPs, FLOPs, OPs, memory and state-dict entries of the backbones (section 4).

python counts.py            print them;   the same numbers are the `exact` claims of claims.yaml
"""

from pathlib import Path

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from common import runs
from common.metrics.ops import count_ops, count_parameters, layer_ops, memory_mbit, parameter_bits
from rbonn.layers import make_conv, make_sign
from rbonn.model import RESNETS, ReActNetA, ReActResNet, operand_bits

NETWORKS = ("resnet18", "rbonn18", "resnet34", "reactnet_a")


def measure(name: str) -> dict[str, float]:
    """Counts of one network for one 224 x 224 image: params, binary_weights, bops (MACs of 1-bit convolutions), flops (all other
    MACs), ops = bops / 64 + flops, mbit (1 bit per binary weight, 32 per other parameter), entries (of the state dict),
    channels (outputs of binary convolutions). Measured on the meta device. ValueError for another name."""
    if name not in NETWORKS:
        raise ValueError(f"network {name!r}, allowed: {', '.join(NETWORKS)}")
    weights = {"weights": "bilinear", "recurrent": "drelu_official"} if name == "rbonn18" else {"weights": "xnor"}
    options = {"num_classes": 1000, "in_channels": 3, "sign": make_sign(activations="binary")}
    options["conv"] = make_conv(**weights)  # type: ignore[arg-type]
    with torch.device("meta"):
        if name == "reactnet_a":
            model = ReActNetA(**options)
        else:
            model = ReActResNet(**options, layers=RESNETS[34 if name == "resnet34" else 18])
        image = torch.empty(1, 3, 224, 224)
    bits = operand_bits(model)
    layers = layer_ops(model, image, bits=bits)
    binary = {f"{layer}.weight": 1 for layer in bits}
    sizes = parameter_bits(model, binary)
    return {
        "params": count_parameters(model)["total"],
        "binary_weights": sizes[1],
        "bops": sum(x.macs for x in layers if x.weight_bits == 1),
        "flops": sum(x.macs for x in layers if x.weight_bits != 1),
        "ops": count_ops(layers, "bnn64"),
        "mbit": round(memory_mbit(sizes), 2),
        "entries": len(model.state_dict()),
        "channels": sum(model.get_submodule(layer).out_channels for layer in bits),  # type: ignore[misc, arg-type]
    }


@hydra.main(version_base="1.3", config_path="configs", config_name="counts")
def main(cfg: DictConfig) -> None:
    out = HydraConfig.get().runtime.output_dir
    fabric = runs.launch(cfg.fabric)
    run = runs.Run.open(Path(out), cfg, fabric)
    if run is None:
        return
    with run:
        metrics = {f"{name}_{key}": value for name in NETWORKS for key, value in measure(name).items()}
        run.finish(metrics)
        for key, value in metrics.items():
            print(f"{key:28s} {value:,}")


if __name__ == "__main__":
    main()
