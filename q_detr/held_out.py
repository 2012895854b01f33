"""The test set: its images as the network sees them, the detections on it, and how far a student is from its teacher there."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor
from torch.utils.data import DataLoader

from common.data.detection import DetectionSet, collate, detection_sets
from common.data.vision import data_root
from common.runs import RunError
from q_detr.building import cross_attention_statistics
from q_detr.data import Prepared, normalise, resize_for_test, source_options
from q_detr.detr import DETR, pad_images
from q_detr.distribution_rectification import drd_loss
from q_detr.set_prediction import postprocess


def held_out_set(data: Mapping[str, Any]) -> DetectionSet:
    """The test set of a data configuration; nothing of the training set needs to be there."""
    own = source_options(data)
    if own["name"] == "scenes":
        return detection_sets(**{**own, "train": 1})[1]
    data_root(own.get("root"))  # the message for an unset root comes before any other
    return detection_sets(**{**own, "train": own["test"], "voc_train": [own.get("voc_test", "VOC2007")]})[1]


def check_floor(ap50: float, *, floor: float | None, who: str) -> None:
    """RunError, with the number, for an AP50 (in points) below a floor that was declared beforehand; None declares none."""
    if floor is not None and not ap50 >= floor:
        raise RunError(
            f"{who}: AP50 {ap50:.2f} is below evaluate.floor={floor:g}. What is measured against so weak a network means "
            "nothing, so nothing goes on from here"
        )


def objects(dataset: DetectionSet) -> int:
    """Number of annotated objects that count."""
    return sum(int((dataset.target(i)["iscrowd"] == 0).sum()) for i in range(len(dataset)))


def held_out_batch(
    dataset: DetectionSet, indices: Sequence[int], device: torch.device, side: int | None
) -> tuple[Tensor, Tensor, list[dict[str, Any]]]:
    """Padded, normalised images and their mask, with the targets of the data set."""
    images, targets = collate([dataset[i] for i in indices])
    batch, mask = pad_images([resize_for_test(normalise(image), side) for image in images])
    return batch.to(device), mask.to(device), targets


@torch.no_grad()
def predict(
    fabric: Fabric, model: Any, dataset: DetectionSet, *, loss: str, batch_size: int, side: int | None, workers: int = 0
) -> dict[int, dict[str, Tensor]]:
    """{image id: boxes xyxy in pixels of the original image, scores, labels} on the CPU, all images on every rank.

    Ranks share the batches, which are those of one process, so that padding and numbers are the same."""
    model.eval()
    n = len(dataset)
    batches = [list(range(start, min(start + batch_size, n))) for start in range(0, n, batch_size)]
    own = batches[fabric.global_rank :: fabric.world_size]
    rows: dict[str, Tensor] = {}
    loader = DataLoader(dataset, batch_sampler=own, num_workers=workers, collate_fn=collate)  # type: ignore[arg-type]
    for indices, (images, targets) in zip(own, loader, strict=True):
        batch, mask = pad_images([resize_for_test(normalise(image), side) for image in images])
        sizes = torch.stack([t["size"] for t in targets]).to(fabric.device)
        found = postprocess(model(batch.to(fabric.device), mask.to(fabric.device)), sizes, loss=loss)
        for name in found[0]:
            value = torch.stack([p[name] for p in found])
            if name not in rows:
                rows[name] = value.new_zeros(n, *value.shape[1:])
            rows[name][indices] = value
    if fabric.world_size > 1:
        rows = _from_all_ranks(fabric, rows, (n, model.queries))
    rows = {name: value.cpu() for name, value in rows.items()}
    return {info["id"]: {name: value[k] for name, value in rows.items()} for k, info in enumerate(dataset.infos)}


def _from_all_ranks(fabric: Fabric, rows: dict[str, Tensor], shape: tuple[int, int]) -> dict[str, Tensor]:
    """The sum over ranks: what another rank has predicted is 0 here. A rank may have had no batch at all."""
    empty = {
        "scores": torch.zeros(shape),
        "labels": torch.zeros(shape, dtype=torch.int64),
        "boxes": torch.zeros(*shape, 4),
    }
    filled = {name: rows.get(name, value).to(fabric.device) for name, value in empty.items()}
    return {name: fabric.all_reduce(value, reduce_op="sum") for name, value in filled.items()}  # type: ignore[misc]


@torch.no_grad()
def held_out_distance(
    model: DETR, teacher: DETR, dataset: DetectionSet, device: torch.device, *, images: int, side: int | None
) -> dict[str, float]:
    """L_DRD of a test batch with the paper's choices, whatever the arm was trained with, and the query statistics."""
    batch, mask, _ = held_out_batch(dataset, range(min(images, len(dataset))), device, side)
    items = Prepared(dataset)
    boxes = [items[i][1]["boxes"].to(device) for i in range(len(batch))]
    model.eval()
    value, pairs = drd_loss(model(batch, mask), teacher(batch, mask), boxes)
    found = {"held_out_drd": float(value), "held_out_pairs": float(pairs["pairs"])}
    return found | cross_attention_statistics(model, batch, mask)
