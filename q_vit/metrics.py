"""Accuracy, and what quantisation does to queries and keys."""

from typing import Any

import torch
from torch import Tensor, nn

from common.quant.lsq import LSQQuantizer
from q_vit.information_rectification import code_entropy
from q_vit.quantized_vit import QuantAttention, QuantWindowAttention


def accuracy(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 and, from five classes on, top-5 accuracy in percent. logits: (M, C), labels: (M,)."""
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    result = {"top1": 100 * ranked[:, 0].double().mean().item()}
    return result | ({"top5": 100 * ranked.any(1).double().mean().item()} if logits.shape[1] > 5 else {})


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
