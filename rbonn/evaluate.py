"""Evaluate a checkpoint of train.py, or a published ReActNet or RBONN checkpoint on ImageNet.

python evaluate.py weights=runs/default/drelu_official/seed0/last.ckpt
python evaluate.py weights=checkpoint.pth.tar data.root=/datasets/imagenet record=true claim=released_rbonn_resnet18
"""

import hashlib
import json
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from common import runs
from common.metrics.claims import load_claims
from rbonn.checkpoint import load_network
from rbonn.data import build_data, test_folder
from rbonn.train import classification_metrics, predict

PAPER = Path(__file__).resolve().parent


@hydra.main(version_base="1.3", config_path="configs", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    known = [c["id"] for c in load_claims(PAPER) if c["kind"] == "released_weights"]
    if cfg.claim is not None and cfg.claim not in known:
        raise ValueError(f"claim={cfg.claim}, allowed: {', '.join(known)}")
    network, state = load_network(cfg.weights, zero=cfg.sign_zero)
    trained = state["config"]["data"] if state else {"name": "folder", "size": 224, "val": "val"}
    data_cfg = trained | {k: v for k, v in OmegaConf.to_container(cfg.data).items() if v is not None}  # type: ignore[union-attr]
    if data_cfg["name"] == "folder":  # the training images are not needed
        test = test_folder(data_cfg.get("root"), size=data_cfg["size"], val=data_cfg["val"])
        classes = len(test.classes)
    else:
        data = build_data(seed=state["config"]["seed"], **data_cfg)  # type: ignore[index]
        test, classes = data.test, data.classes
    if network.fc.out_features != classes:
        raise ValueError(f"{cfg.weights} has {network.fc.out_features} classes, the data {classes}")
    fabric = runs.launch(cfg.fabric)
    network = fabric.setup_module(network)
    logits, labels = predict(fabric, network, test, batch_size=cfg.batch_size, workers=cfg.workers)
    metrics = classification_metrics(logits, labels)
    for name, value in metrics.items():
        print(f"{name:12s} {value:.4f}")
    if cfg.record:
        digest = hashlib.sha256(Path(cfg.weights).expanduser().read_bytes()).hexdigest()
        record = {"claim": cfg.claim, "value": metrics["top1"], "weights_sha256": digest, "n": len(labels)}
        record |= {"data": data_cfg["name"], "metrics": metrics, "sign_zero": cfg.sign_zero}
        target = Path(cfg.record_to or PAPER / "results/external") / f"{digest[:12]}_{data_cfg['name']}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps({**record, **runs.provenance(fabric.device)}, indent=1) + "\n")
        print(f"recorded in {target}")


if __name__ == "__main__":
    main()
