"""The weights of a quantised network packed to their bits, so that a file has the size that is claimed for it.

Weights at b bits take b / 32 of their float size; steps, biases, norms and embeddings stay float32. It is a storage format: there
is no 2-bit arithmetic on CPUs."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from common.quant.lsq import MIN_STEP, LSQQuantizer
from common.quant.pack import pack_codes, unpack_codes


def quantised_weights(model: nn.Module) -> dict[str, tuple[Any, LSQQuantizer]]:
    """{name of the weight: (its layer, its quantiser)}."""
    layers = ((n, m, getattr(m, "weight_quantizer", None)) for n, m in model.named_modules())
    return {f"{n}.weight": (m, q) for n, m, q in layers if isinstance(q, LSQQuantizer)}


@torch.no_grad()
def pack(model: nn.Module) -> dict[str, Any]:
    """{"packed": {weight: uint8}, "bits", "rest": the other tensors} of a calibrated network.
    ValueError without quantised weights."""
    found = quantised_weights(model)
    if not found:
        raise ValueError("the model has no quantised weights: nothing to pack")
    packed = {n: pack_codes(q.codes(m.weight).flatten(), q.bits, signed=True) for n, (m, q) in found.items()}
    rest = {n: t for n, t in model.state_dict().items() if n not in packed}
    return {"packed": packed, "bits": {n: q.bits for n, (_, q) in found.items()}, "rest": rest}


@torch.no_grad()
def unpack(model: nn.Module, file: Mapping[str, Any]) -> nn.Module:
    """`model` (of the architecture, any weights) with the weights of a packed file: step * code, whose codes are the same again.
    The network that was packed, bit for bit in evaluation.

    Raises ValueError for a file of another architecture or bit width."""
    found = quantised_weights(model)
    if found.keys() != file["packed"].keys():
        raise ValueError(
            f"the file packs {len(file['packed'])} weights, the model has {len(found)}: another architecture?"
        )
    for n, (_, q) in found.items():
        if q.bits != file["bits"][n]:
            raise ValueError(f"packed at another width: {n}: {file['bits'][n]} bit, the model has {q.bits}")
    state = dict(file["rest"])
    for n, (m, q) in found.items():
        codes = unpack_codes(file["packed"][n], m.weight.numel(), q.bits, signed=True).view(m.weight.shape)
        step = state[n.replace(".weight", ".weight_quantizer.step")].clamp(min=MIN_STEP)
        state[n] = codes * step.view(-1, *[1] * (m.weight.ndim - 1))
    model.load_state_dict(state)
    return model.eval()
