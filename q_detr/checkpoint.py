"""The checkpoint of train.py: what it says, and the network that it holds; released weights of DETR and SMCA-DETR as well."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.optim import Optimizer
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from common import runs
from common.data.detection import DetectionSet
from common.loop import Loaded
from q_detr.building import KINDS, build_real
from q_detr.data import LONGEST, MEAN, STD, num_classes
from q_detr.detr import DETR
from q_detr.official_weights import load_real_valued, official_options
from q_detr.packing import unpack
from q_detr.quantized_detr import quantize_detr

OFFICIAL_SIDE = 800  # shorter side of the images in the official evaluation


def about(held_out: DetectionSet, *, loss: str, side: int | None) -> dict[str, Any]:
    """What is needed to use a network without its data. loss: softmax | focal; side: shorter side of test images, None as it is.

    classes[i] is the name of category_ids[i]; the network's label is i ("contiguous") or category_ids[i] ("ids")."""
    return {
        "classes": list(held_out.classes), "category_ids": list(held_out.category_ids), "labels": held_out.labels,
        "num_classes": num_classes(held_out), "channels": 3, "size": side, "longest": LONGEST,
        "normalise": {"mean": list(MEAN), "std": list(STD)}, "loss": loss,
    }  # fmt: skip


def label_names(about: Mapping[str, Any]) -> dict[int, str]:
    """{label of the network: name}; a label that is not in it is a gap between category ids and no class."""
    ids = about["category_ids"] if about["labels"] == "ids" else range(len(about["classes"]))
    return dict(zip(ids, about["classes"], strict=True))


def state(
    model: DETR, optimizer: Optimizer, *, epoch: int, row: Mapping[str, float], about: Mapping[str, Any], config: dict
) -> dict[str, Any]:
    """What a run needs to go on, and what anybody needs to use its network."""
    return {
        "model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch, "row": dict(row),
        "about": dict(about), "config": config,
    }  # fmt: skip


def load(path: str | Path) -> Loaded:
    """The network in evaluation mode, the configuration that trained it and what to know to use it, of a checkpoint of train.py
    or a packed file of export.py; of released weights of DETR or SMCA-DETR the configuration is {}.

    FileNotFoundError, `runs.RunError` for a broken file, ValueError for another one."""
    found = runs.load_checkpoint(path)
    if not isinstance(found, Mapping):
        raise ValueError(f"{path} holds no weights by name")
    if "config" not in found:
        return _released(path, found)
    if missing := {"packed" if "packed" in found else "model", "config", "about"} - found.keys():
        raise ValueError(
            f"{path} is no checkpoint of q_detr/train.py or export.py: it lacks {', '.join(sorted(missing))}"
        )
    config, known = found["config"], found["about"]
    model = build_real(**{**config["model"], "weights": None}, num_classes=known["num_classes"])
    if config["method"]["quantised"]:
        model = quantize_detr(model, **config["method"]["quant"])
    if "packed" in found:
        return Loaded(unpack(model, found), config, known)
    model.load_state_dict(found["model"])
    return Loaded(model.eval(), config, known)


def _released(path: str | Path, found: Mapping[str, Any]) -> Loaded:
    """Released weights: with 91 classes they know COCO's ids; the names of other classes are not in the file."""
    try:
        options = official_options(found)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    model, count = build_real(**options), options["num_classes"]
    load_real_valued(model, found)
    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    ids = [i for i, name in enumerate(names) if i and name != "N/A"] if count == len(names) else list(range(count))
    known = {
        "classes": [names[i] if count == len(names) else f"class {i}" for i in ids], "category_ids": ids, "labels": "ids",
        "num_classes": count, "channels": 3, "size": OFFICIAL_SIDE, "longest": LONGEST,
        "normalise": {"mean": list(MEAN), "std": list(STD)}, "loss": KINDS[options["kind"]][1],
    }  # fmt: skip
    return Loaded(model.eval(), {}, known)
