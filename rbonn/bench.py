"""Speed and size of RBONN-18 on bits, beside every float form of the same network on this CPU. Writes bench.json; minutes.

python bench.py                                                    ResNet-18 at 224 x 224, batch 1 and 8, 1 and 2 threads
python bench.py weights=model.packed.pt                            any classifier of train.py or export.py
python bench.py out=results/deploy/bench.json                      what the README's table is made from

Interleaved rounds, medians with quartiles; ratio = baseline / ours; nothing is asserted. The baseline is the fastest of eager,
channels_last, compiled (fp32 and bf16) and onnxruntime; norms are folded in all of them.
"""

from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from common.metrics.deployment import Forms, add_accuracy, add_sizes, time_network, usable_threads
from common.metrics.timing import Bench
from common.scripts import script
from rbonn.checkpoint import load
from rbonn.counts import measure
from rbonn.deploy import pack_
from rbonn.network import build_network

PAPER = Path(__file__).resolve().parent
ARM = "drelu_official"


def default_network() -> nn.Module:
    """RBONN-18 with random weights, and the statistics of random images in its norms."""
    torch.manual_seed(0)
    method = {"weights": "bilinear", "recurrent": "none", "activations": "binary"}
    shape = {"name": "react_resnet", "layers": (4, 4, 4, 4)}
    network = build_network(model=shape, method=method, sign_zero=1, classes=1000, channels=3).eval()
    for m in network.modules():
        m.train(isinstance(m, nn.BatchNorm2d))
    with torch.no_grad():
        network(torch.randn(2, 3, 224, 224))
    return network.eval()


def subject(weights: str | None) -> tuple[str, nn.Module, Tensor]:
    """(name, network on bits, an image (1, C, H, W)) of a file, or of the default. ValueError for a detector or float weights."""
    if weights is None:
        name, network, image = "RBONN-18", default_network(), torch.zeros(1, 3, 224, 224)
    else:
        network, _, about = load(weights, zero=None)
        if about["task"] == "detect":
            raise ValueError(f"weights={weights} is a detector: its time depends on what it finds, give a classifier")
        name, image = Path(weights).name, torch.zeros(1, about["channels"], about["size"], about["size"])
    pack_(network)
    return name, network, image


@torch.inference_mode()
def bench(cfg: DictConfig) -> list[dict]:
    """Measures, prints, writes cfg.out and returns the rows; see configs/bench.yaml."""
    table = Bench(cfg.out)
    name, network, image = subject(cfg.weights)
    add_sizes(table, name, network)
    if cfg.weights is None:
        found = measure("rbonn18")
        table.add(f"{name}, OPs", found["ops"], found["bops"] + found["flops"], unit="OPs", kind="ops", network=name)
        add_accuracy(table, name, PAPER / "results/mini/cells.csv", arm=ARM, metric="top1", data="the digits miniature")
    forms = Forms(network, image, compiled=cfg.compiled)
    time_network(
        table, name, forms, image, batches=cfg.batches, threads=usable_threads(cfg.threads), rounds=cfg.rounds
    )  # fmt: skip
    return table.write()


main = script("bench", bench)


if __name__ == "__main__":
    main()
