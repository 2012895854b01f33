"""The numbers of a classifier."""

import torch.nn.functional as F
from torch import Tensor


def classification_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """top1 and top5 in percent, test_ce in nats. logits: (N, C), labels: (N,)."""
    best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    top1, top5 = (100 * best[:, :k].any(1).double().mean().item() for k in (1, 5))
    return {"top1": top1, "top5": top5, "test_ce": F.cross_entropy(logits, labels).item()}
