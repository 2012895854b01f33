"""Evaluate a checkpoint of train.py on its data set or another folder, with its operations and memory.

python evaluate.py weights=runs/default/dcp_ggn/seed0/last.ckpt
python evaluate.py weights=last.ckpt data.root=/datasets/imagenet record=true
"""

import hashlib
import json
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig, OmegaConf

from common import runs
from dcp_nas.checkpoint import load_network
from dcp_nas.counts import count
from dcp_nas.data import build_data, test_folder
from dcp_nas.train import classification_metrics, predict

PAPER = Path(__file__).resolve().parent


@hydra.main(version_base="1.3", config_path="configs", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    network, state = load_network(cfg.weights)
    given = {k: v for k, v in OmegaConf.to_container(cfg.data).items() if v is not None}  # type: ignore[union-attr]
    data_cfg = state["config"]["data"] | given
    if data_cfg["name"] == "folder":  # the training images are not needed
        test = test_folder(data_cfg.get("root"), size=data_cfg["size"], val=data_cfg["val"])
        classes = len(test.classes)
    else:
        data = build_data(seed=state["config"]["seed"], **data_cfg)
        test, classes = data.test, data.classes
    if network.fc.out_features != classes:
        raise ValueError(f"{cfg.weights} has {network.fc.out_features} classes, the data {classes}")
    counts = count(network, torch.zeros(1, state["channels"], state["size"], state["size"]))
    fabric = runs.launch(cfg.fabric)
    logits, labels = predict(fabric, fabric.setup_module(network), test, batch_size=cfg.batch_size, workers=cfg.workers)
    metrics = classification_metrics(logits, labels)
    for name, value in {**metrics, **counts}.items():
        print(f"{name:14s} {value:,.4f}" if isinstance(value, float) else f"{name:14s} {value:,}")
    if cfg.record:
        digest = hashlib.sha256(Path(cfg.weights).expanduser().read_bytes()).hexdigest()
        record = {"claim": None, "value": metrics["top1"], "weights_sha256": digest, "n": len(labels)}
        record |= {"data": data_cfg["name"], "metrics": metrics, "counts": counts, "genotype": state["genotype"]}
        target = Path(cfg.record_to or PAPER / "results/external") / f"{digest[:12]}_{data_cfg['name']}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps({**record, **runs.provenance(fabric.device)}, indent=1) + "\n")
        print(f"recorded in {target}")


if __name__ == "__main__":
    main()
