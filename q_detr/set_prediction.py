"""The set-prediction loss of DETR: Hungarian matching, the loss terms of every decoder layer, post-processing.

A target is {"labels": int64 (n,), "boxes": (n, 4) cxcywh in 0..1}. loss="softmax" is DETR's weighted cross-entropy with "no
object" as the last class; "focal" is SMCA-DETR's sigmoid focal loss over all num_classes + 1 channels.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchvision.ops import box_convert, generalized_box_iou, sigmoid_focal_loss

Target = Mapping[str, Tensor]
Pairs = list[tuple[Tensor, Tensor]]
LOSSES = ("softmax", "focal")


def giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU of cxcywh boxes, (n, 4), (m, 4) -> (n, m) in [-1, 1]; float32 at least, finite for empty boxes."""
    a, b = (box_convert(t.to(torch.promote_types(t.dtype, torch.float32)), "cxcywh", "xyxy") for t in (a, b))
    return generalized_box_iou(a, b).nan_to_num(-1.0)  # two points at one place have no area at all: 0 / 0


def check_targets(targets: Sequence[Target], num_classes: int) -> None:
    """ValueError naming the image for labels outside 0..num_classes-1 and boxes not finite, normalised and of extent."""
    for i, t in enumerate(targets):
        labels, boxes = t["labels"], t["boxes"]
        if boxes.shape != (len(labels), 4):
            raise ValueError(f"target {i}: {len(labels)} labels but boxes of shape {tuple(boxes.shape)}")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
            raise ValueError(
                f"target {i}: labels {int(labels.min())}..{int(labels.max())}, but num_classes={num_classes} allows "
                f"0..{num_classes - 1}. num_classes is the largest label + 1: 91 for COCO's category ids"
            )
        if not bool(torch.isfinite(boxes).all()):
            raise ValueError(f"target {i}: boxes are not finite")
        if len(boxes) and (float(boxes.max()) > 1 or float(boxes.min()) < 0):
            raise ValueError(f"target {i}: boxes reach {float(boxes.max()):g}; expected cxcywh in 0..1, not pixels")
        if len(boxes) and float(boxes[:, 2:].min()) <= 0:
            raise ValueError(f"target {i}: a box has no extent; drop such boxes when loading")


@torch.no_grad()
def match(outputs: Mapping[str, Tensor], targets: Sequence[Target], *, loss: str = "softmax") -> Pairs:
    """The assignment of least cost, per image (query indices, target indices), both int64 on the CPU.

    Cost = 5 L1(cxcywh) - 2 GIoU - softmax(logits)[class], or 2 x the focal form of the class cost. FloatingPointError if a
    prediction is NaN or infinite."""
    if loss not in LOSSES:
        raise ValueError(f"loss={loss!r}, allowed: {', '.join(LOSSES)}")
    logits, boxes = outputs["pred_logits"].float(), outputs["pred_boxes"].float()
    if not bool(torch.isfinite(logits).all() and torch.isfinite(boxes).all()):
        bad = (~(torch.isfinite(logits).all(-1) & torch.isfinite(boxes).all(-1))).any(1).nonzero().flatten().tolist()
        raise FloatingPointError(
            f"the predictions for images {bad} of the batch are not finite: matching is impossible"
        )
    labels, wanted = (torch.cat([t[k] for t in targets]).to(logits.device) for k in ("labels", "boxes"))
    if loss == "softmax":
        cost = -logits.softmax(-1)[..., labels]
    else:
        p = logits.sigmoid()[..., labels]
        positive = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log()
        negative = 0.75 * p**2 * -(1 - p + 1e-8).log()
        cost = 2 * (positive - negative)
    # Every query against the objects of all images at once, of which each image takes its own: one transfer per batch.
    flat, wanted = boxes.flatten(0, 1), wanted.float()
    spatial = 5 * torch.cdist(flat, wanted, p=1) - 2 * giou(flat, wanted)
    cost = (cost + spatial.view(*boxes.shape[:2], -1)).cpu().split([len(t["labels"]) for t in targets], dim=-1)
    pairs = []
    for i, own in enumerate(cost):
        rows, columns = linear_sum_assignment(own[i].numpy())
        pairs.append((torch.from_numpy(rows), torch.from_numpy(columns)))
    return pairs


class SetCriterion(nn.Module):
    """{"ce", "bbox", "giou"} summed over the decoder layers (matched anew in each) and weighted, and the unweighted
    `class_error` and `cardinality_error` of the last layer for the log.

    Weights 1, 5, 2 (softmax) or 2, 5, 2 (focal). The box terms are sums over the pairs / number of targets, which is at least 1
    and averaged over the processes."""

    def __init__(self, num_classes: int, *, loss: str = "softmax", no_object: float = 0.1):
        super().__init__()
        if loss not in LOSSES:
            raise ValueError(f"loss={loss!r}, allowed: {', '.join(LOSSES)}")
        self.num_classes, self.loss = num_classes, loss
        self.weights = {"ce": 1.0 if loss == "softmax" else 2.0, "bbox": 5.0, "giou": 2.0}
        self.register_buffer("class_weight", torch.ones(num_classes + 1), persistent=False)
        self.class_weight[-1] = no_object  # type: ignore[index]

    def forward(self, outputs: Mapping, targets: Sequence[Target]) -> tuple[dict[str, Tensor], dict[str, float]]:
        check_targets(targets, self.num_classes)
        count = outputs["pred_logits"].new_tensor(float(sum(len(t["labels"]) for t in targets)))
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(count)
            count = count / dist.get_world_size()
        count = count.clamp(min=1)
        total: dict[str, Tensor] = {}
        for layer in [*outputs["aux_outputs"], outputs]:
            for name, value in self.layer_losses(layer, targets, count).items():
                total[name] = total.get(name, 0) + self.weights[name] * value
        return total, self.diagnostics(outputs, targets)

    def layer_losses(self, layer: Mapping[str, Tensor], targets: Sequence[Target], count: Tensor) -> dict[str, Tensor]:
        """The three unweighted terms of one layer."""
        logits = layer["pred_logits"]
        batch, rows, columns, pairs = self._matched(layer, targets)
        labels = torch.cat([t["labels"][j.to(logits.device)] for t, (_, j) in zip(targets, pairs, strict=True)])
        if self.loss == "softmax":
            classes = torch.full(logits.shape[:2], self.num_classes, device=logits.device)
            classes[batch, rows] = labels
            ce = F.cross_entropy(logits.transpose(1, 2), classes, self.class_weight)  # type: ignore[arg-type]
        else:
            onehot = torch.zeros_like(logits)
            onehot[batch, rows, labels] = 1
            ce = sigmoid_focal_loss(logits, onehot, alpha=0.25, gamma=2, reduction="sum") / count
        predicted = layer["pred_boxes"][batch, rows]
        wanted = torch.cat([t["boxes"][j.to(logits.device)] for t, (_, j) in zip(targets, pairs, strict=True)])
        overlap = giou(predicted, wanted).diagonal()
        return {"ce": ce, "bbox": (predicted - wanted).abs().sum() / count, "giou": (1 - overlap).sum() / count}

    @torch.no_grad()
    def diagnostics(self, outputs: Mapping[str, Tensor], targets: Sequence[Target]) -> dict[str, float]:
        logits = outputs["pred_logits"]
        batch, rows, _, pairs = self._matched(outputs, targets)
        labels = torch.cat([t["labels"][j.to(logits.device)] for t, (_, j) in zip(targets, pairs, strict=True)])
        right = (logits[batch, rows].argmax(-1) == labels).float().mean().item() if len(labels) else 1.0
        found = (logits.argmax(-1) != self.num_classes).sum(1).float()
        present = found.new_tensor([float(len(t["labels"])) for t in targets])
        return {"class_error": 100 * (1 - right), "cardinality_error": (found - present).abs().mean().item()}

    def _matched(self, layer: Mapping[str, Tensor], targets: Sequence[Target]) -> tuple[Tensor, Tensor, Tensor, Pairs]:
        pairs = match(layer, targets, loss=self.loss)
        batch = torch.cat([torch.full_like(i, k) for k, (i, _) in enumerate(pairs)])
        rows, columns = torch.cat([i for i, _ in pairs]), torch.cat([j for _, j in pairs])
        device = layer["pred_logits"].device
        return batch.to(device), rows.to(device), columns.to(device), pairs


@torch.no_grad()
def postprocess(outputs: Mapping[str, Tensor], sizes: Tensor, *, loss: str = "softmax") -> list[dict[str, Tensor]]:
    """Per image {"scores", "labels", "boxes" xyxy in pixels}. sizes: (B, 2) original height, width.

    softmax: one detection per query, its best class without "no object". focal: the Q best of all (query, class) scores."""
    if loss not in LOSSES:
        raise ValueError(f"loss={loss!r}, allowed: {', '.join(LOSSES)}")
    logits, boxes = outputs["pred_logits"], box_convert(outputs["pred_boxes"], "cxcywh", "xyxy")
    if loss == "softmax":
        scores, labels = logits.softmax(-1)[..., :-1].max(-1)
    else:
        scores, index = logits.sigmoid().flatten(1).topk(logits.shape[1], dim=1)
        labels = index % logits.shape[2]
        query = torch.div(index, logits.shape[2], rounding_mode="floor")
        boxes = boxes.gather(1, query.unsqueeze(-1).expand(-1, -1, 4))
    height, width = sizes.to(boxes).unbind(1)
    boxes = boxes * torch.stack([width, height, width, height], dim=1)[:, None]
    return [{"scores": s, "labels": c, "boxes": b} for s, c, b in zip(scores, labels, boxes, strict=True)]
