"""Evaluate a checkpoint of train.py or of the released code: top-1, top-5, and what its q and k look like.

python evaluate.py weights=runs/default/both/seed0/last.ckpt
python evaluate.py weights=twobits_deit_small.pth bits=2 +data.root=/datasets/imagenet claim=released_deit_s_2 record=true
"""

import hashlib
import json
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from common import runs
from common.metrics.claims import load_claims
from q_vit.data import build_data
from q_vit.metrics import accuracy, query_key_statistics
from q_vit.model import rebuild
from q_vit.released import is_released, load_released
from q_vit.train import predict

IMAGENET = {"name": "folder", "size": 224, "crop_pct": 0.875, "workers": 4}


def load(path: str, *, bits: int | None = None, check_bits: bool = True) -> tuple[nn.Module, dict]:
    """(network in evaluation mode, keys of `build_data` it was made for) of our own or a released checkpoint.

    Raises FileNotFoundError, `runs.RunError` for a broken file, ValueError for another format or bit width."""
    state = runs.load_checkpoint(path)
    if is_released(state):
        if bits is None:
            raise ValueError(
                f"{path} is a checkpoint of the released code, whose keys do not say its width: give bits=2, 3 or 4"
            )
        return load_released(path, bits=bits, check=check_bits), dict(IMAGENET)
    model = rebuild(state)
    trained = state["config"]["method"]["bits"]
    if bits not in (None, trained):
        raise ValueError(f"bits={bits} but {path} was trained with {trained} bit; leave bits out")
    return model, dict(state["config"]["data"])


@hydra.main(version_base="1.3", config_path="configs", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    known = {c["id"] for c in load_claims(Path(__file__).parent) if c["kind"] == "released_weights"}
    if cfg.claim is not None and cfg.claim not in known:
        raise ValueError(f"claim={cfg.claim!r}, allowed: {', '.join(sorted(known))}")
    model, trained_on = load(cfg.weights, bits=cfg.bits, check_bits=cfg.check_bits)
    options = {**trained_on, **OmegaConf.to_container(cfg.data)}  # type: ignore[dict-item]
    data = build_data(**options)
    heads = model.get_classifier()
    classes = (heads[0] if isinstance(heads, tuple) else heads).out_features
    if classes != data.num_classes:
        raise ValueError(f"{cfg.weights} has {classes} classes, {options['name']} has {data.num_classes}")
    fabric = runs.launch(cfg.fabric)
    model = fabric.setup_module(model)
    logits, labels = predict(fabric, model, data.test, batch_size=cfg.batch_size, workers=options.get("workers", 0))
    images = torch.stack([data.test[i][0] for i in range(min(100, len(data.test)))]).to(fabric.device)
    metrics = accuracy(logits, labels) | query_key_statistics(model, images)
    for name, value in metrics.items():
        print(f"{name:16s} {value:.4f}")
    print(f"{len(labels)} images")
    if cfg.record:
        digest = hashlib.sha256(Path(cfg.weights).expanduser().read_bytes()).hexdigest()
        record = {"claim": cfg.claim, "value": metrics["top1"], "weights_sha256": digest, "n": len(labels)}
        record |= {"data": options["name"], "metrics": metrics, **runs.provenance(fabric.device)}
        target = Path(__file__).parent / f"results/external/{digest[:12]}_{options['name']}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(record, indent=1) + "\n")
        print(f"recorded in {target}")


if __name__ == "__main__":
    main()
