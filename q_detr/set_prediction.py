"""The set-prediction loss of DETR: Hungarian matching, the loss terms of every decoder layer, post-processing.

A target is {"labels": int64 (n,), "boxes": (n, 4) cxcywh in 0..1}. loss="softmax" is DETR's weighted cross-entropy with "no
object" as the last class; "focal" is SMCA-DETR's sigmoid focal loss over all num_classes + 1 channels.
"""

import itertools
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
    """ValueError naming the image for labels outside 0..num_classes-1 and boxes not finite, normalised and of extent.

    One host synchronisation for all images."""
    for i, t in enumerate(targets):
        if t["boxes"].shape != (len(t["labels"]), 4):
            raise ValueError(f"target {i}: {len(t['labels'])} labels but boxes of shape {tuple(t['boxes'].shape)}")
    labels, boxes = (torch.cat([t[k] for t in targets]) for k in ("labels", "boxes"))
    inside = (boxes >= 0).all(1) & (boxes <= 1).all(1) & (boxes[:, 2:] > 0).all(1)  # NaN is not
    if bool(((labels >= 0) & (labels < num_classes) & inside).all()):
        return
    for i, t in enumerate(targets):
        _check_target(i, t["labels"], t["boxes"], num_classes)


def _check_target(i: int, labels: Tensor, boxes: Tensor, num_classes: int) -> None:
    if not len(labels):
        return
    if not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(
            f"target {i}: labels {int(labels.min())}..{int(labels.max())}, but num_classes={num_classes} allows "
            f"0..{num_classes - 1}. num_classes is the largest label + 1: 91 for COCO's category ids"
        )
    if not bool(torch.isfinite(boxes).all()):
        raise ValueError(f"target {i}: boxes are not finite")
    if float(boxes.max()) > 1 or float(boxes.min()) < 0:
        raise ValueError(f"target {i}: boxes reach {float(boxes.max()):g}; expected cxcywh in 0..1, not pixels")
    if float(boxes[:, 2:].min()) <= 0:
        raise ValueError(f"target {i}: a box has no extent; drop such boxes when loading")


def match(outputs: Mapping[str, Tensor], targets: Sequence[Target], *, loss: str = "softmax") -> Pairs:
    """The assignment of least cost, per image (query indices, target indices), both int64 on the CPU.

    Cost = 5 L1(cxcywh) - 2 GIoU - softmax(logits)[class], or 2 x the focal form of the class cost. FloatingPointError if a
    prediction is NaN or infinite."""
    return match_layers([outputs], targets, loss=loss)[0]


@torch.no_grad()
def match_layers(layers: Sequence[Mapping[str, Tensor]], targets: Sequence[Target], *, loss: str) -> list[Pairs]:
    """`match` of every decoder layer, with one transfer to the host for all layers and images."""
    if loss not in LOSSES:
        raise ValueError(f"loss={loss!r}, allowed: {', '.join(LOSSES)}")
    device = layers[0]["pred_logits"].device
    labels, wanted = (torch.cat([t[k] for t in targets]).to(device) for k in ("labels", "boxes"))
    # Beside the costs a column that is 0, or NaN where a prediction of the query is not finite.
    costs = [torch.cat([_cost(layer, labels, wanted, loss), _not_finite(layer)[..., None]], dim=-1) for layer in layers]
    found = []
    for cost in torch.stack(costs).cpu():
        if bad := cost[..., -1].isnan().any(1).nonzero().flatten().tolist():
            raise FloatingPointError(
                f"the predictions for images {bad} of the batch are not finite: matching is impossible"
            )
        pairs = []
        for i, own in enumerate(cost[..., :-1].split([len(t["labels"]) for t in targets], dim=-1)):
            rows, columns = linear_sum_assignment(own[i].numpy())
            pairs.append((torch.from_numpy(rows), torch.from_numpy(columns)))
        found.append(pairs)
    return found


def _cost(layer: Mapping[str, Tensor], labels: Tensor, wanted: Tensor, loss: str) -> Tensor:
    """Every query against the objects of all images at once, of which each image takes its own: (B, Q, all objects)."""
    logits, boxes = layer["pred_logits"].float(), layer["pred_boxes"].float()
    if loss == "softmax":
        cost = -logits.softmax(-1)[..., labels]
    else:
        p = logits.sigmoid()[..., labels]
        positive = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log()
        negative = 0.75 * p**2 * -(1 - p + 1e-8).log()
        cost = 2 * (positive - negative)
    flat, wanted = boxes.flatten(0, 1), wanted.float()
    spatial = 5 * torch.cdist(flat, wanted, p=1) - 2 * giou(flat, wanted)
    return cost + spatial.view(*boxes.shape[:2], -1)


def _not_finite(layer: Mapping[str, Tensor]) -> Tensor:
    """0 for a query whose predictions are finite, else NaN; (B, Q)."""
    return (0 * layer["pred_logits"].float()).sum(-1) + (0 * layer["pred_boxes"].float()).sum(-1)


class SetCriterion(nn.Module):
    """{"ce", "bbox", "giou"} summed over the decoder layers (matched anew in each) and weighted, and the unweighted
    `class_error` and `cardinality_error` of the last layer for the log.

    Weights 1, 5, 2 (softmax) or 2, 5, 2 (focal). The box terms are sums over the pairs / number of targets (`count`)."""

    def __init__(self, num_classes: int, *, loss: str = "softmax", no_object: float = 0.1):
        super().__init__()
        if loss not in LOSSES:
            raise ValueError(f"loss={loss!r}, allowed: {', '.join(LOSSES)}")
        self.num_classes, self.loss = num_classes, loss
        self.weights = {"ce": 1.0 if loss == "softmax" else 2.0, "bbox": 5.0, "giou": 2.0}
        self.register_buffer("class_weight", torch.ones(num_classes + 1), persistent=False)
        self.class_weight[-1] = no_object  # type: ignore[index]

    def count(self, targets: Sequence[Target], *, parts: int = 1) -> Tensor:
        """Number of targets that the box terms are divided by: the mean over processes and `parts` micro-batches, at least 1.
        targets: of all micro-batches of this process."""
        count = self.class_weight.new_tensor(float(sum(len(t["labels"]) for t in targets)) / parts)  # type: ignore[operator]
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(count)
            count = count / dist.get_world_size()
        return count.clamp(min=1)

    def forward(
        self, outputs: Mapping, targets: Sequence[Target], count: Tensor | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor | float]]:
        """count: of `count` where these targets are one of several micro-batches."""
        check_targets(targets, self.num_classes)
        if count is None:
            count = self.count(targets)
        layers = [*outputs["aux_outputs"], outputs]
        pairs = match_layers(layers, targets, loss=self.loss)
        total: dict[str, Tensor] = {}
        for layer, own in zip(layers, pairs, strict=True):
            for name, value in self.layer_losses(layer, targets, count, own).items():
                total[name] = total.get(name, 0) + self.weights[name] * value
        return total, self.diagnostics(outputs, targets, pairs[-1])

    def layer_losses(
        self, layer: Mapping[str, Tensor], targets: Sequence[Target], count: Tensor, pairs: Pairs
    ) -> dict[str, Tensor]:
        """The three unweighted terms of one layer."""
        logits = layer["pred_logits"]
        batch, rows, labels, wanted = _matched(pairs, targets, logits.device)
        if self.loss == "softmax":
            classes = torch.full(logits.shape[:2], self.num_classes, device=logits.device)
            classes[batch, rows] = labels
            ce = F.cross_entropy(logits.transpose(1, 2), classes, self.class_weight)  # type: ignore[arg-type]
        else:
            onehot = torch.zeros_like(logits)
            onehot[batch, rows, labels] = 1
            ce = sigmoid_focal_loss(logits, onehot, alpha=0.25, gamma=2, reduction="sum") / count
        predicted = layer["pred_boxes"][batch, rows]
        overlap = giou(predicted, wanted).diagonal()
        return {"ce": ce, "bbox": (predicted - wanted).abs().sum() / count, "giou": (1 - overlap).sum() / count}

    @torch.no_grad()
    def diagnostics(
        self, outputs: Mapping[str, Tensor], targets: Sequence[Target], pairs: Pairs
    ) -> dict[str, Tensor | float]:
        logits = outputs["pred_logits"]
        batch, rows, labels, _ = _matched(pairs, targets, logits.device)
        right = (logits[batch, rows].argmax(-1) == labels).float().mean().double() if len(labels) else 1.0
        found = (logits.argmax(-1) != self.num_classes).sum(1).float()
        present = found.new_tensor([float(len(t["labels"])) for t in targets])
        return {"class_error": 100 * (1 - right), "cardinality_error": (found - present).abs().mean().double()}


def _matched(pairs: Pairs, targets: Sequence[Target], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(image, query, label, box) of every pair of the batch, with one transfer to the device."""
    offsets = [0, *itertools.accumulate(len(t["labels"]) for t in targets)]
    batch = torch.cat([torch.full_like(i, k) for k, (i, _) in enumerate(pairs)])
    columns = torch.cat([j + offset for (_, j), offset in zip(pairs, offsets, strict=False)])
    batch, rows, columns = torch.stack([batch, torch.cat([i for i, _ in pairs]), columns]).to(device)
    labels, wanted = (torch.cat([t[k] for t in targets])[columns] for k in ("labels", "boxes"))
    return batch, rows, labels, wanted


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
