"""The weights of a quantised network at their bits: what its file holds, and the network from the file.

    torch.save({**pack(model, found), "about": about}, path)            found: {"layer.weight": (weight, its quantiser)}
    unpack(model, found, file)                                          the network that was packed, bit for bit

{"packed": {weight: uint8}, "bits": {weight: bits}, "rest": {the other tensors of the state}}. A weight of n values at b bits has
ceil(n b / 8) bytes, low bits first; steps, biases, norms and embeddings stay float32, a quantiser has two flags of a byte. It is
storage: CPUs have no arithmetic below 8 bits.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from common.quant.lsq import LSQQuantizer
from common.quant.pack import pack_codes, unpack_codes

Weights = Mapping[str, tuple[Tensor, LSQQuantizer]]


@torch.no_grad()
def pack(model: nn.Module, found: Weights) -> dict[str, Any]:
    """What to save of a calibrated network. ValueError without quantised weights."""
    if not found:
        raise ValueError(
            "the network has no quantised weights: nothing to pack. Real-valued weights are the checkpoint"
        )
    packed = {n: pack_codes(q.codes(w).flatten(), q.bits, signed=True) for n, (w, q) in found.items()}
    rest = {n: t for n, t in model.state_dict().items() if n not in packed}
    return {"packed": packed, "bits": {n: q.bits for n, (_, q) in found.items()}, "rest": rest}


@torch.no_grad()
def unpack(model: nn.Module, found: Weights, file: Mapping[str, Any]) -> nn.Module:
    """`model` (of the architecture, any weights) with the weights step * code, whose codes are the same again; evaluation mode.

    ValueError for a file of another architecture or bit width."""
    own = model.state_dict()
    fits = found.keys() == file["packed"].keys() and own.keys() - found.keys() == file["rest"].keys()
    if not fits or any(own[n].shape != t.shape for n, t in file["rest"].items()):
        raise ValueError(
            f"the file packs {len(file['packed'])} weights and holds {len(file['rest'])} other tensors, the model has "
            f"{len(found)} and {len(own) - len(found)}, or their shapes differ: another architecture"
        )
    if wrong := [n for n, (_, q) in found.items() if q.bits != file["bits"][n]]:
        name = wrong[0]
        raise ValueError(
            f"packed at another width: {name}: {file['bits'][name]} bit, the model has {found[name][1].bits}"
        )
    model.load_state_dict(dict(file["rest"]), strict=False)
    for name, (weight, q) in found.items():
        codes = unpack_codes(file["packed"][name], weight.numel(), q.bits, signed=True).view(weight.shape)
        weight.copy_(codes * q.effective_step().view(-1, *[1] * (weight.ndim - 1)))
    return model.eval()


def payload(file: Mapping[str, Any]) -> int:
    """Bytes of the tensors of a packed file; its container adds names and their places."""
    return sum(t.numel() * t.element_size() for part in ("packed", "rest") for t in file[part].values())
