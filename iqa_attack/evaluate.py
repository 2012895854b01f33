"""Score a folder of images or an image quality data set: correlations per model after its logistic, and the scores as CSV.

python evaluate.py weights=runs/default/all/seed0/last.ckpt                         the test images of its own split
python evaluate.py weights=... data.root=/datasets/kadid                            LIVE, CSIQ, KADID, TID2013, KonIQ or a list
python evaluate.py weights=brisque_model_live.yml kind=brisque data.root=photos/    the authors' or OpenCV's file

Beside every score on 0..10 stands the raw one, on the model's own scale.
"""

from pathlib import Path

import torch
from lightning_fabric import Fabric
from omegaconf import DictConfig
from torch import Tensor

from common.data.files import Table, find_images
from common.metrics.external import check_claim, print_metrics, write_record
from common.scripts import script
from iqa_attack.checkpoint import load
from iqa_attack.photographs.data import build_data, score_all
from iqa_attack.photographs.iqa_sets import SETS, detect_set, read_set, unrated
from iqa_attack.photographs.photos import QualitySet
from iqa_attack.quality_metrics import correlations
from iqa_attack.quality_models.calibration import Scored, fit_calibration
from iqa_attack.quality_models.models import KINDS, Models, load_official

PAPER = Path(__file__).resolve().parent


def load_weights(cfg: DictConfig) -> tuple[Models, dict[str, int | None], dict]:
    """(models, short side that each takes its images at, configuration) of a checkpoint of train.py, or with cfg.kind of the
    authors' model in cfg.weights."""
    if not cfg.kind:
        trained = load(cfg.weights)
        return trained.model, trained.about["resize"], trained.config  # type: ignore[return-value]
    options = {} if cfg.higher_is_better is None else {"higher_is_better": cfg.higher_is_better}
    if options and cfg.kind != "brisque":
        raise ValueError(
            f"higher_is_better={cfg.higher_is_better}: only BRISQUE files come in both signs, not {cfg.kind}"
        )
    scored = load_official(cfg.kind, cfg.weights, b3=cfg.b3, b4=cfg.b4, **options)
    return Models({cfg.kind: scored}), {cfg.kind: None}, {}


def check(cfg: DictConfig) -> None:
    """What can be told before anything is loaded."""
    check_claim(PAPER, cfg.claim)
    if cfg.kind is not None and cfg.kind not in KINDS:
        raise ValueError(f"kind={cfg.kind}, allowed: {', '.join(KINDS)}, or null for a checkpoint of train.py")
    if cfg.data.name not in (names := ("auto", *SETS, "folder")):
        raise ValueError(f"data.name={cfg.data.name}, allowed: {', '.join(names)}")
    if cfg.data.root is None and (cfg.kind or cfg.data.name != "auto"):
        raise ValueError("data.root is not set: give a folder of images or a data set")
    if cfg.resize is not None and cfg.resize < 24:
        raise ValueError(f"resize={cfg.resize}, allowed: >= 24 or null")


def images_of(cfg: DictConfig, trained: dict) -> tuple[QualitySet, str]:
    """The images and what they are: a known set under data.root, else every image below it, else the test split of the
    checkpoint."""
    if cfg.data.root is None:
        return build_data(seed=trained["seed"], parts=("test",), **trained["data"])["test"], "test split"
    name = cfg.data.name
    if name == "auto":
        try:
            name = detect_set(cfg.data.root)
        except FileNotFoundError:
            name = "folder"
    if name == "folder":
        return unrated(find_images(cfg.data.root), cfg.data.root), name
    return read_set(name, cfg.data.root, higher_is_better=cfg.data.higher_is_better), name


def write_scores(cfg: DictConfig, data: QualitySet, raw: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """cfg.out: image, mos, and of every model the score on 0..10 and the raw one."""
    with Table(cfg.out) as table:
        for i, image in enumerate(data.images):
            row = {"image": image if isinstance(image, Path) else data.names[i], "mos": f"{float(data.mos[i]):.4f}"}
            for n in found:
                row |= {n: f"{float(found[n][i]):.4f}", f"raw_{n}": f"{float(raw[n][i]):.6g}"}
            table.write(row)


def evaluate(cfg: DictConfig, fabric: Fabric) -> dict[str, float]:
    """Prints and returns the metrics {srcc_<model>, ...}; writes the scores of every image to cfg.out."""
    check(cfg)
    models, resize, trained = load_weights(cfg)
    data, name = images_of(cfg, trained)
    models = models.to(fabric.device)
    raw, found = {}, {}
    rated = bool(torch.isfinite(data.mos).all())
    for n, scored in models.items():
        side = cfg.resize or resize[n]
        raw[n] = score_all(scored.model, data, device=fabric.device, resize=side, batch=cfg.batch_size)
        if cfg.refit and rated:
            scored = Scored(scored.model, fit_calibration(raw[n], data.mos, source=f"fitted to {name}"))
        found[n] = scored.scale(raw[n])
        print(f"{n}: {scored.calibration}")  # type: ignore[union-attr]
    write_scores(cfg, data, raw, found)
    print(f"{name}: scores in {cfg.out}")
    metrics: dict[str, float] = {}
    if rated:
        for n, s in found.items():
            metrics |= {f"{k}_{n}": v for k, v in correlations(s, data.mos).items()}
    print_metrics(metrics, len(data))
    if cfg.record:
        if not metrics:
            raise ValueError("record=true: these images have no opinions, so there is nothing to record")
        write_record(
            cfg.record_to or PAPER / "results/external", weights=cfg.weights, value=next(iter(metrics.values())), n=len(data),
            data=name, metrics=metrics, claim=cfg.claim, device=fabric.device,
        )  # fmt: skip
    return metrics


main = script("evaluate", evaluate)


if __name__ == "__main__":
    main()
