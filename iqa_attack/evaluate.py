"""Score a folder of images or an image quality data set: correlations per model after its logistic, or the scores as
CSV.

python evaluate.py weights=runs/default/all/seed0/last.ckpt                         the test images of its own split
python evaluate.py weights=... data.root=/datasets/kadid                            LIVE, CSIQ, KADID, TID2013, KonIQ
or labels.csv
python evaluate.py weights=svm_model.mat kind=brisque higher_is_better=true data.root=photos/
"""

import csv
import hashlib
import json
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig, OmegaConf

from common import runs
from iqa_attack.data import build_data, score_all
from iqa_attack.images import find_images
from iqa_attack.iqa_sets import detect_set, read_set, unrated
from iqa_attack.nr_models import Scored, load_official, load_trained
from iqa_attack.photos import QualitySet
from iqa_attack.quality_metrics import correlations, fit_logistic


def load(cfg: DictConfig) -> dict[str, Scored]:
    """The models of a checkpoint of train.py, or with cfg.kind the authors' model in cfg.weights."""
    if not cfg.kind:
        return load_trained(cfg.weights)
    options = {} if cfg.higher_is_better is None else {"higher_is_better": cfg.higher_is_better}
    logistic = {"b3": 0.0, "b4": 1.0} if cfg.kind == "niqe" else {}  # a monotone map does not change what is ranked
    return {cfg.kind: load_official(cfg.kind, cfg.weights, **options, **logistic)}


def images_of(cfg: DictConfig) -> tuple[QualitySet, str]:
    """The images and what they are: a known set under data.root, else every image below it, else the test split of
    the checkpoint."""
    if cfg.data.root is None:
        if cfg.kind:
            raise ValueError("data.root is not set: give a folder of images or a data set")
        trained = OmegaConf.create(runs.load_checkpoint(cfg.weights)["config"])
        return build_data(seed=trained.seed, **trained.data)["test"], "test split"  # type: ignore[arg-type]
    if cfg.data.name == "folder":
        return unrated(find_images(cfg.data.root)), "folder"
    try:
        name = detect_set(cfg.data.root) if cfg.data.name == "auto" else cfg.data.name
    except FileNotFoundError:
        return unrated(find_images(cfg.data.root)), "folder"
    return read_set(name, cfg.data.root, higher_is_better=cfg.data.higher_is_better), name


def evaluate(cfg: DictConfig) -> dict[str, float]:
    """Prints and returns the metrics {srcc_<model>, ...}; without opinions writes the scores of every image to
    cfg.out."""
    models, (data, name) = load(cfg), images_of(cfg)
    device = torch.device(
        "cuda" if torch.cuda.is_available() and cfg.device == "auto" else "cpu" if cfg.device == "auto" else cfg.device
    )
    found = {n: score_all(m.to(device), data, device=device, resize=cfg.resize) for n, m in models.items()}
    with Path(cfg.out).open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image", "mos", *found])
        for i, image in enumerate(data.names):
            writer.writerow([image, f"{float(data.mos[i]):.4f}", *(f"{float(s[i]):.4f}" for s in found.values())])
    metrics: dict[str, float] = {}
    print(f"{name}: {len(data)} images, scores in {cfg.out}")
    if not bool(torch.isfinite(data.mos).all()):
        return metrics
    for n, s in found.items():
        if cfg.refit:
            raw = score_all(models[n].model, data, device=device, resize=cfg.resize)
            s = Scored(models[n].model, *fit_logistic(raw, data.mos))
            s = score_all(s, data, device=device, resize=cfg.resize)
        row = correlations(s, data.mos)
        metrics |= {f"{k}_{n}": v for k, v in row.items()}
        print(f"{n:10s}" + "  ".join(f"{k.upper()} {v:.4f}" for k, v in row.items()))
    if cfg.record:
        digest = hashlib.sha256(_bytes(cfg.weights)).hexdigest()
        record = {
            "claim": None,
            "value": next(iter(metrics.values())),
            "weights_sha256": digest,
            "n": len(data),
            "data": name,
        }
        target = Path(cfg.record_to) / f"{digest[:12]}_{name.replace(' ', '_')}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(record | {"metrics": metrics} | runs.provenance(device), indent=1) + "\n")
        print(f"recorded in {target}")
    return metrics


def _bytes(path: str) -> bytes:
    where = Path(path).expanduser()
    return b"".join(p.read_bytes() for p in sorted(where.glob("*.mat"))) if where.is_dir() else where.read_bytes()


@hydra.main(version_base="1.3", config_path="configs", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    evaluate(cfg)


if __name__ == "__main__":
    main()
