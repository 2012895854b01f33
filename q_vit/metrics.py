"""Accuracy, and what quantisation does to queries and keys."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.quant.lsq import LSQQuantizer
from q_vit.distribution_guided_distillation import dgd_loss
from q_vit.information_rectification import code_entropy
from q_vit.quantized_vit import QuantAttention, QuantWindowAttention, Tapped


def accuracy(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 and, from five classes on, top-5 accuracy in percent. logits: (M, C), labels: (M,)."""
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    result = {"top1": 100 * ranked[:, 0].double().mean().item()}
    return result | ({"top5": 100 * ranked.any(1).double().mean().item()} if logits.shape[1] > 5 else {})


# ------------------------------------------------------------------------------------------------------ attention maps
@torch.no_grad()
def attention_maps(model: nn.Module, images: Tensor) -> list[Tensor]:
    """softmax(q k^T / sqrt(D)) of every block (B, H, N, N), with the quantised q and k where a network has them."""
    attentions: list[Any] = [m for m in model.modules() if isinstance(m, QuantAttention | QuantWindowAttention)]
    taps = Tapped(model.eval(), "pre_quant" if attentions else "raw")
    qk = taps(images)[1]
    taps.remove()
    if attentions:  # a network that is evaluated on codes does not call its quantisers
        qk = [(m.q_quantizer(q), m.k_quantizer(k)) for m, (q, k) in zip(attentions, qk, strict=True)]
    return [(q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) for q, k in qk]


def attention_distance(attention: Tensor, grid: tuple[int, int], *, prefix: int = 0) -> float:
    """How far a patch looks, in patches: the distance to the patches that it attends to, weighted by its attention to them,
    mean over images, heads and patches. attention: (B, H, N, N) whose first `prefix` tokens are no patches."""
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], dim=1).to(attention.device)
    p = attention[..., prefix:, prefix:].double()
    if p.shape[-1] != len(places):
        raise ValueError(f"{p.shape[-1]} patches for a grid of {grid[0]} x {grid[1]}")
    return (p / p.sum(-1, keepdim=True) * torch.cdist(places, places)).sum(-1).mean().item()


def attention_divergence(teacher: Tensor, student: Tensor) -> float:
    """KL(teacher || student) in nats of attention maps (B, H, N, N), mean over images, heads and tokens."""
    p, q = teacher.double(), student.double().clamp(min=1e-12)
    return (torch.special.xlogy(p, p) - p * q.log()).sum(-1).mean().item()


@torch.no_grad()
def code_entropies(model: nn.Module, images: Tensor, which: Literal["q", "k"]) -> list[float]:
    """Entropy in bits of the codes of the queries or keys of every block, mean over heads; [] where they are not quantised."""
    attentions: list[Any] = [m for m in model.modules() if isinstance(m, QuantAttention | QuantWindowAttention)]
    if not all(isinstance(getattr(m, f"{which}_quantizer"), LSQQuantizer) for m in attentions):
        return []
    if not attentions:
        return []
    taps = Tapped(model.eval(), "pre_quant")
    qk = taps(images)[1]
    taps.remove()
    found = []
    for m, pair in zip(attentions, qk, strict=True):
        quantizer = getattr(m, f"{which}_quantizer")
        codes = quantizer.codes(pair["qk".index(which)])
        found.append(sum(code_entropy(codes[:, h], *quantizer.bounds) for h in range(codes.shape[1])) / codes.shape[1])
    return found


@torch.no_grad()
def query_key_statistics(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Mean over blocks and over q and k: entropy of the codes in bits (`qk_entropy`), share of values outside the range
    (`qk_clipped`, 0..1); and `q_variance_0`, variance of the queries of the first block before quantisation.

    images: (B, C, H, W). Empty for a network whose q and k are not quantised. Evaluation mode is restored."""
    attentions: list[Any] = [m for m in model.modules() if isinstance(m, QuantAttention | QuantWindowAttention)]
    attentions = [m for m in attentions if isinstance(m.q_quantizer, LSQQuantizer)]
    if not attentions:
        return {}
    found: list[tuple[nn.Module, Tensor]] = []
    handles = []
    for m in attentions:
        for norm, quantizer in ((m.q_norm, m.q_quantizer), (m.k_norm, m.k_quantizer)):
            handles.append(norm.register_forward_hook(lambda _, __, out, q=quantizer: found.append((q, out))))
    training = model.training
    model.eval()(images)
    model.train(training)
    for handle in handles:
        handle.remove()
    entropy, clipped = [], []
    for quantizer, x in found:
        assert isinstance(quantizer, LSQQuantizer)
        qn, qp = quantizer.bounds
        codes = quantizer.codes(x)
        # per head: every head has its own step, and its own use of the codes
        entropy += [code_entropy(codes[:, h], qn, qp) for h in range(codes.shape[1])]
        shape = (1, -1, 1, 1)
        v = x / quantizer.effective_step().view(shape) + quantizer.code_of_zero().view(shape)
        clipped.append(((v < qn) | (v > qp)).double().mean().item())
    return {
        "qk_entropy": sum(entropy) / len(entropy),
        "qk_clipped": sum(clipped) / len(clipped),
        "q_variance_0": found[0][1].double().var(correction=0).item(),
    }


@torch.no_grad()
def imitation(
    student: nn.Module, teacher: nn.Module, images: Tensor, *, prefix: tuple[int, int] = (0, 0)
) -> dict[str, float]:
    """How near the attention of a quantised student is to its teacher's, whether or not it was trained for it.

    similarity_distance: ||G^T - G|| (0..sqrt 2), the term that DGD sums, mean over images, blocks, heads, q and k; and
    attention_kl: KL(teacher || student) of the attention maps in nats, mean over blocks, for ViTs of equal tokens.
    images: (B, C, H, W), taken 64 at a time; prefix: tokens that are no patches, (student's, teacher's)."""
    windows = any(isinstance(m, QuantWindowAttention) for m in student.modules())  # their maps have a bias and a mask
    ours, theirs = Tapped(student.eval(), "pre_quant"), Tapped(teacher.eval(), "raw")
    distance, divergence = 0.0, 0.0
    for part in images.split(64):
        share = len(part) / len(images)
        distance += share * dgd_loss(ours(part)[1], theirs(part)[1], reduction="mean", prefix=prefix).item()
        if not windows and prefix[0] == prefix[1]:
            pairs = list(zip(attention_maps(teacher, part), attention_maps(student, part), strict=True))
            divergence += share * sum(attention_divergence(a, b) for a, b in pairs) / len(pairs)
    ours.remove()
    theirs.remove()
    found = {"similarity_distance": distance}
    return found if windows or prefix[0] != prefix[1] else found | {"attention_kl": divergence}
