"""The picture of the README: weights and architecture gradients of Parent and Child after one round on digits.

python picture.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from lightning_fabric import Fabric
from omegaconf import DictConfig

from common.scripts import script
from dcp_nas.analysis.snapshots import build, check, likelihood_gradient
from dcp_nas.operations import BinaryConv2d
from dcp_nas.search_space import operations
from dcp_nas.tangent_propagation import parent_tangent, unflatten


def gradients(search, seen: list) -> dict[str, torch.Tensor]:
    """t of the Parent and g of the Child in the normal cell, (E, M), mean over batches."""
    parent, child = search.arch["parent"].alphas, search.arch["child"].alphas
    t = torch.stack([parent_tangent(search.nets["parent"](x, parent), y, parent) for x, y in seen]).mean(0)
    g = torch.stack([likelihood_gradient(search.nets["child"], x, search.target(x), child) for x, _ in seen]).mean(0)
    return {"parent": unflatten(t, parent)[0], "child": unflatten(g.detach(), child)[0]}


def draw(search, seen: list, out: Path) -> None:
    """Above the weights of one convolution, below the gradients with respect to alpha."""
    name, conv = next(
        (n, m) for n, m in search.nets["child"].named_modules() if isinstance(m, BinaryConv2d) and m.groups == 1
    )
    real = search.nets["parent"].get_submodule(name).weight.detach().flatten()
    binary = conv.binary_weight().detach().flatten()
    figure, axes = plt.subplots(2, 2, figsize=(10, 5.2), layout="constrained", height_ratios=[1, 1.5])
    titles = ("Parent: real weights w", r"Child: 1-bit weights $\beta \circ \mathrm{sign}(\hat w)$")
    for axis, title, values in zip(axes[0], titles, (real, binary), strict=True):
        axis.hist(values.numpy(), bins=41, color="#555555")
        axis.set(title=title, yticks=[], xlim=(-1.1 * real.abs().max().item(), 1.1 * real.abs().max().item()))
    found = gradients(search, seen)
    titles = (
        r"t: where the labels move $\alpha$ in the Parent",
        r"g: where the Parent's output moves $\hat\alpha$ in the Child",
    )
    for axis, title, kind in zip(axes[1], titles, ("parent", "child"), strict=True):
        values = found[kind] / found[kind].abs().max()
        axis.imshow(values.numpy(), cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
        short = [
            n.replace("_conv_", " ").replace("_connect", "").replace("_pool_", " ")
            for n in operations(search.nets["parent"].order)
        ]
        axis.set_xticks(range(len(short)), short, rotation=35, ha="right", fontsize=8)
        axis.set(title=title, ylabel="edge of the cell", yticks=range(len(values)))
    figure.suptitle("Both share one search space; tangent propagation draws g to t", fontsize=13)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=80)
    plt.close(figure)


@script("picture")
def main(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    check(cfg)
    search, _, seen = build(cfg)
    draw(search, seen, Path(cfg.out))
    print(f"written to {cfg.out}")


if __name__ == "__main__":
    main()
