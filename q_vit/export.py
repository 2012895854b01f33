"""Pack the weights of a checkpoint to their bits, so that the file has the size that is claimed for it.

python export.py runs/default/both/seed0/last.ckpt packed.pt [--bits 4 for a released checkpoint]

`unpack` gives the network back, bit for bit in evaluation. Weights at b bits take b / 32 of their float size; steps, biases,
norms and embeddings stay float32. It is a storage format: there is no 2-bit arithmetic on CPUs."""

import argparse
import sys
from pathlib import Path

import torch
from torch import nn

from common import runs
from common.quant.lsq import LSQQuantizer
from common.quant.pack import pack_codes, unpack_codes
from q_vit.evaluate import load


def quantised_weights(model: nn.Module) -> dict[str, tuple[nn.Module, LSQQuantizer]]:
    """{name of the weight: (its layer, its quantiser)}."""
    layers = (
        (n, m) for n, m in model.named_modules() if isinstance(getattr(m, "weight_quantizer", None), LSQQuantizer)
    )
    return {f"{n}.weight": (m, m.weight_quantizer) for n, m in layers}


@torch.no_grad()
def pack(model: nn.Module) -> dict:
    """{"packed": {weight: uint8}, "bits", "rest": the other tensors} of a calibrated network.
    ValueError without quantised weights."""
    found = quantised_weights(model)
    if not found:
        raise ValueError("the model has no quantised weights: nothing to pack")
    packed = {n: pack_codes(q.codes(m.weight).flatten(), q.bits, signed=True) for n, (m, q) in found.items()}
    rest = {n: t for n, t in model.state_dict().items() if n not in packed}
    return {"packed": packed, "bits": {n: q.bits for n, (_, q) in found.items()}, "rest": rest}


@torch.no_grad()
def unpack(model: nn.Module, file: dict) -> nn.Module:
    """`model` (of the architecture, any weights) with the weights of a packed file: step * code, whose codes are the same again.

    Raises ValueError for a file of another architecture or bit width."""
    found = quantised_weights(model)
    if found.keys() != file["packed"].keys():
        raise ValueError(
            f"the file packs {len(file['packed'])} weights, the model has {len(found)}: another architecture?"
        )
    wrong = [
        f"{n}: {file['bits'][n]} bit, the model has {q.bits}"
        for n, (_, q) in found.items()
        if q.bits != file["bits"][n]
    ]
    if wrong:
        raise ValueError(f"packed at another width: {wrong[0]}")
    state = dict(file["rest"])
    for n, (m, q) in found.items():
        codes = unpack_codes(file["packed"][n], m.weight.numel(), q.bits, signed=True).view(m.weight.shape)
        step = state[n.replace(".weight", ".weight_quantizer.step")].clamp(min=1e-5)
        state[n] = codes * step.view(-1, *[1] * (m.weight.ndim - 1))
    model.load_state_dict(state)
    return model.eval()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("weights")
    parser.add_argument("target", type=Path)
    parser.add_argument("--bits", type=int)
    args = parser.parse_args(argv)
    model, _ = load(args.weights, bits=args.bits)
    torch.save(pack(model), args.target)
    size, before = args.target.stat().st_size, 4 * sum(p.numel() for p in model.parameters())
    unpack(model, runs.load_checkpoint(args.target))
    print(f"{args.target}: {size / 1e6:.3f} MB, float32 parameters {before / 1e6:.3f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
