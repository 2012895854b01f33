"""Draws pictures/idea.png: one photograph, the same under noise, and attacked at the same distance, with BRISQUE's scores.

python picture.py [out=pictures/idea.png]
"""

from pathlib import Path

import matplotlib
import numpy as np
import torch
from lightning_fabric import Fabric
from omegaconf import DictConfig
from PIL import Image

from common.scripts import script
from iqa_attack.counterexamples import judge
from iqa_attack.fidelities.fidelity import Chebyshev
from iqa_attack.jnd import SimulatedObserver
from iqa_attack.perceptual_attack import perceptual_attack, quantise, scores
from iqa_attack.photographs.images import from_bytes
from iqa_attack.photographs.photos import graded_photos
from iqa_attack.quality_models.calibration import Scored, fit_calibration
from iqa_attack.quality_models.statistics import fit_statistics
from iqa_attack.random_control import draw_seeds, random_at_distance
from iqa_attack.study.pictures import amplified

matplotlib.use("Agg")
from matplotlib import pyplot as plt


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
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=78, metadata={"Software": None})
    plt.close(figure)
    Image.open(out).convert("RGB").quantize(256).save(out, optimize=True)  # a third of the size
    print(
        f"{out}: {out.stat().st_size / 1000:.0f} kB, scores {np.round([float(scored(p)[0]) for p in pictures[:3]], 2)}"
    )


@script("picture")
def main(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    draw(Path(cfg.out))


if __name__ == "__main__":
    main()
