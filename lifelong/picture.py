"""Draws pictures/idea.png from embedded data: what the attack does on digits, and what the fusion does with three tasks; and
pictures/after_each_task.png from the recorded results: accuracy and forgetting of every arm after every task.

python picture.py
"""

import csv
import hashlib
from collections import defaultdict
from pathlib import Path

import torch
from matplotlib.figure import Figure

from lifelong.adaptive_fusion import OnlineFusion
from lifelong.augmentation import Prepare
from lifelong.background_attack import background_attack, region_weight
from lifelong.learner import MetaLearner
from lifelong.model import build_model
from lifelong.streams import build_stream

HERE = Path(__file__).resolve().parent


def attacked_digits(count: int = 3) -> list[tuple[str, torch.Tensor, dict]]:
    """Columns (title, images (count, H, W), how to draw them) of test digits after training on two tasks."""
    stream = build_stream(name="digits10", seed=0, tasks=2, order="natural", train_images=1000, test_images=200)
    torch.manual_seed(0)
    model = build_model(name="mlp", num_classes=10, channels=1, size=8, hidden=100)
    learner = MetaLearner(
        model, Prepare(mean=[0.0], std=[1.0], size=8), options={"loss": "seen", "eps": 16.0}, total_tasks=2, budget=100,
        batch_size=64, epochs=10, optim={"lr": 1.0}, schedule={"kind": "cosine"},
    )  # fmt: skip
    for k in range(2):
        learner.observe_task(stream.task("train", k))
    images, labels = stream.task("test", 0, 1)
    chosen = [int(torch.nonzero(labels == c)[1]) for c in (0, 3, 8)[:count]]
    x, y = learner.prepare(images[chosen]), labels[chosen]
    model.eval()
    with torch.no_grad():
        attention = model(x, return_attention=True)[1]
    hard = background_attack(model, x, y, attention, 16.0, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        moved = model(hard, return_attention=True)[1] - attention
    most = float(moved.abs().max())
    return [
        ("image x", x[:, 0], {"cmap": "gray", "vmin": 0, "vmax": 1}),
        ("attention a", attention[:, 0], {"cmap": "magma"}),
        ("attack weight 1 - a²", region_weight(attention)[:, 0], {"cmap": "magma"}),
        ("attacked x' - x", (hard - x)[:, 0], {"cmap": "coolwarm", "vmin": -16 / 255, "vmax": 16 / 255}),
        (f"a(x') - a(x)\nwithin {most:.1g}", moved[:, 0], {"cmap": "coolwarm", "vmin": -most, "vmax": most}),
    ]


def fused_tasks(ax) -> None:
    """Three quadratic tasks, one of them far away: their updates from one base, the plain mean and the adaptive fusion."""
    base = torch.tensor([0.0, 0.0], dtype=torch.double)
    minima = torch.tensor([[1.2, 1.6], [2.2, -1.0], [6.0, 1.2]], dtype=torch.double)
    states = [base + 0.5 * (m - base) for m in minima]  # a gradient step of rate 1/2 on |phi - m|^2 / 2
    fused = {}
    for weights in ("mean", "adaptive"):
        online = OnlineFusion([base], weights=weights)
        for phi in states:
            online.add([phi])
        fused[weights] = online.result(1.0)[0]
    for k, (phi, m) in enumerate(zip(states, minima, strict=True)):
        ax.annotate("", phi.tolist(), base.tolist(), arrowprops={"arrowstyle": "->", "color": f"C{k}", "lw": 2})
        ax.plot(*m.tolist(), "x", color=f"C{k}", ms=9, mew=2)
        ax.annotate(f"task {k + 1}'s optimum", m.tolist(), (0, 9), textcoords="offset points", ha="center", fontsize=8)
    ax.plot(*base.tolist(), "ko")
    ax.annotate("base", base.tolist(), (-4, -13), textcoords="offset points", ha="right", fontsize=9)
    ax.plot(*fused["mean"].tolist(), "s", color="0.5", ms=9, label="plain mean (iTAML)")
    ax.plot(*fused["adaptive"].tolist(), "*", color="k", ms=15, label="adaptive fusion (ARI)")
    ax.legend(loc="lower right", fontsize=8, frameon=False)
    ax.set(xlim=(-0.9, 7.1), ylim=(-2.1, 2.5), xticks=[], yticks=[])
    ax.set_title("fusion: who moved furthest weighs most", fontsize=10)


def recorded() -> list[Path]:
    """The recorded cells that hold the accuracies after every task."""
    files = sorted((HERE / "results").glob("*/cells.csv"))
    return [f for f in files if "class_il_acc_after_1" in f.read_text().partition("\n")[0]]


def sources() -> str:
    """A hash of what after_each_task.png is drawn from; the picture holds it."""
    return hashlib.sha256(b"".join(f.read_bytes() for f in recorded())).hexdigest()


def curves(file: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """{acc | forgetting: {arm: [(tasks learned, mean over seeds)]}}; arms with other settings, which the name says, left out."""
    values: dict = {kind: defaultdict(lambda: defaultdict(list)) for kind in ("acc", "forgetting")}
    with file.open() as lines:
        for row in csv.DictReader(lines):
            for kind, arms in values.items():
                for name, value in row.items():
                    if name.startswith(f"class_il_{kind}_after_") and value and "/" not in row["arm"]:
                        arms[row["arm"]][int(name.rpartition("_")[2]) + 1].append(float(value))
    return {
        kind: {arm: sorted((t, sum(v) / len(v)) for t, v in found.items()) for arm, found in arms.items()}
        for kind, arms in values.items()
    }


def style(arm: str, arms: list[str]) -> dict:
    """Baselines dotted, the published loss dashed, the loss over all classes seen solid."""
    meta = arm.startswith(("ari", "itaml", "second", "third", "attack", "sequential"))
    line = ":" if not meta else "-" if arm.endswith("_seen") else "--"
    return {"color": f"C{arms.index(arm) % 10}", "ls": line, "marker": "os^"[arms.index(arm) // 10], "ms": 4}


def after_each_task() -> Figure:
    """A row per recorded scale: class-incremental accuracy and forgetting after every task."""
    files = recorded()
    figure = Figure(figsize=(9.6, 3.9 * len(files)), layout="constrained")
    figure.suptitle(
        "dotted: baselines; dashed: inner loss as published; solid: inner loss over all classes seen", fontsize=9
    )
    for axes, file in zip(figure.subplots(len(files), 2, squeeze=False), files, strict=True):
        found = curves(file)
        arms = sorted(found["acc"], key=lambda a: -found["acc"][a][-1][1])
        for ax, kind, said in zip(
            axes, found, ("accuracy on all classes seen", "forgetting (less is better)"), strict=True
        ):
            for arm in arms:
                if points := found[kind].get(arm):
                    ax.plot(*zip(*points, strict=True), label=arm, **style(arm, arms))
            ax.set(xlabel="tasks learned", ylabel="%", xticks=range(1, len(found["acc"][arms[0]]) + 1))
            ax.set_title(f"{file.parent.name}: {said}", fontsize=9)
        axes[1].legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5), title="best first")
    return figure


def main() -> None:
    if recorded():
        after_each_task().savefig(HERE / "pictures/after_each_task.png", dpi=100, metadata={"Source": sources()})
    columns = attacked_digits()
    figure = Figure(figsize=(10.4, 3.4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1.6, 1])  # type: ignore[misc]
    axes = left.subplots(3, len(columns))
    for j, (title, images, options) in enumerate(columns):
        for i, image in enumerate(images):
            axes[i, j].imshow(image, **options)
            axes[i, j].set(xticks=[], yticks=[])
        axes[0, j].set_title(title, fontsize=9)
    fused_tasks(right.subplots())
    (HERE / "pictures").mkdir(exist_ok=True)
    figure.savefig(HERE / "pictures/idea.png", dpi=100)


if __name__ == "__main__":
    main()
