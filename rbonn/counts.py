"""Parameters, 1-bit weights, BOPs, FLOPs, OPs, memory and state-dict entries of the backbones.

python counts.py            print them;   the same numbers are the `exact` claims of claims.yaml
"""

import torch

from common.metrics.ops import count_ops, count_parameters, layer_ops, memory_mbit, parameter_bits, record_counts
from common.scripts import script
from rbonn.model import RESNETS, operand_bits
from rbonn.network import build_network

NETWORKS = ("resnet18", "rbonn18", "resnet34", "reactnet_a")


def measure(name: str) -> dict[str, float]:
    """Counts of one network for one 224 x 224 image: params, binary_weights, bops (MACs of 1-bit convolutions), flops (all other
    MACs), ops = bops / 64 + flops, mbit (1 bit per binary weight, 32 per other parameter), entries (of the state dict),
    channels (outputs of binary convolutions). Measured on the meta device. ValueError for another name."""
    if name not in NETWORKS:
        raise ValueError(f"network {name!r}, allowed: {', '.join(NETWORKS)}")
    weights = {"weights": "bilinear", "recurrent": "drelu_official"} if name == "rbonn18" else {"weights": "xnor"}
    layers = RESNETS[34 if name == "resnet34" else 18]
    shape = {"name": "reactnet_a"} if name == "reactnet_a" else {"name": "react_resnet", "layers": layers}
    with torch.device("meta"):
        model = build_network(
            model=shape, method={**weights, "activations": "binary"}, sign_zero=1, classes=1000, channels=3
        )
        image = torch.empty(1, 3, 224, 224)
    bits = operand_bits(model)
    ops = layer_ops(model, image, bits=bits)
    sizes = parameter_bits(model, {f"{layer}.weight": 1 for layer in bits})
    return {
        "params": count_parameters(model)["total"],
        "binary_weights": sizes[1],
        "bops": sum(x.macs for x in ops if x.weight_bits == 1),
        "flops": sum(x.macs for x in ops if x.weight_bits != 1),
        "ops": count_ops(ops, "bnn64"),
        "mbit": round(memory_mbit(sizes), 2),
        "entries": len(model.state_dict()),
        "channels": sum(model.get_submodule(layer).out_channels for layer in bits),  # type: ignore[misc, arg-type]
    }


def count() -> dict[str, float]:
    """{<network>_<count>: number} of every network."""
    return {f"{name}_{key}": value for name in NETWORKS for key, value in measure(name).items()}


main = script("counts", lambda cfg, fabric, out: record_counts(cfg, fabric, out, count))


if __name__ == "__main__":
    main()
