"""Export one expert, or the ensemble, of a checkpoint to ONNX, and check it with onnxruntime.

python export.py weights=runs/default/nclpp/seed0/last.ckpt out=model.onnx
python export.py weights=... expert=ensemble
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from omegaconf import DictConfig

from common.hub import publishable
from common.loop import Loaded
from common.metrics.ops import count_macs
from common.onnx_export import export_onnx
from common.scripts import script
from ncl_pp.checkpoint import data_of, load
from ncl_pp.model import Ensemble, NCLModel
from ncl_pp.train import predict


def best_expert(trained: Loaded, fabric: Fabric, data: Mapping[str, Any]) -> tuple[int, str]:
    """(expert, why): the most accurate on the validation split, found with the keys of `data` in place of the trained ones.

    ValueError where the data set has none."""
    found = data_of(trained, data)
    if found.validation is None:
        raise ValueError("expert=best: this data set has no validation split to choose on; give expert=0 or ensemble")
    model = fabric.setup_module(NCLModel(trained.model))  # type: ignore[arg-type]
    options = {"batch_size": trained.config["evaluate"]["batch_size"], "workers": trained.config["data"]["workers"]}
    logits, labels = predict(fabric, model, found.validation, **options)
    accuracy = 100 * (logits.argmax(-1) == labels).double().mean(1)
    best = int(accuracy.argmax())
    listed = ", ".join(f"{a:.2f}" for a in accuracy.tolist())
    return best, f"expert {best}: the best on the validation split ({listed} %)"


def export(cfg: DictConfig, fabric: Fabric) -> Path:
    """Writes cfg.out and returns its path; see configs/export.yaml."""
    trained = load(cfg.weights)
    experts = len(trained.model.heads)  # type: ignore[arg-type]
    if cfg.expert == "best":
        which, why = best_expert(trained, fabric, cfg.data)
    elif cfg.expert == "ensemble":
        which, why = None, f"the ensemble of {experts} experts"
    elif str(cfg.expert).isdecimal() and int(cfg.expert) < experts:
        which, why = int(cfg.expert), f"expert {cfg.expert}"
    else:
        raise ValueError(f"expert={cfg.expert!r}, allowed: best, ensemble, 0..{experts - 1}")
    model = Ensemble(trained.model) if which is None else trained.model.single(which)  # type: ignore[arg-type, operator]
    size = cfg.size or trained.about["size"]
    image = torch.zeros(1, trained.about["channels"], size, size)
    worst = export_onnx(model, image, cfg.out, about=trained.about, tolerance=cfg.tolerance)
    macs = sum(count_macs(model.cpu(), image).values())
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{cfg.out}: {why}. {parameters:,} parameters, {macs:,} MACs for an image of {size} x {size}")
    print(f"largest difference between onnxruntime and torch: {worst:.2g}")
    print(f"cost: the ensemble costs K = {experts} times one expert")
    return Path(cfg.out)


main = script("export", publishable(export))


if __name__ == "__main__":
    main()
