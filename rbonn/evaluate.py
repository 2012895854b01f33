"""Evaluate a classifier or a detector: a checkpoint of train.py or detect.py, a packed file, or published ImageNet weights.

python evaluate.py weights=runs/default/drelu_official/seed0/last.ckpt
python evaluate.py weights=checkpoint.pth.tar data.root=/datasets/imagenet record=true claim=released_rbonn_resnet18
"""

from pathlib import Path

from lightning_fabric import Fabric
from omegaconf import DictConfig, OmegaConf

from common.loop import Loaded
from common.metrics.external import check_claim, print_metrics, write_record
from common.scripts import script
from rbonn.checkpoint import check_classes, load
from rbonn.data import test_set
from rbonn.detect import evaluate_detector, test_scenes
from rbonn.train import classification_metrics, predict

PAPER = Path(__file__).resolve().parent


def classifier_metrics(trained: Loaded, options: dict, cfg: DictConfig, fabric: Fabric) -> tuple[dict[str, float], int]:
    """(top1, top5 and cross-entropy on the test images of the data set `options`, their number)."""
    test, names = test_set(seed=trained.config.get("seed", 0), **options)
    check_classes(trained.about["classes"], names, who=str(cfg.weights))
    network = fabric.setup_module(trained.model)
    logits, labels = predict(fabric, network, test, batch_size=cfg.batch_size, workers=cfg.workers)
    return classification_metrics(logits, labels), len(labels)


def evaluate(cfg: DictConfig, fabric: Fabric) -> dict[str, float]:
    """Prints and returns the metrics of cfg.weights; see configs/evaluate.yaml."""
    check_claim(PAPER, cfg.claim)
    if cfg.sign_zero not in (None, 0, 1, -1):
        raise ValueError(f"sign_zero={cfg.sign_zero}, allowed: null, 0, 1, -1")
    trained = load(cfg.weights, zero=cfg.sign_zero)
    if trained.config and cfg.sign_zero is not None:
        raise ValueError(
            f"sign_zero={cfg.sign_zero} is for published weights; {cfg.weights} keeps the one it was trained with"
        )
    own = trained.config.get("data", {"name": "folder", "size": 224, "val": "val"})
    options = own | {k: v for k, v in OmegaConf.to_container(cfg.data).items() if v is not None}  # type: ignore[union-attr]
    if trained.about["task"] == "detect":
        held_out = test_scenes(options, seed=trained.config["seed"])
        check_classes(trained.about["classes"], list(held_out.classes), who=str(cfg.weights))
        metrics, images = (
            evaluate_detector(fabric, trained.model.to(fabric.device), held_out, batch_size=cfg.batch_size),
            len(held_out),
        )
    else:
        metrics, images = classifier_metrics(trained, options, cfg, fabric)
    print_metrics(metrics, images)
    if cfg.record and fabric.is_global_zero:
        value = metrics["top1" if "top1" in metrics else "map50"]
        write_record(
            cfg.record_to or PAPER / "results/external", weights=cfg.weights, value=value, n=images, data=options["name"],
            metrics=metrics, claim=cfg.claim, device=fabric.device, sign_zero=cfg.sign_zero,
        )  # fmt: skip
    return metrics


main = script("evaluate", evaluate)


if __name__ == "__main__":
    main()
