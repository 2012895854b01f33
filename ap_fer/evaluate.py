"""Evaluate a checkpoint of train.py or the released APViT: accuracies, macro F1, confusion matrix.

python evaluate.py weights=runs/default/app_atp/seed0/last.ckpt
python evaluate.py weights=... set=own data.root=my_faces/                             # my_faces/val/<class>/*.jpg
python evaluate.py weights=APViT_RAF.pth set=raf_db data.root=/datasets claim=apvit_raf_db_weights record=true
"""

import csv
from pathlib import Path

from lightning_fabric import Fabric
from omegaconf import DictConfig
from torch import Tensor

from ap_fer.checkpoint import data_options, load
from ap_fer.data import build_data
from ap_fer.metrics import confusion_figure
from ap_fer.train import evaluate as measure
from common.metrics.external import check_claim, print_metrics, write_record
from common.scripts import script

PAPER = Path(__file__).resolve().parent


def write_confusion(matrix: Tensor, names: list[str], out: Path) -> None:
    """confusion.png and confusion.csv."""
    out.mkdir(parents=True, exist_ok=True)
    confusion_figure(matrix, names, out / "confusion.png")
    with (out / "confusion.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["truth", *names])
        writer.writerows([name, *row] for name, row in zip(names, matrix.tolist(), strict=True))
    print(f"confusion matrix: {out / 'confusion.png'}, {out / 'confusion.csv'}")


def evaluate(cfg: DictConfig, fabric: Fabric) -> dict[str, float]:
    """Prints and returns the metrics of cfg.weights; see configs/evaluate.yaml."""
    check_claim(PAPER, cfg.claim)
    trained = load(cfg.weights)
    options = data_options(trained, cfg.set, cfg.data)
    data = build_data(seed=trained.config.get("seed", 0), **options)
    if list(data.names) != trained.about["classes"]:
        hint = "; set=own takes class folders as they are" if options["name"] == "folder" else ""
        raise ValueError(
            f"the data has the classes {', '.join(data.names)}, the network {', '.join(trained.about['classes'])}{hint}"
        )
    if cfg.claim and data.lacks:
        raise ValueError(f"claim={cfg.claim} is about the whole set; {data.lacks}")
    if trained.about["drawn"] and options["name"] != "faces":
        print("notice: this network was trained on drawn faces; photographs are new to it")
    module = fabric.setup_module(trained.model)
    metrics, matrix = measure(fabric, module, data, batch_size=cfg.batch_size, workers=cfg.workers)
    n = int(matrix.sum())
    print_metrics(metrics, n)
    if fabric.is_global_zero:
        write_confusion(matrix, list(data.names), Path(cfg.out).expanduser())
        if cfg.record:
            write_record(
                cfg.record_to or PAPER / "results/external", weights=cfg.weights, value=metrics["top1"], n=n,
                data=options["name"], metrics=metrics, claim=cfg.claim, device=fabric.device,
            )  # fmt: skip
    return metrics


main = script("evaluate", evaluate)


if __name__ == "__main__":
    main()
