"""Self-distillation from the dense starting point."""

import torch
import torch.nn.functional as F
from torch import Tensor


def logit_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of class distributions at temperature 1, mean over the batch. Logits: (B, C)."""
    log_s, log_t = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)


def token_kl(student: Tensor, teacher: Tensor, alive: Tensor) -> Tensor:
    """KL(teacher || student) between softmaxed token outputs, mean over the tokens still alive (LV-ViT only).

    student, teacher: (B, N, C) logits of the auxiliary head; alive: (B, N), 1 or 0, used without gradient. 0 if no token
    is alive."""
    log_s, log_t = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    per_token = (log_t.exp() * (log_t - log_s)).sum(-1)
    weight = alive.detach().to(per_token.dtype)
    return (per_token * weight).sum() / weight.sum().clamp(min=1)


@torch.no_grad()
def teacher_outputs(vit, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Class logits (B, C) of a dense timm model, and token logits (B, N, C) where it has an auxiliary head."""
    features = vit.forward_features(images)
    if not hasattr(vit, "aux_head"):
        return vit.forward_head(features), None
    return vit.head(features[:, 0]), vit.aux_head(features[:, vit.num_prefix_tokens :])
