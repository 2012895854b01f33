"""Parameters, multiply-accumulates (MACs), operations (OPs) under named conventions, and memory.

1 MAC counts 1, never 2. Norms, activations, biases, pooling and softmax are not counted; attention products are.
Always name the convention beside a number: at 4 bits they differ by a factor of 15.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common.runs import Run


@dataclass(frozen=True)
class LayerOps:
    """What one module itself (not its children) multiplies: MACs, and the bits of the two operands (32 = real-valued).
    For attention products the operands are two activations; give the wider as `act_bits`."""

    name: str
    macs: int
    weight_bits: int = 32
    act_bits: int = 32

    def __post_init__(self) -> None:
        if self.macs < 0 or not 1 <= self.weight_bits <= 32 or not 1 <= self.act_bits <= 32:
            raise ValueError(f"{self}: MACs must be >= 0 and bits in 1..32")


def count_parameters(model: nn.Module) -> dict[str, int]:
    """{"total", "trainable"}: number of parameters, shared ones once; buffers are not parameters."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return {"total": sum(n for n, _ in sizes), "trainable": sum(n for n, train in sizes if train)}


def count_macs(model: nn.Module, *inputs: Any) -> dict[str, int]:
    """MACs that each module itself performs in `model(*inputs)`, children excluded; `sum(...values())` is the total.

    Names as in `model.named_modules()`; modules without a matrix product are absent. The counts are for the batch
    given. They come from torch's dispatcher (FlopCounterMode), so functional convolutions, matmul, einsum and fused
    attention count, whatever module class calls them. One evaluation-mode forward pass without gradients; on the meta
    device nothing is computed. Raises ValueError when a module is called from outside its parent."""
    training = {module: module.training for module in model.modules()}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    counter = FlopCounterMode(display=False)
    try:
        model.eval()
        # Fused encoder layers and attention kernels would hide their products from the counter.
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            model(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, mode in training.items():
            module.training = mode
    counts = {name: sum(ops.values()) // 2 for name, ops in counter.get_flop_counts().items() if name != "Global"}
    own = dict(counts)
    for name, macs in counts.items():
        parent = name.rpartition(".")[0]
        while parent and parent not in counts:  # a ModuleList is never called itself
            parent = parent.rpartition(".")[0]
        if parent:
            own[parent] -= macs
    stolen = [name for name, macs in own.items() if macs < 0]
    if stolen or sum(own.values()) != counter.get_total_flops() // 2:
        raise ValueError(
            f"cannot attribute MACs: a child of {stolen} is called from another module; call it from its parent"
        )
    return {name.partition(".")[2]: macs for name, macs in own.items() if macs}


def layer_ops(
    model: nn.Module, *inputs: Any, bits: Mapping[str, tuple[int, int]] | Callable[[str], tuple[int, int]] | None = None
) -> list[LayerOps]:
    """`count_macs` as records with operand widths. bits: {module name: (weight_bits, act_bits)} or a function of the
    name; modules not in the mapping are real-valued. Raises ValueError for a mapped name that has no MACs."""
    macs = count_macs(model, *inputs)
    if bits is None:
        bits = {}
    if not callable(bits):
        unknown = sorted(set(bits) - set(macs))
        if unknown:
            raise ValueError(f"bits given for {unknown}, which have no MACs; modules with MACs are {sorted(macs)}")
        table = bits
        bits = lambda name: table.get(name, (32, 32))  # noqa: E731
    return [LayerOps(name, n, *bits(name)) for name, n in macs.items()]


def ops_bnn64(layers: Iterable[LayerOps], *, weight_only: bool = False) -> float:
    """OPs = BOPs/64 + FLOPs: MACs whose two operands are 1-bit over 64, every other MAC in full (Bi-Real Net).
    weight_only=True also divides 1-bit weights with real activations by 64, as some papers do."""
    return sum(x.macs / 64 if x.weight_bits == 1 and (weight_only or x.act_bits == 1) else x.macs for x in layers)


def ops_lane(layers: Iterable[LayerOps]) -> float:
    """b/32 per MAC, b the wider operand: how many values share a 32-bit SIMD lane (8 bit = 1/4)."""
    return sum(x.macs * max(x.weight_bits, x.act_bits) / 32 for x in layers)


def ops_halving(layers: Iterable[LayerOps]) -> float:
    """1/32, 1/16, 1/8, 1/4 per {2, 3, 4, 8}-bit MAC, b the wider operand; real-valued MACs count 1.
    Differs from `ops_lane` at 2 and 3 bits. Raises ValueError for another width, for which it has no factor."""
    factors = {2: 1 / 32, 3: 1 / 16, 4: 1 / 8, 8: 1 / 4, 32: 1.0}
    total = 0.0
    for x in layers:
        b = max(x.weight_bits, x.act_bits)
        if b not in factors:
            raise ValueError(f"{x}: no factor for {b} bits; this convention knows {sorted(factors)}")
        total += x.macs * factors[b]
    return total


def ops_bops64(layers: Iterable[LayerOps]) -> float:
    """b_w b_a / 64 per MAC (bit-serial), at most 1: a MAC is never dearer than a real-valued one."""
    return sum(x.macs * min(1.0, x.weight_bits * x.act_bits / 64) for x in layers)


def ops_bops1024(layers: Iterable[LayerOps]) -> float:
    """b_w b_a / 1024 per MAC: bit operations relative to 32 x 32."""
    return sum(x.macs * x.weight_bits * x.act_bits / 1024 for x in layers)


CONVENTIONS: dict[str, Callable[[Iterable[LayerOps]], float]] = {
    "bnn64": ops_bnn64,
    "lane": ops_lane,
    "halving": ops_halving,
    "bops64": ops_bops64,
    "bops1024": ops_bops1024,
}


def count_ops(layers: Iterable[LayerOps], convention: str) -> float:
    """OPs under the convention of that name, see CONVENTIONS. Raises ValueError for another name."""
    if convention not in CONVENTIONS:
        raise ValueError(f"convention {convention!r}; use one of {sorted(CONVENTIONS)}")
    return CONVENTIONS[convention](layers)


def parameter_bits(model: nn.Module, bits: Mapping[str, int]) -> dict[int, int]:
    """{width in bits: number of parameters}. bits: {parameter name: width}; all others are 32 bits wide.
    Raises ValueError for a name that is no parameter."""
    parameters = dict(model.named_parameters())
    unknown = sorted(set(bits) - set(parameters))
    if unknown:
        raise ValueError(f"bits given for {unknown}, which are not parameters; e.g. {sorted(parameters)[:5]} are")
    counts: dict[int, int] = {}
    for name, p in parameters.items():
        width = bits.get(name, 32)
        counts[width] = counts.get(width, 0) + p.numel()
    return counts


def memory_mbit(counts: Mapping[int, int]) -> float:
    """Memory in Mbit = 1e6 bit of {width in bits: number of parameters}; divide by 8 for MB = 1e6 bytes."""
    return sum(width * n for width, n in counts.items()) / 1e6


def record_counts(cfg: Any, fabric: Any, out: Path, count: Callable[[], Mapping[str, float]]) -> None:
    """The body of counts.py: prints the exact numbers of `count` and keeps them as the finished run `out`."""
    if (run := Run.open(out, cfg, fabric)) is None:
        return
    with run:
        found = count()
        run.finish(found)
    for name, value in found.items():
        print(f"{name:36s} {value:>20,.0f}" if float(value).is_integer() else f"{name:36s} {value:>20,.6g}")
