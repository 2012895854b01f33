"""A binary convolution that runs on bits: signs of the input packed into words, exclusive or, population count, and what follows.

    PackedConv2d.of(signs, conv, scale=..., shift=...).absorb_norm(norm).absorb_prelu(slope, before, after)
    y = packed(x, skip)          # prelu(scale o conv(sign(x + shift), signs) + offset + skip) + after, one pass over the memory

On a CPU with numba (extra `deploy`) the kernels of `common.quant.xnor_kernels` run, on any other device the same arithmetic in
torch: integers where the products are summed, then the same roundings in the same order, so that both give the same bits. For
inference: no derivatives.
"""

import ctypes
import os
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import count, pairwise
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.quant.pack import _popcount, pack_signs, packed_bytes, unpack_signs

BACKENDS = ("auto", "numba", "torch")
LANES = 8  # outputs side by side in a vector of the kernel
PIXELS = 4  # and pixels in its block
GRAIN = 20.0  # microseconds of work that are worth other threads
PARTS = 4  # of a job per thread: who is late does fewer
_PROCESS = os.getpid()  # a fork of it has none of its threads
_LAYERS: "WeakValueDictionary[int, PackedConv2d]" = WeakValueDictionary()  # a compiled graph names them by number
_NUMBERS = count()


class PackedConv2d(nn.Module):
    """prelu(scale_o conv(sign(x + shift_c), signs) + offset_o + skip) + after_o with one bit per weight.

    x (B, in, H, W) float, skip like the output or None -> (B, out, H', W'), channels last. Zero padding comes after the sign:
    a third value, whose taps count nothing. zero: the value of sign(0), 1 or -1.

    State: `words` (groups, vectors, taps x words, 8) int64, the bits in the order of the kernel (vector v of a group holds its
    outputs from min(8 v, outputs - 8) on); `shift` (in,), `scale`, `offset`, `slope`, `after` (out,) float32.
    backend: "auto" (numba on a CPU where it is installed, else torch), "numba" or "torch". For torch.compile a layer is one node
    of the graph."""

    words: Tensor
    shift: Tensor
    scale: Tensor
    offset: Tensor
    slope: Tensor
    after: Tensor

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Any, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
        groups: int = 1, padding_mode: str = "zeros", *, zero: int = 1, backend: str = "auto",
    ):  # fmt: skip
        super().__init__()
        if zero not in (1, -1) or backend not in BACKENDS:
            raise ValueError(
                f"zero={zero}, backend={backend!r}, allowed: 1 or -1 (one bit has no third value), {', '.join(BACKENDS)}"
            )
        if in_channels % groups or out_channels % groups:
            raise ValueError(f"groups={groups} must divide in_channels={in_channels} and out_channels={out_channels}")
        self.in_channels, self.out_channels, self.groups, self.padding_mode = (
            in_channels,
            out_channels,
            groups,
            padding_mode,
        )
        self.kernel_size, self.stride, self.dilation = _pair(kernel_size), _pair(stride), _pair(dilation)
        self.padding = _sides(padding, self.kernel_size, self.dilation)
        self.zero, self.backend = zero, backend
        self.inputs, self.outputs = in_channels // groups, out_channels // groups  # of a group
        taps = self.kernel_size[0] * self.kernel_size[1]
        shape = (groups, -(-self.outputs // LANES), taps * -(-self.inputs // 64), LANES)
        self.register_buffer("words", torch.zeros(shape, dtype=torch.int64))
        for name, size, value in (
            ("shift", in_channels, 0.0), ("scale", out_channels, 1.0), ("offset", out_channels, 0.0),
            ("slope", out_channels, 1.0), ("after", out_channels, 0.0),
        ):  # fmt: skip
            self.register_buffer(name, torch.full((size,), value))
        self._tables: dict[Any, Any] = {}
        self._enlist()

    @classmethod
    @torch.no_grad()
    def of(
        cls, signs: Tensor, conv: nn.Conv2d, *, scale: Tensor | None = None, shift: Tensor | None = None, zero: int = 1
    ) -> "PackedConv2d":
        """The packed form of a convolution with the geometry and bias of `conv` and the weights scale_o signs.

        signs: (out, in / groups, kh, kw) of +-1, where several convolutions of one input stand side by side more outputs than
        `conv` has; scale: (out,); shift: (in,), added before the sign. ValueError for another value than +-1."""
        if not bool((signs.abs() == 1).all()):
            raise ValueError(
                f"{int((signs.abs() != 1).sum())} weights are not +-1: with sign(0) = 0 a weight has no bit, use sign(0) = 1"
            )
        packed = cls(
            conv.in_channels, len(signs), conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups,
            conv.padding_mode, zero=zero,
        )  # fmt: skip
        words = _words(signs.detach()).view(packed.groups, packed.outputs, -1)
        words = F.pad(words, (0, 0, 0, max(0, LANES - packed.outputs)))
        packed.words.copy_(words[:, vector_starts(packed.outputs)].permute(0, 1, 3, 2))
        for buffer, value in ((packed.scale, scale), (packed.offset, conv.bias), (packed.shift, shift)):
            if value is not None:
                buffer.copy_(value.detach().flatten())
        return packed.to(signs.device)

    @torch.no_grad()
    def absorb_norm(self, *norms: nn.BatchNorm2d) -> "PackedConv2d":
        """Takes over the batch norm behind the convolution, in evaluation (several: of the convolutions side by side)."""
        self._tables = {}
        alpha, beta = (torch.cat(t) for t in zip(*map(affine_of, norms), strict=True))
        self.offset.copy_(alpha * self.offset.double() + beta)
        self.scale.copy_(alpha * self.scale.double())
        return self

    @torch.no_grad()
    def absorb_prelu(
        self, slope: Tensor, before: Tensor | None = None, after: Tensor | None = None
    ) -> "PackedConv2d":  # fmt: skip
        """Takes over prelu(y + before) + after, behind the norm and the addition of `skip`. Each (out,) or (1, out, 1, 1)."""
        self._tables = {}
        self.slope.copy_(slope.expand(self.out_channels) if slope.numel() == 1 else slope.flatten())
        if before is not None:
            self.offset.add_(before.flatten())
        if after is not None:
            self.after.copy_(after.flatten())
        return self

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if torch.compiler.is_compiling():
            return torch.ops.packed.conv2d(x, skip, self._number)
        return self.compute(x, skip)

    def compute(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """What `forward` returns, outside of a graph."""
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"input {tuple(x.shape)}: expected (B, {self.in_channels}, H, W)")
        (top, bottom, left, right), padding = self.padding, self.padding
        image = x
        if self.padding_mode != "zeros":
            image, padding = F.pad(x, (left, right, top, bottom), mode=self.padding_mode), (0,) * 4
        plan = _plan(
            tuple(image.shape[2:]), self.kernel_size, self.stride, self.dilation, padding, self.groups, -(-self.inputs // 64)
        )  # fmt: skip
        shape = (x.shape[0], self.out_channels, *plan.size)
        if skip is not None and skip.shape != shape:
            raise ValueError(f"skip {tuple(skip.shape)}: expected the shape of the output {shape}")
        kernels = _kernels(self.backend, x)
        if kernels is None:
            if "twin" not in self._tables:
                self._tables["twin"] = self.twin()
            with torch.no_grad():
                return self._tables["twin"](x, skip)
        y = self._in_numba(kernels, image, skip, plan, shape)
        return y if y.dtype == x.dtype else y.to(x.dtype)

    def signs(self) -> Tensor:
        """The weights as floats of +-1, (out, in / groups, kh, kw)."""
        starts = vector_starts(self.outputs)
        words = torch.zeros(
            self.groups, max(self.outputs, LANES), self.words.shape[2], dtype=torch.int64, device=self.words.device
        )
        words[:, starts] = self.words.transpose(2, 3)
        per_tap = words[:, : self.outputs].reshape(self.out_channels, *self.kernel_size, -1)
        bits = per_tap.contiguous().view(torch.uint8)[..., : packed_bytes(self.inputs, 1)]
        return unpack_signs(bits, self.inputs).permute(0, 3, 1, 2)

    def twin(self) -> "SignConv2d":
        """The same layer in floats, which gives the same bits."""
        return SignConv2d(self)

    def _in_numba(self, kernels: Any, x: Tensor, skip: Tensor | None, plan: "_Plan", shape: tuple[int, ...]) -> Tensor:
        batch, _, height, width = x.shape
        top, bottom, left, right = plan.padding
        rows, columns, words = height + top + bottom, width + left + right, -(-self.inputs // 64)
        fill = torch.zeros if any(plan.padding) else torch.empty
        bits = fill(batch, rows, columns, self.groups, words, dtype=torch.int64)
        out = torch.empty(shape, memory_format=torch.channels_last)
        if not out.numel():
            return out
        pixels, beside = _rows(x), None if skip is None else _rows(skip)
        _run(
            kernels.pack, batch * height, x.numel() / 1e4, pixels.data_ptr(), self.shift.data_ptr(), self.zero == -1,
            self.inputs, top, left, height, width, bits.data_ptr(), rows, columns, self.groups, words,
        )  # fmt: skip
        _, fields = self._kernel_tables(plan)
        cost = 1e-4 + self.inputs * self.kernel_size[0] * self.kernel_size[1] / 1e6
        _run(
            kernels.convolve, batch * -(-len(plan.rows) // PIXELS), out.numel() * cost, bits.data_ptr(),
            rows * columns * self.groups * words, words, *fields, 0 if beside is None else beside.data_ptr(), out.data_ptr(),
            self.outputs,
        )  # fmt: skip
        return out

    def _kernel_tables(self, plan: "_Plan") -> tuple[tuple[np.ndarray, ...], tuple[int, ...]]:
        """Arrays in the order of the kernel (where the windows lie, weights, border corrections, four vectors per output), and
        the fields of the job from `rows` to `shift`; kept until the layer is loaded, moved or absorbs something."""
        if (found := self._tables.get(plan.key)) is None:
            starts = vector_starts(self.outputs)
            per_output = []
            for t in (self.scale, self.offset, self.slope, self.after):
                padded = F.pad(t.view(self.groups, self.outputs), (0, max(0, LANES - self.outputs)))
                per_output.append(np.ascontiguousarray(padded.numpy()[:, starts].reshape(self.groups, -1)))
            words = self.words.contiguous().numpy()  # .to(memory_format=...) reorders 4-D buffers
            taps = _popcount(self.words).reshape(*words.shape[:2], plan.valid.shape[1], -1, LANES).sum(3).numpy()
            # a tap in the padding has the bits 0, as if its signs were -1: what it added to the differing bits is taken back
            corrections = [
                self.inputs * valid.sum() + 2 * np.einsum("gvtl,t->gvl", taps, ~valid) for valid in plan.valid
            ]
            table = np.ascontiguousarray(np.stack(corrections).astype(np.int32))
            arrays = (plan.rows, plan.classes, plan.offsets, words, table, *per_output)
            at = [array.ctypes.data for array in arrays]
            fields = (*at[:2], len(plan.rows), at[2], words.shape[2], at[3], *words.shape[:2], *at[4:])
            self._tables[plan.key] = found = arrays, fields
        return found

    def _load_from_state_dict(self, *args: Any) -> None:
        self._tables = {}
        super()._load_from_state_dict(*args)

    def _apply(self, fn: Callable, recurse: bool = True) -> "PackedConv2d":
        exact = {name: getattr(self, name) for name in ("shift", "scale", "offset", "slope", "after")}
        super()._apply(fn, recurse)
        for name, value in exact.items():  # .half() of a network moves its packed layers and rounds nothing
            setattr(self, name, value.to(getattr(self, name).device))
        self._tables = {}
        return self

    def _enlist(self) -> None:
        self._number = next(_NUMBERS)
        _LAYERS[self._number] = self

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        self._enlist()

    def __deepcopy__(self, memo: dict) -> "PackedConv2d":
        copy = self.__new__(type(self))
        memo[id(self)] = copy
        copy.__dict__.update({k: v for k, v in self.__dict__.items() if k not in ("_tables", "_buffers")})
        copy._tables, copy._buffers = {}, {k: v.clone() for k, v in self._buffers.items()}  # type: ignore[union-attr]
        copy._enlist()
        return copy

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, zero={self.zero}"
        )


torch.library.define(
    "packed::conv2d", "(Tensor x, Tensor? skip, int layer) -> Tensor", tags=torch.Tag.needs_fixed_stride_order
)


@torch.library.impl("packed::conv2d", "CompositeExplicitAutograd")
def _node(x: Tensor, skip: Tensor | None, layer: int) -> Tensor:
    y = _LAYERS[layer].compute(x, skip)
    return y.contiguous(memory_format=torch.channels_last)


@torch.library.register_fake("packed::conv2d")
def _node_in_a_trace(x: Tensor, skip: Tensor | None, layer: int) -> Tensor:
    conv = _LAYERS[layer]
    sides = zip(
        x.shape[2:], (conv.padding[:2], conv.padding[2:]), conv.kernel_size, conv.dilation, conv.stride, strict=True
    )
    size = [(n + sum(around) - d * (k - 1) - 1) // s + 1 for n, around, k, d, s in sides]
    return x.new_empty(len(x), conv.out_channels, *size).contiguous(memory_format=torch.channels_last)


class SignConv2d(nn.Module):
    """The float twin of a `PackedConv2d`: a convolution of +-1 by +-1, and the same roundings behind it."""

    weight: Tensor
    shift: Tensor
    scale: Tensor
    offset: Tensor
    slope: Tensor
    after: Tensor

    def __init__(self, packed: PackedConv2d):
        super().__init__()
        self.register_buffer("weight", packed.signs().contiguous(memory_format=torch.channels_last))
        for name in ("shift", "scale", "offset", "slope", "after"):
            self.register_buffer(name, getattr(packed, name).detach().clone().view(1, -1, 1, 1))
        self.geometry: Any = packed.stride, (0, 0), packed.dilation, packed.groups
        self.padding, self.padding_mode, self.zero = packed.padding, packed.padding_mode, packed.zero

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        top, bottom, left, right = self.padding
        y = x.float() + self.shift
        y = torch.where(y < 0, -1.0, 1.0) if self.zero == 1 else torch.where(y > 0, 1.0, -1.0)
        y = F.pad(y, (left, right, top, bottom), mode="constant" if self.padding_mode == "zeros" else self.padding_mode)
        z = F.conv2d(y, self.weight, None, *self.geometry)
        y = z.round() * self.scale + self.offset  # a transformed convolution (Winograd) leaves a fraction behind
        y = y if skip is None else y + skip.float()
        return (torch.where(y > 0, y, y * self.slope) + self.after).to(x.dtype)


class FoldedSignConv2d(nn.Module):
    """The layer as ordinary operations, the way a float network runs best: sign, convolution with scale and norm in its weight
    and bias, addition, PReLU. Equal to rounding, in any floating-point type; what is exported and what bits are timed against."""

    shift: Tensor
    after: Tensor

    def __init__(self, packed: PackedConv2d):
        super().__init__()
        conv: Any = nn.Conv2d(
            packed.in_channels, packed.out_channels, packed.kernel_size, packed.stride, 0, packed.dilation, packed.groups
        )  # fmt: skip
        top, bottom, left, right = packed.padding
        self.around: list[int] = [left, right, top, bottom]
        self.mode = "constant" if packed.padding_mode == "zeros" else packed.padding_mode
        if self.mode == "constant" and (top, left) == (bottom, right):
            conv.padding, self.around = (top, left), []
        with torch.no_grad():
            conv.weight.copy_(packed.signs() * packed.scale.view(-1, 1, 1, 1))
            conv.bias.copy_(packed.offset)
        self.conv, self.zero = conv.to(packed.words.device).requires_grad_(False), packed.zero
        self.register_buffer("shift", packed.shift.clone().view(1, -1, 1, 1))
        identity = bool((packed.slope == 1).all()) and not bool(packed.after.any())
        self.slope = None if identity else nn.Parameter(packed.slope.clone(), requires_grad=False)
        self.register_buffer("after", packed.after.clone().view(1, -1, 1, 1))

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        y, one = x + self.shift, torch.ones((), dtype=x.dtype, device=x.device)
        y = torch.where(y < 0, -one, one) if self.zero == 1 else torch.where(y > 0, one, -one)
        y = self.conv(F.pad(y, self.around, mode=self.mode) if self.around else y)
        y = y if skip is None else y + skip
        return y if self.slope is None else F.prelu(y, self.slope) + self.after


def in_float_(network: nn.Module, *, exact: bool = False) -> nn.Module:
    """Replaces every `PackedConv2d` by floats, in place: `FoldedSignConv2d`, or with `exact` its twin with the same bits."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, PackedConv2d):
                setattr(parent, name, child.twin() if exact else FoldedSignConv2d(child))
    return network


class SignWeightConv2d(nn.Conv2d):
    """A convolution of real-valued inputs with the weights scale_o signs: floats when it runs, one bit per weight in its state
    (`signs`, packed along the flattened weight, and `scale`)."""

    @classmethod
    @torch.no_grad()
    def of(cls, signs: Tensor, conv: nn.Conv2d, *, scale: Tensor) -> "SignWeightConv2d":
        """signs: (out, in / groups, kh, kw) of +-1; scale: (out,); geometry and bias of `conv`. ValueError for other signs."""
        if not bool((signs.abs() == 1).all()):
            raise ValueError(f"{int((signs.abs() != 1).sum())} weights are not +-1 and have no bit")
        geometry: Any = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups
        new = cls(
            conv.in_channels, conv.out_channels, *geometry, bias=conv.bias is not None, padding_mode=conv.padding_mode
        )
        new.weight.requires_grad_(False).copy_(signs * scale.view(-1, 1, 1, 1))
        if conv.bias is not None and new.bias is not None:
            new.bias.requires_grad_(False).copy_(conv.bias)
        return new.to(signs.device).eval()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = destination.pop(f"{prefix}weight").detach()
        destination[f"{prefix}signs"] = pack_signs(weight.flatten())
        destination[f"{prefix}scale"] = weight.flatten(1).abs().amax(1)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if (signs := state_dict.pop(f"{prefix}signs", None)) is not None:
            scale = state_dict.pop(f"{prefix}scale")
            weight = unpack_signs(signs, self.weight.numel()).view_as(self.weight) * scale.view(-1, 1, 1, 1)
            state_dict[f"{prefix}weight"] = weight
        super()._load_from_state_dict(state_dict, prefix, *args)


def pays(conv: nn.Conv2d) -> bool:
    """Whether bits are faster than floats: not for depth-wise convolutions, where every channel would fill a word of its own."""
    return conv.groups == 1 or conv.in_channels // conv.groups >= 16


def affine_of(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """(alpha, beta), each (C,) float64, with norm(z) = alpha z + beta in evaluation. ValueError without running statistics."""
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("a norm without running statistics is no fixed affine map: it cannot be folded")
    alpha = (norm.running_var.double() + norm.eps).rsqrt()
    alpha = alpha if norm.weight is None else alpha * norm.weight.double()
    beta = -norm.running_mean.double() * alpha
    return alpha.detach(), (beta if norm.bias is None else beta + norm.bias.double()).detach()


@torch.no_grad()
def fold_norm_(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """Folds the norm behind a real-valued convolution (or a SignWeightConv2d) into its weight and bias."""
    alpha, beta = affine_of(norm)
    beta = beta if conv.bias is None else alpha * conv.bias.double() + beta
    conv.weight.copy_(conv.weight.double() * alpha.view(-1, 1, 1, 1))
    conv.bias = nn.Parameter(beta.to(conv.weight.dtype), requires_grad=False)


def chain(sequence: nn.Sequential) -> list[tuple[nn.Module, str, nn.Module]]:
    """(owner, name, module) in the order in which a sequence runs them, sequences inside it unrolled."""
    links: list[tuple[nn.Module, str, nn.Module]] = []
    for name, child in sequence.named_children():
        links += chain(child) if isinstance(child, nn.Sequential) else [(sequence, name, child)]
    return links


def fold_norms_(network: nn.Module) -> None:
    """`fold_norm_` for every ordinary convolution with a batch norm right behind it in an nn.Sequential; the norm becomes
    nn.Identity."""
    for sequence in [m for m in network.modules() if isinstance(m, nn.Sequential)]:
        for (_, _, conv), (owner, name, norm) in pairwise(chain(sequence)):
            if type(conv) in (nn.Conv2d, SignWeightConv2d) and type(norm) is nn.BatchNorm2d:
                fold_norm_(conv, norm)  # type: ignore[arg-type]
                setattr(owner, name, nn.Identity())


def vector_starts(outputs: int) -> np.ndarray:
    """(vectors, 8) indices of a group's outputs: the last vector begins 8 before the end, over the one before it, and nothing
    is written beyond a row. Fewer than 8 outputs are filled up."""
    vectors = -(-outputs // LANES)
    return np.minimum(np.arange(vectors) * LANES, max(outputs - LANES, 0))[:, None] + np.arange(LANES)


class _Plan(NamedTuple):
    """Where the windows of an image lie; see `xnor_kernels.convolve`. valid: a row of taps per class of border."""

    key: Any
    size: tuple[int, int]
    rows: np.ndarray
    classes: np.ndarray
    offsets: np.ndarray
    valid: np.ndarray
    padding: tuple[int, int, int, int]


@lru_cache(maxsize=256)
def _plan(
    image: tuple[int, int], kernel: tuple, stride: tuple, dilation: tuple, padding: tuple, groups: int, words: int
) -> _Plan:
    starts, valid, size, where = [], [], [], []
    for axis, (before, behind) in enumerate((padding[:2], padding[2:])):
        reach = dilation[axis] * (kernel[axis] - 1)
        count = (image[axis] + before + behind - reach - 1) // stride[axis] + 1
        if count < 1:
            raise ValueError(f"input {image[0]}x{image[1]} is smaller than the kernel {kernel[0]}x{kernel[1]}")
        start = np.arange(count) * stride[axis]
        taps = start[:, None] - before + np.arange(kernel[axis]) * dilation[axis]
        kinds, kind = np.unique((taps >= 0) & (taps < image[axis]), axis=0, return_inverse=True)
        starts.append(start)
        valid.append(kinds)
        size.append(count)
        where.append(kind.reshape(-1))
    width = image[1] + padding[2] + padding[3]
    at = [np.arange(kernel[axis]) * dilation[axis] for axis in (0, 1)]
    rows = (starts[0][:, None] * width + starts[1]) * groups * words
    offsets = (at[0][:, None, None] * width + at[1][:, None]) * groups * words + np.arange(words)
    classes = where[0][:, None] * len(valid[1]) + where[1]
    both = (valid[0][:, None, :, None] & valid[1][None, :, None, :]).reshape(len(valid[0]) * len(valid[1]), -1)
    return _Plan(
        (image, padding), (size[0], size[1]), rows.reshape(-1).astype(np.int64), classes.reshape(-1).astype(np.int32),
        offsets.reshape(-1).astype(np.int64), both, padding,
    )  # fmt: skip


def _kernels(backend: str, x: Tensor) -> Any:
    """The compiled kernels, or None where torch is to do it: on another device, or without numba."""
    if backend == "torch" or (backend == "auto" and not x.is_cpu):
        return None
    if isinstance(kernels := _compiled(), ImportError):
        if backend == "auto":
            return None
        raise ImportError('backend="numba" needs numba: pip install "vision-reproductions[deploy]"') from kernels
    if not x.is_cpu:
        raise ValueError(f'backend="numba" runs on the CPU, the input is on {x.device}')
    return kernels


@lru_cache(maxsize=1)
def _compiled() -> Any:
    """`xnor_kernels`, or why it cannot be imported."""
    try:
        from common.quant import xnor_kernels
    except ImportError as error:
        return error
    return xnor_kernels


def _rows(x: Tensor) -> Tensor:
    """x (B, C, H, W) as float32 whose memory is (B H W, C): x itself where it is that already, channels last."""
    own = x.dtype == torch.float32 and x.is_contiguous(memory_format=torch.channels_last)
    return x if own else x.float().contiguous(memory_format=torch.channels_last)


def _words(signs: Tensor) -> Tensor:
    """Signs (out, in, kh, kw) -> int64 (out, kh, kw, words), bit i of a word being channel 64 word + i."""
    bits = pack_signs(signs.permute(0, 2, 3, 1))
    return F.pad(bits, (0, -bits.shape[-1] % 8)).contiguous().view(torch.int64)


def _run(kernel: Any, total: int, microseconds: float, *fields: int) -> None:
    """A kernel of `xnor_kernels` on a job of `total` rows or blocks, in as many threads as torch has where that is worth it."""
    threads = torch.get_num_threads() if microseconds > GRAIN and os.getpid() == _PROCESS else 1
    job = array("q", (0, 1 if threads == 1 else min(total, PARTS * threads), total, *fields))
    at, _ = job.buffer_info()
    if threads == 1:
        kernel.ctypes(at)
    elif (team := _team()) is not None:
        team(kernel.address, at, threads, 0)
    else:
        others = [_pool(threads - 1).submit(kernel.ctypes, at) for _ in range(threads - 1)]
        kernel.ctypes(at)
        for other in others:
            other.result()


@lru_cache(maxsize=1)
def _team() -> Any:
    """OpenMP's `GOMP_parallel` of the library that torch runs on; None where torch has another.

    Its threads go on spinning for milliseconds after every operation of torch: those of a second pool would have to share the
    cores with them."""
    try:
        parallel = ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libtorch_cpu.so")).GOMP_parallel
    except (OSError, AttributeError):
        return None
    parallel.argtypes, parallel.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return parallel


@lru_cache(maxsize=4)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="packed-conv")


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _sides(padding: Any, kernel: tuple[int, int], dilation: tuple[int, int]) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of nn.Conv2d's padding; "same" puts the odd one behind."""
    if padding == "same":
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2
    vertical, horizontal = (0, 0) if padding == "valid" else _pair(padding)
    return vertical, vertical, horizontal, horizontal
