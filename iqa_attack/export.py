"""Export Ma19 or UNIQUE of a checkpoint of train.py to ONNX with its logistic, and check it with onnxruntime.

python export.py weights=runs/default/all/seed0/last.ckpt model=unique out=unique.onnx
"""

from pathlib import Path

import torch
from omegaconf import DictConfig

from common.hub import publishable
from common.onnx_export import export_onnx
from common.scripts import script
from iqa_attack.checkpoint import load
from iqa_attack.quality_models.models import Models, load_official
from iqa_attack.settings import NETWORKS


def export(cfg: DictConfig) -> Path:
    """Writes cfg.out and returns its path; see configs/export.yaml."""
    if cfg.model not in NETWORKS:
        raise ValueError(
            f"model={cfg.model!r}, allowed: {', '.join(NETWORKS)} (the others look up tables, no use in ONNX)"
        )
    if cfg.size < 24:
        raise ValueError(f"size={cfg.size}, allowed: >= 24")
    if cfg.official:
        models, about = Models({cfg.model: load_official(cfg.model, cfg.weights)}), {}
    else:
        models, _, about = load(cfg.weights)
    if cfg.model not in models:  # type: ignore[operator]
        raise ValueError(f"{cfg.weights} has no {cfg.model}, it holds {', '.join(models)}")  # type: ignore[arg-type]
    scored = models[cfg.model].cpu().eval()  # type: ignore[index]
    about = {**about, "models": [cfg.model], "size": cfg.size, "images": [0, 1], "scores": [0, 10], "normalise": None}
    about["calibration"] = {cfg.model: scored.calibration._asdict()}
    image = torch.rand(1, 3, cfg.size, cfg.size, generator=torch.Generator().manual_seed(0))
    worst = export_onnx(scored, image, cfg.out, about=about, tolerance=cfg.tolerance, outputs=("scores",))
    size = f"images (B, 3, {cfg.size}, {cfg.size}) in 0..1"
    print(f"{cfg.out}: {cfg.model} with its logistic, {size}, largest difference to torch {worst:.2g}")
    return Path(cfg.out)


main = script("export", publishable(export))


if __name__ == "__main__":
    main()
