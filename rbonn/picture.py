"""Draws the picture of the README: which channels go back, what that does to their signs, and to the latent weights.

python picture.py [out=pictures/idea.png]          trains four small networks on digits, half a minute
"""

import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from hydra import compose
from lightning_fabric import Fabric
from omegaconf import DictConfig
from torch import Tensor

from common.scripts import script
from rbonn.binary_conv import binary_layers
from rbonn.checkpoint import load
from rbonn.data import build_data
from rbonn.density_relu import small_scale_channels
from rbonn.recurrent import RBConv2d
from rbonn.train import fit

ARMS = {"xnor": "ReActNet's convolution", "drelu_fixed": "RBONN", "all": "every channel goes back"}
LAYER = "layer2.1.conv"


def train_arms(fabric: Fabric, root: str) -> dict[str, Path]:
    """{arm: checkpoint} of stage 1 and, from it, of `ARMS`, with the default configuration."""
    found = {}
    for arm in ("activations", *ARMS):
        start = [] if arm == "activations" else ["init.arm=activations"]
        cfg = compose(
            "config", overrides=[f"method={arm}", f"arm={arm}", f"run_root={root}", "train.log_every=100", *start]
        )
        fit(cfg, fabric, Path(root) / "default" / arm / "seed0")
        found[arm] = Path(root) / "default" / arm / "seed0/last.ckpt"
    return found


def gradient(model: torch.nn.Module, seed: int = 0) -> Tensor:
    """dL/dw of the drawn layer on 50 training digits, (out, in, k, k)."""
    images, labels = build_data(name="digits", seed=seed).tensors  # type: ignore[misc]
    F.cross_entropy(model(images[:50]), labels[:50]).backward()
    grad = model.get_submodule(LAYER).weight.grad  # type: ignore[union-attr]
    assert isinstance(grad, Tensor)
    return grad


def draw(checkpoints: dict[str, Path], out: Path) -> None:
    """Writes the picture of the networks that `train_arms` made."""
    model = load(checkpoints["drelu_fixed"]).model
    layer = model.get_submodule(LAYER)
    assert isinstance(layer, RBConv2d)
    grad, w = gradient(model), layer.weight.detach()
    alpha, u = layer.scale_factor.detach().abs().flatten(), layer.u.detach()
    chosen = small_scale_channels(alpha, tau=layer.tau)
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    order = alpha.argsort()
    colours = ["tab:red" if c else "lightgrey" for c in chosen[order].tolist()]
    axes[0].bar(range(len(alpha)), alpha[order], color=colours)
    axes[0].set(xlabel="channels, by scale", ylabel=r"scale $\alpha = 1/A$")
    axes[0].set_title("DReLU: the channels with a small scale\n(dense A, red) go back", fontsize=10)
    row = int(order[0])
    before, after = w[row].flatten(), (w - u * grad)[row].flatten()
    place, flipped = before.argsort(), (before < 0) != (after < 0)
    colour = ["tab:red" if f else "tab:blue" for f in flipped[place].tolist()]
    axes[1].scatter(range(len(place)), before[place], s=5, color="lightgrey", label="w")
    axes[1].scatter(range(len(place)), after[place], s=6, color=colour, label="w - u g")
    axes[1].axhline(0, color="black", linewidth=0.7)
    axes[1].set(xlabel="weights of one such channel, sorted", ylabel="latent weight")
    axes[1].set_title(
        f"The forward pass uses sign(w - u g), g the last gradient:\n{int(flipped.sum())} signs change (red)",
        fontsize=10,
    )
    axes[1].legend(fontsize=8, markerscale=2)
    for arm, label in ARMS.items():
        layers = binary_layers(load(checkpoints[arm]).model).values()
        ratio = (
            torch.cat([(v.abs() / v.abs().median()).flatten() for v in (m.weight.detach() for m in layers)])
            .sort()
            .values
        )
        axes[2].plot(ratio, 100 * torch.linspace(0, 1, len(ratio)), label=label)
    axes[2].set(xlim=(0, 0.5), ylim=(0, 45), xlabel="t", ylabel="latent weights with |w| < t x median, %")
    axes[2].set_title("After training fewer latent weights lie near zero\nwhere channels go back", fontsize=10)
    axes[2].legend(fontsize=8, loc="lower right")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


@script("picture")
def main(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    with tempfile.TemporaryDirectory() as root:
        draw(train_arms(fabric, root), Path(cfg.out))


if __name__ == "__main__":
    main()
