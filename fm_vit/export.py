"""Export a checkpoint to ONNX for one set of sensors, and check it with onnxruntime.

python export.py weights=runs/default/fmvit/seed0/last.ckpt modalities=[rgb] out=rgb.onnx     one branch of three
python export.py weights=... modalities=[rgb,depth,ir] out=fused.onnx

The file maps images (B, 3 M, H, W), three normalised channels for each of the M sensors in the order that its metadata give, to
liveness (B,); the metadata also have size, normalisation and the threshold of this set.
"""

from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from omegaconf import DictConfig
from torch import Tensor, nn

from common.hub import publishable
from common.metrics.ops import count_macs, count_parameters
from common.onnx_export import export_onnx
from common.scripts import script
from fm_vit.checkpoint import load


class Deployed(nn.Module):
    """Liveness (B,) from (B, 3 M, H, W) normalised to -1..1, three channels for each of the M modalities `names`."""

    def __init__(self, model: Any, names: list[str]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, images: Tensor) -> Tensor:
        return self.model.score(self.model(dict(zip(self.names, images.split(3, dim=1), strict=True))))


def one_set(model: Any, names: list[str]) -> Deployed:
    """`model` with the branches of `names` only. ValueError for a name that it has not."""
    if not names or (unknown := [m for m in names if m not in model.modalities]):
        raise ValueError(
            f"modalities={names}, allowed: one or more of {', '.join(model.modalities)}"
            + (f", not {', '.join(unknown)}" if names else "")
        )
    names = [m for m in model.modalities if m in names]
    if hasattr(model, "branches"):
        model.branches = nn.ModuleDict({m: model.branches[m] for m in names})
        model.modalities = names
    return Deployed(model, names).eval()


def export(cfg: DictConfig, fabric: Fabric) -> Path:
    """Writes cfg.out and returns its path; see configs/export.yaml."""
    trained = load(cfg.weights)
    names = list(trained.about["modalities"] if cfg.modalities is None else cfg.modalities)
    deployed = one_set(trained.model, names)
    size, threshold = trained.about["size"], (trained.about["thresholds"] or {}).get("_".join(deployed.names))
    about = {k: trained.about[k] for k in ("classes", "size", "normalise", "depth_max", "outline_only")}
    about |= {"modalities": deployed.names, "channels": 3 * len(deployed.names), "threshold": threshold}
    image = torch.zeros(1, about["channels"], size, size)
    worst = export_onnx(deployed, image, cfg.out, about=about, tolerance=cfg.tolerance, outputs=["liveness"])
    macs, parameters = sum(count_macs(deployed, image).values()), count_parameters(deployed)["total"]
    print(
        f"{cfg.out}: {', '.join(deployed.names)}, {parameters:,} parameters, {macs:,} MACs for a sample of {size} x {size}"
    )
    print(f"largest difference between onnxruntime and torch: {worst:.2g}; threshold of these sensors: {threshold}")
    return Path(cfg.out)


main = script("export", publishable(export))


if __name__ == "__main__":
    main()
