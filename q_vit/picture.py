"""Draws results/idea.png from the embedded data: what rectification does to the codes of keys, and what DGD compares.

python picture.py        trains a small float network for a minute, nothing else is read"""

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from lightning_fabric import Fabric
from omegaconf import DictConfig

from common.scripts import script
from q_vit.checkpoint import load
from q_vit.data import build_data
from q_vit.distribution_guided_distillation import similarity
from q_vit.information_rectification import code_entropy
from q_vit.model import build_student, stress
from q_vit.quantized_vit import Tapped
from q_vit.train import fit

GREY, ORANGE, BLUE = "#777777", "#D55E00", "#0072B2"
LAYER, HEAD = 1, 1


def trained(fabric: Fabric) -> torch.nn.Module:
    """A float teacher of the miniature, trained for three epochs."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(Path(__file__).resolve().parent / "configs"), version_base="1.3"):
        cfg = compose("config", overrides=["method=fp", "arm=fp", "train.epochs=3", "train.save_every=3"])
    with tempfile.TemporaryDirectory() as scratch:
        fit(cfg, fabric, Path(scratch))
        return load(Path(scratch) / "last.ckpt").model


@torch.no_grad()
def draw(teacher: torch.nn.Module, out: Path) -> None:
    """Writes the figure."""
    images = build_data(name="cued_digits", test_images=64).first(256, 0)
    stressed = teacher
    stress(stressed, images)
    rules = {"bits": 2, "preset": "official", "weight_init": "per_group"}
    students = {"baseline": build_student(stressed, images, irm=False, **rules)}
    students["rectified"] = build_student(stressed, images, irm=True, **rules)
    figure, axes = plt.subplots(1, 4, figsize=(11, 2.9), width_ratios=[0.8, 1.5, 1, 1], layout="constrained")
    axes[0].imshow(images[0, 0], cmap="gray_r")
    axes[0].set_title("input: the digit in the\nmarked quadrant", fontsize=9)
    for k, (name, colour) in enumerate((("baseline", ORANGE), ("rectified", BLUE))):
        student = students[name].eval()
        keys = Tapped(student, "pre_quant")(images)[1][LAYER][1]
        quantizer = student.blocks[LAYER].attn.k_quantizer  # pyright: ignore
        codes = quantizer.codes(keys)[:, HEAD]
        share = np.bincount((codes.flatten() + 2).numpy(), minlength=4) / codes.numel()
        bits = code_entropy(codes, -2, 1)
        axes[1].bar(np.arange(-2, 2) + 0.4 * k - 0.2, 100 * share, 0.4, color=colour, label=f"{name}: {bits:.2f} bit")
    axes[1].set(xticks=range(-2, 2), xlabel="2-bit code of a key", ylabel="share of the values (%)")
    axes[1].set_title("IRM: normalised keys use the codes\n(badly distributed q and k; at most 2 bit)", fontsize=9)
    axes[1].legend(frameon=False, fontsize=8)
    taps = {"teacher": Tapped(teacher.eval(), "raw"), "2-bit student": Tapped(students["baseline"].eval(), "pre_quant")}
    for axis, (title, network) in zip(axes[2:], taps.items(), strict=True):
        q = network(images[:1])[1][LAYER][0][0, HEAD]
        axis.imshow(similarity(q), cmap="viridis")
        axis.set(xticks=[], yticks=[], xlabel="tokens")
        axis.set_title(f"DGD: similarity of queries,\n{title}", fontsize=9)
    for axis in axes[:1]:
        axis.set(xticks=[], yticks=[])
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


@script("picture")
def main(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    draw(trained(fabric), Path(cfg.out).expanduser())


if __name__ == "__main__":
    main()
