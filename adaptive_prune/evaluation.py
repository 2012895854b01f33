"""A network on a test set, tokens really dropped: what it says, keeps and costs, over all ranks."""

import torch
from lightning_fabric import Fabric
from torch import Tensor

from adaptive_prune.data import Data
from adaptive_prune.metrics import classification, content
from common.data.batches import eval_batches
from common.loop import gather


@torch.no_grad()
def predict(fabric: Fabric, model, dataset, *, batch_size: int, workers: int) -> dict[str, Tensor]:
    """logits, labels, macs, kept and (where tokens are dropped) masks of a data set in its order, on every rank, on CPU."""
    model.eval()
    rows: dict[str, list[Tensor]] = {}
    loader = eval_batches(
        dataset, batch_size=batch_size, workers=workers, rank=fabric.global_rank, world=fabric.world_size
    )
    for images, labels in loader:
        logits, info = model(images.to(fabric.device), details=True)
        found = {"logits": logits.float(), "labels": labels, "macs": info.macs, "kept": info.kept}
        if info.masks is not None:
            found["masks"] = info.masks.to(torch.uint8)
        for name, value in found.items():
            rows.setdefault(name, []).append(value.to(fabric.device))
    return gather(fabric, {name: torch.cat(parts) for name, parts in rows.items()}, len(dataset))


def evaluate(
    fabric: Fabric, model, data: Data, *, batch_size: int, workers: int, split: str = "test"
) -> tuple[dict[str, float], dict]:
    """All metrics of `adaptive_prune.metrics` on the test set, and what they were computed from; those of `classification` on
    split="validation"."""
    out = predict(fabric, model, getattr(data, split), batch_size=batch_size, workers=workers)
    pruned = getattr(model, "module", model)
    metrics, out["right"] = classification(out["logits"], out["labels"], out["macs"], out["kept"], pruned.cost)
    if split != "test":
        return metrics, out
    more = content(
        out.get("masks"), out["kept"], out["right"], data.truth, patch=pruned.vit.patch_embed.patch_size[0],
        locations=pruned.locations, depth=pruned.cost.depth,
    )  # fmt: skip
    return metrics | more, out
