"""The pictures of the README.


python picture.py                               pictures/idea.png: a photograph, under noise, and attacked
python picture.py what=transfer                 results/<scale>/transfer.png: R of every model on every model's counterexamples
python picture.py what=photographs data.root=   pictures/photographs.png: of every model the counterexample of median change
python picture.py what=sensitivity              pictures/sensitivity.png: where models are sensitive, from runs of sensitivity.py
"""

import csv
import hashlib
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np
import torch
from lightning_fabric import Fabric
from omegaconf import DictConfig
from PIL import Image

from common import runs
from common.scripts import script
from iqa_attack.counterexamples import judge
from iqa_attack.fidelities.fidelity import Chebyshev
from iqa_attack.jnd import SimulatedObserver
from iqa_attack.perceptual_attack import perceptual_attack, quantise, scores
from iqa_attack.photographs.data import build_data
from iqa_attack.photographs.images import from_bytes, read_image
from iqa_attack.photographs.photos import graded_photos
from iqa_attack.quality_models.calibration import Scored, fit_calibration
from iqa_attack.quality_models.statistics import fit_statistics
from iqa_attack.random_control import draw_seeds, random_at_distance
from iqa_attack.study.pictures import amplified

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).resolve().parent
NAMES = {"brisque": "BRISQUE", "niqe": "NIQE", "cornia": "CORNIA", "ma19": "Ma19", "unique": "UNIQUE"}
MEASURES = {"chebyshev": "Chebyshev", "ssim": "SSIM"}


def draw(out: Path) -> None:
    """Trains BRISQUE on the embedded photographs of seed 0 and attacks one crop of those that it has not seen."""
    data = graded_photos(seed=0, size=192, crops_per_photo=3, test_images=4)
    model = fit_statistics("brisque", data["train"], {"epsilon": 1.0}, seed=0, split={})
    raw = scores(model, data["train"].stack(), 20)
    scored = Scored(model, fit_calibration(raw.double(), data["train"].mos, source="training images")).eval()
    x0 = from_bytes(data["test"].image(0))[None]
    levels = torch.tensor([1.0, 2.0, 3.0, 4.0]) / 255
    seeds = draw_seeds(0, ["picture"], 0)
    made = perceptual_attack(scored, Chebyshev(), x0, levels, seeds=seeds, projected=True, steps=40, direction="both")
    x = judge(scored, SimulatedObserver(), x0, made, levels[:, None].double(), ["picture"]).counterexamples(x0)
    noise = random_at_distance(Chebyshev(), x0, Chebyshev()(x, x0), draw_seeds(0, ["picture"], 1), chebyshev=True)
    titles = ("original", "noise of the same size", "attacked", "what the attack changed, x 30")
    pictures = (quantise(x0), noise, x, amplified(x, x0, 30.0))
    figure, axes = plt.subplots(1, 4, figsize=(9.6, 2.9), layout="constrained")
    for ax, title, picture in zip(axes, titles, pictures, strict=True):
        ax.imshow(picture[0].permute(1, 2, 0).numpy(), interpolation="nearest")
        ax.set_title(title, fontsize=9)
        ax.set_axis_off()
        if title != titles[-1]:
            score = float(scored(picture)[0])
            ax.text(0.5, -0.07, f"BRISQUE: {score:.1f} of 10", transform=ax.transAxes, ha="center", fontsize=9)
    largest = float((x - x0).abs().max() * 255)
    axes[3].text(0.5, -0.07, f"at most {largest:.0f} of 255", transform=axes[3].transAxes, ha="center", fontsize=9)
    save(figure, out)
    print(
        f"{out}: {out.stat().st_size / 1000:.0f} kB, scores {np.round([float(scored(p)[0]) for p in pictures[:3]], 2)}"
    )


# ------------------------------------------------------------------------------------------------- of recorded results
def means(cells: Path) -> dict[str, dict[str, float]]:
    """{arm: {metric: mean over splits}} of a recorded cells.csv."""
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with cells.open(newline="") as file:
        for row in csv.DictReader(file):
            for key, value in row.items():
                if value and key not in ("arm", "seed", "status", "seconds"):
                    values[row["arm"]][key].append(float(value))
    return {arm: {k: float(np.mean(v)) for k, v in found.items()} for arm, found in values.items()}


def draw_transfer(folder: Path) -> Path:
    """folder/transfer.png of folder/cells.csv, whose hash the picture holds."""
    found, names = means(folder / "cells.csv"), list(NAMES)
    attacked = [n for n in names if f"{n}_chebyshev_perceptual" in found]
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 3.3), layout="constrained")
    drawn = None
    for ax, (fr, label) in zip(axes, MEASURES.items(), strict=True):
        columns = [found[f"{n}_{fr}_perceptual"] for n in attacked]
        evaluated = [n for n in names if f"r_{n}" in columns[0]]
        r = np.array([[m[f"r_{n}"] for m in columns] for n in evaluated])
        drawn = ax.imshow(r, cmap="viridis", vmin=0, vmax=5, aspect="auto")
        for (i, j), value in np.ndenumerate(r):
            weight = "bold" if evaluated[i] == attacked[j] else "normal"
            colour = "white" if value < 3 else "black"
            ax.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour, weight=weight)
        ax.set_xticks(range(len(attacked)), [NAMES[n] for n in attacked])
        rows = [f"{NAMES[n]} ({np.mean([m[f'srcc_clean_{n}'] for m in columns]):.2f})" for n in evaluated]
        ax.set_yticks(range(len(evaluated)), rows)
        ax.set_xlabel(f"counterexamples of, under {label}")
    axes[0].set_ylabel("evaluated (clean SRCC)")
    figure.colorbar(drawn, ax=axes, label="R, larger = more stable")  # type: ignore[arg-type]
    digest = hashlib.sha256((folder / "cells.csv").read_bytes()).hexdigest()
    figure.savefig(folder / "transfer.png", dpi=90, metadata={"Software": None, "Source": digest})
    plt.close(figure)
    return folder / "transfer.png"


def draw_photographs(root: Path, scale: str, seed: int, data_root: str, out: Path) -> Path:
    """Of every attacked model the counterexample (Chebyshev) of median change: before, after, difference, scores of all."""
    found = sorted(
        (root / scale).glob(f"*_chebyshev_perceptual/seed{seed}"),
        key=lambda p: list(NAMES).index(p.parent.name.split("_")[0]),
    )
    if not found:
        raise FileNotFoundError(f"no attacks in {root / scale}/*_chebyshev_perceptual/seed{seed}: run the sweeps first")
    figure, axes = plt.subplots(len(found), 4, figsize=(9.6, 2.35 * len(found)), layout="constrained", squeeze=False)
    for row, folder in zip(axes, found, strict=True):
        state, nr = runs.load_checkpoint(folder / "last.ckpt"), folder.parent.name.split("_")[0]
        data = build_data(seed=seed, parts=("attack",), **{**state["config"]["data"], "root": data_root})["attack"]
        moved = sorted(state["rows"], key=lambda r: abs(r[f"after_{nr}"] - r[f"before_{nr}"]))
        one = moved[len(moved) // 2]
        x0 = from_bytes(data.image(data.names.index(one["image"])))
        x = read_image(folder / "counterexamples" / f"{one['image']}.png")
        factor = 127.5 / max(one["max_change"], 1)
        shown = (
            (x0, "before"),
            (x, f"after: {NAMES[nr]} attacked"),
            (amplified(x, x0, factor), f"change x {factor:.0f}, at most {one['max_change']:.0f}/255"),
        )
        for ax, (image, title) in zip(row, shown, strict=False):
            ax.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
            ax.set_title(title, fontsize=9)
        lines = [f"{'of 10':8s} before  after"]
        for n in NAMES:
            if f"before_{n}" in one:
                lines.append(
                    f"{NAMES[n]:8s} {one[f'before_{n}']:6.2f} {one[f'after_{n}']:6.2f}{' <' if n == nr else ''}"
                )
        row[3].text(0, 0.5, "\n".join(lines), family="monospace", fontsize=9, va="center", transform=row[3].transAxes)
        for ax in row:
            ax.set_axis_off()
    save(figure, out)
    return out


def save(figure, out: Path) -> None:
    """A palette image: a third of the size."""
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=78, metadata={"Software": None})
    plt.close(figure)
    Image.open(out).convert("RGB").quantize(256).save(out, optimize=True)


@script("picture")
def main(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    if cfg.what == "idea":
        draw(HERE / "pictures/idea.png")
    elif cfg.what == "transfer":
        print(draw_transfer(HERE / "results" / cfg.scale))
    elif cfg.what == "photographs":
        print(
            draw_photographs(Path(cfg.run_root), cfg.scale, cfg.seed, cfg.data.root, HERE / "pictures/photographs.png")
        )
    elif cfg.what == "sensitivity":
        drawn = Image.open(next((Path(cfg.run_root) / cfg.scale).glob(f"sensitivity_*/seed{cfg.seed}/sensitivity.png")))
        half = drawn.convert("RGB").crop((0, 0, drawn.width, drawn.height // 2))
        half.quantize(64).save(HERE / "pictures/sensitivity.png", optimize=True)
    else:
        raise ValueError(f"what={cfg.what}, allowed: idea, transfer, photographs, sensitivity")


if __name__ == "__main__":
    main()
