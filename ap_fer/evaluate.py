"""Evaluate a checkpoint of train.py or the released APViT: accuracies, macro F1, confusion matrix.

python evaluate.py weights=runs/default/app_atp/seed0/last.ckpt
python evaluate.py weights=APViT_RAF.pth set=raf_db data.root=/datasets claim=apvit_raf_db_weights record=true
"""

import csv
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from ap_fer.build import rebuild
from ap_fer.data import build_data
from ap_fer.metrics import confusion_figure
from ap_fer.model import APViT
from ap_fer.train import evaluate
from ap_fer.weights import load_released, read_state
from common import runs
from common.metrics.claims import load_claims

CONFIGS = Path(__file__).parent / "configs"


def load(path: str, *, data_set: str | None = None, data: Mapping[str, Any] | None = None) -> tuple[APViT, DictConfig]:
    """(model in evaluation mode, its configuration) of a checkpoint of train.py, or of a released one.

    data_set: configs/data/<name>, needed for released weights, which do not say what they were trained on. data: keys of the
    data set to replace, null leaves them. Raises FileNotFoundError, `runs.RunError` for a broken file, ValueError for
    another format."""
    state = runs.load_checkpoint(path)
    ours = {"model", "config", "names"} <= state.keys()
    if ours:
        cfg: Any = OmegaConf.create(state["config"])
    elif data_set is None:
        raise ValueError(f"{path} was not written by train.py: name its data set with set=, e.g. set=raf_db")
    else:
        published = {"app": {"keep": 160}, "atp": {"rate": 0.9, "start": 4}}
        cfg = OmegaConf.create({"seed": 0, "model": OmegaConf.load(CONFIGS / "model/apvit.yaml"), "method": published})
    if data_set is not None:
        known = sorted(p.stem for p in (CONFIGS / "data").glob("*.yaml"))
        if data_set not in known:
            raise ValueError(f"set={data_set!r}, allowed: {', '.join(known)}")
        cfg.data = OmegaConf.load(CONFIGS / f"data/{data_set}.yaml")
    cfg.data.update({k: v for k, v in (data or {}).items() if v is not None})
    classes = len(state["names"]) if ours else cfg.data.num_classes
    if cfg.data.num_classes != classes:
        raise ValueError(f"{path} has {classes} classes, data.num_classes={cfg.data.num_classes}")
    model = rebuild(OmegaConf.to_container(cfg, resolve=True), classes)  # type: ignore[arg-type]
    if ours:
        model.load_state_dict(state["model"])
    else:
        load_released(model, read_state(path))
    return model.eval(), cfg


@hydra.main(version_base="1.3", config_path="configs", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    known = {c["id"] for c in load_claims(Path(__file__).parent) if c["kind"] == "released_weights"}
    if cfg.claim is not None and cfg.claim not in known:
        raise ValueError(f"claim={cfg.claim!r}, allowed: {', '.join(sorted(known))}")
    model, trained = load(cfg.weights, data_set=cfg.set, data=OmegaConf.to_container(cfg.data))  # type: ignore[arg-type]
    data = build_data(seed=trained.seed, **trained.data)
    fabric = runs.launch(cfg.fabric)
    module = fabric.setup_module(model)
    metrics, matrix = evaluate(fabric, module, data, batch_size=cfg.batch_size, workers=trained.data.workers)
    for name, value in metrics.items():
        print(f"{name:26s} {value:.4f}")
    n = int(matrix.sum())
    print(f"{n} images")
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    confusion_figure(matrix, data.names, out / "confusion.png")
    with (out / "confusion.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["truth", *data.names])
        writer.writerows([name, *row] for name, row in zip(data.names, matrix.tolist(), strict=True))
    print(f"confusion matrix: {out / 'confusion.png'}, {out / 'confusion.csv'}")
    if cfg.record:
        digest = hashlib.sha256(Path(cfg.weights).expanduser().read_bytes()).hexdigest()
        record = {"claim": cfg.claim, "value": metrics["top1"], "weights_sha256": digest, "n": n}
        record |= {"data": trained.data.name, "metrics": metrics, **runs.provenance(fabric.device)}
        target = Path(cfg.record_to) / f"{digest[:12]}_{trained.data.name}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(record, indent=1) + "\n")
        print(f"recorded in {target}")


if __name__ == "__main__":
    main()
