"""Convolutions on bits: the compiled kernel, its float twin, and the network they came from, to the bit or to rounding."""

import copy
import ctypes
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import common
from common.quant import packed_conv
from common.quant.packed_conv import (
    FoldedSignConv2d,
    PackedConv2d,
    SignWeightConv2d,
    fold_norm_,
    fold_norms_,
    in_float_,
    vector_starts,
)

# in, out, groups, kernel, stride, padding, dilation, mode
GEOMETRIES = [
    (64, 64, 1, 3, 1, 1, 1, "zeros"), (128, 40, 1, 3, 2, 1, 1, "zeros"), (70, 12, 1, 1, 1, 0, 1, "zeros"),
    (3, 5, 1, 3, 1, 1, 1, "zeros"), (130, 33, 1, (3, 2), (2, 1), (2, 0), (1, 2), "zeros"), (6, 6, 6, 3, 1, 1, 1, "zeros"),
    (140, 20, 2, 3, 1, 2, 2, "zeros"), (20, 9, 1, 5, 1, 4, 2, "zeros"), (16, 16, 1, 4, 1, "same", 1, "zeros"),
    (9, 11, 1, 3, 1, "valid", 1, "zeros"), (12, 10, 1, 3, 1, 1, 1, "circular"), (12, 10, 1, 3, 2, 1, 1, "replicate"),
]  # fmt: skip


def layer(c_in, c_out, groups, kernel, stride, padding, dilation, mode, *, zero=1, seed=0):
    """(the parts: signs, convolution, scale, shift, norm, PReLU as functions of torch; the packed layer)."""
    torch.manual_seed(seed)
    conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, dilation, groups, padding_mode=mode)
    signs = torch.where(torch.rand_like(conv.weight) < 0.5, -1.0, 1.0)
    scale, shift = torch.rand(c_out) + 0.1, (torch.randn(c_in) * 0.3).round(decimals=1)
    norm = nn.BatchNorm2d(c_out).eval()
    for t in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(t)
    nn.init.uniform_(norm.running_var, 0.1, 1)
    slope, before, after = torch.rand(c_out) - 0.3, torch.randn(1, c_out, 1, 1), torch.randn(1, c_out, 1, 1)
    packed = PackedConv2d.of(signs, conv, scale=scale, shift=shift.view(1, -1, 1, 1), zero=zero)
    packed.absorb_norm(norm).absorb_prelu(slope, before, after)

    @torch.no_grad()
    def plain(x, skip=None):
        y = x + shift.view(1, -1, 1, 1)
        y = torch.where(y < 0, -1.0, 1.0) if zero == 1 else torch.where(y > 0, 1.0, -1.0)
        y = norm(conv._conv_forward(y, signs * scale.view(-1, 1, 1, 1), conv.bias))
        return F.prelu((y if skip is None else y + skip) + before, slope) + after

    return plain, packed, signs


@pytest.mark.parametrize("zero", [1, -1])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_layer_on_bits_is_the_plain_one_and_has_the_bits_of_its_twin(geometry, zero):
    """Inputs with one decimal, so that many lie on the threshold of the sign exactly; odd sizes, more than one image."""
    plain, packed, signs = layer(*geometry, zero=zero)
    assert torch.equal(packed.signs(), signs)
    x = torch.randn(3, geometry[0], 9, 13).round(decimals=1)
    for skip in (None, torch.randn(packed(x).shape)):
        expected = plain(x, skip)
        found = packed(x, skip)
        assert torch.equal(found, packed.twin()(x, skip)) and found.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(FoldedSignConv2d(packed)(x, skip), expected, rtol=1e-4, atol=1e-4)
        packed.backend = "torch"
        assert torch.equal(packed(x, skip), found)
        packed.backend = "auto"


def test_the_kernel_really_runs_where_numba_is():
    pytest.importorskip("numba", reason="extra `deploy` is not installed")
    _, packed, _ = layer(*GEOMETRIES[0])
    x = torch.randn(1, 64, 4, 4)
    packed(x)
    assert "twin" not in packed._tables and len(packed._tables) == 1
    packed.backend = "numba"
    with pytest.raises(ValueError, match="runs on the CPU, the input is on meta"):
        packed(x.to("meta"))


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("geometry", [GEOMETRIES[i] for i in (1, 4, 8, 10)], ids=str)
def test_for_torch_compile_a_layer_is_one_node_of_the_graph(geometry, backend):
    torch._dynamo.reset()
    _, packed, _ = layer(*geometry)
    packed.backend = backend
    compiled = torch.compile(packed, backend="aot_eager", fullgraph=True)
    for batch, height, width in ((3, 9, 13), (2, 9, 13), (2, 11, 12)):
        x = torch.randn(batch, geometry[0], height, width)
        for skip in (None, torch.randn(packed(x).shape)):
            with torch.no_grad():
                found = compiled(x, skip)
            assert torch.equal(found, packed(x, skip)) and found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_a_trace_knows_the_size_and_the_layout_of_the_output(geometry):
    _, packed, _ = layer(*geometry)
    x = torch.randn(3, geometry[0], 9, 13)
    with FakeTensorMode() as mode:
        traced = torch.ops.packed.conv2d(mode.from_tensor(x), None, packed._number)
    assert (traced.shape, traced.stride(), traced.dtype) == ((y := packed(x)).shape, y.stride(), y.dtype)


def test_a_compiled_network_holds_its_own_layers():
    _, packed, _ = layer(*GEOMETRIES[0])
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 64, 3), packed, nn.PReLU()).eval().to(memory_format=torch.channels_last)
    others = [copy.deepcopy(network), ForkingPickler.loads(ForkingPickler.dumps(network))]  # the way to another process
    for k, other in enumerate(others):
        other[1].scale = (k + 2) * other[1].scale
        other[1]._tables = {}
    x = torch.randn(2, 3, 12, 9).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = [n(x) for n in (network, *others)]
        torch._dynamo.reset()
        found = [torch.compile(n, fullgraph=True)(x) for n in (network, *others)]
    torch.testing.assert_close(found, expected)
    assert (expected[0] - expected[1]).abs().max() > 1


def test_zeros_nans_and_both_zeros_take_the_side_that_zero_says():
    conv = nn.Conv2d(10, 1, 1, bias=False)
    x = torch.tensor([0.0, -0.0, float("nan"), 1e-38, -1e-38, 2, -2, float("inf"), -float("inf"), 0]).view(1, 10, 1, 1)
    for zero, signs in ((1, [1, 1, 1, 1, -1, 1, -1, 1, -1, 1]), (-1, [-1, -1, -1, 1, -1, 1, -1, 1, -1, -1])):
        packed = PackedConv2d.of(torch.ones(1, 10, 1, 1), conv, zero=zero)
        assert packed(x).item() == packed.twin()(x).item() == sum(signs)
        every = PackedConv2d.of(torch.ones(10, 1, 1, 1), nn.Conv2d(10, 10, 1, groups=10, bias=False), zero=zero)
        assert every(x).flatten().tolist() == signs


def test_the_border_counts_no_product_that_is_not_there():
    conv = nn.Conv2d(5, 1, 3, padding=1, bias=False)
    for value in (1.0, -1.0):
        found = PackedConv2d.of(torch.full((1, 5, 3, 3), value), conv)(torch.ones(1, 5, 3, 4))[0, 0]
        taps = torch.tensor([[4, 6, 6, 4], [6, 9, 9, 6], [4, 6, 6, 4]])
        assert torch.equal(found, value * 5 * taps)


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("openmp", [True, False])
def test_threads_share_the_work_and_change_nothing(threads, openmp, monkeypatch):
    """OpenMP's threads, those of torch itself, or where torch has none a pool."""
    monkeypatch.setattr(packed_conv, "GRAIN", 1e-6)
    if not openmp:
        monkeypatch.setattr(packed_conv, "_team", lambda: None)
    _, packed, _ = layer(*GEOMETRIES[1])
    x = torch.randn(2, 128, 11, 7)
    torch.set_num_threads(1)  # the fixture `threads_as_before` sets it back
    expected = packed(x)
    torch.set_num_threads(threads)
    assert torch.equal(packed(x), expected)
    with ThreadPoolExecutor(4) as pool:  # a server that answers several requests at once
        assert all(torch.equal(y, expected) for y in pool.map(packed, [x] * 8))


FREED = """
import torch
from torch import nn
from common.quant import packed_conv
packed_conv.GRAIN = 1e-9
for outputs in (5, 40):
    conv = nn.Conv2d(70, outputs, 3, padding=1)
    packed = packed_conv.PackedConv2d.of(torch.where(torch.rand_like(conv.weight) < 0.5, -1.0, 1.0), conv)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        x = torch.randn(2, 70, 9, 7)
        for skip in (None, torch.randn(2, outputs, 9, 7)):
            assert torch.equal(packed(x, skip), packed.twin()(x, skip)), (outputs, threads, skip is not None)
"""


def test_nothing_is_read_from_memory_that_was_freed():
    """glibc fills what is freed with 3.3e6 (74 in every byte); other systems ignore the variable."""
    environment = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.perturb=74"}
    done = subprocess.run([sys.executable, "-c", FREED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Kernel:
    """Notes who took which part of a job, the way the compiled ones take them."""

    def __init__(self):
        self.threads, self.parts, self.lock = set(), [], threading.Lock()
        self.ctypes = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self.take)
        self.address = ctypes.cast(self.ctypes, ctypes.c_void_p).value

    def take(self, at):
        self.threads.add(threading.get_native_id())
        taken, parts, total = (ctypes.c_int64.from_address(at + 8 * i) for i in range(3))
        while True:
            with self.lock:
                part, taken.value = taken.value, taken.value + 1
            if part >= parts.value:
                return
            self.parts.append((total.value * part // parts.value, total.value * (part + 1) // parts.value))
            time.sleep(1e-2)


@pytest.mark.parametrize("openmp", [True, False])
def test_a_job_is_done_once_and_by_as_many_threads_as_it_is_worth(openmp, monkeypatch):
    if not openmp:
        monkeypatch.setattr(packed_conv, "_team", lambda: None)
    torch.set_num_threads(2)
    assert packed_conv._team() is None or openmp
    for microseconds, threads in ((1e-3, 1), (1e6, 2)):
        kernel = Kernel()
        packed_conv._run(kernel, 100, microseconds)
        assert len(kernel.threads) == threads and len(kernel.parts) == (1 if threads == 1 else 2 * packed_conv.PARTS)
        assert sorted(kernel.parts)[0][0] == 0 and sorted(kernel.parts)[-1][1] == 100
        assert all(a[1] == b[0] for a, b in pairwise(sorted(kernel.parts)))
    monkeypatch.setattr(packed_conv, "_PROCESS", -1)
    packed_conv._run(forked := Kernel(), 100, 1e6)
    assert len(forked.threads) == 1, "a forked process has no threads of OpenMP, and would wait for them"


@pytest.mark.parametrize("backend", packed_conv.BACKENDS)
def test_no_derivatives_are_kept(backend):
    _, packed, _ = layer(*GEOMETRIES[0])
    packed.backend = backend
    if backend == "numba":
        pytest.importorskip("numba", reason="extra `deploy` is not installed")
    x = torch.randn(1, 64, 5, 5, requires_grad=True)
    for image in (x, x.bfloat16()):
        assert not packed(image).requires_grad
        assert not packed(image, packed(image).requires_grad_()).requires_grad


def test_both_passes_over_an_image_are_worth_threads_when_it_is_large(monkeypatch):
    pytest.importorskip("numba", reason="extra `deploy` is not installed")
    worth: list[bool] = []
    monkeypatch.setattr(
        packed_conv, "_run", lambda kernel, total, microseconds, *_: worth.append(microseconds > packed_conv.GRAIN)
    )
    _, packed, _ = layer(*GEOMETRIES[0])
    packed(torch.randn(1, 64, 5, 5))
    assert worth.pop(0) is False  # a pass over 1,600 floats is over before another thread is awake
    worth.clear()
    packed(torch.randn(1, 64, 112, 112))
    assert worth == [True, True]


def test_a_layer_is_loaded_moved_copied_and_changed_without_a_stale_table():
    plain, packed, _ = layer(*GEOMETRIES[0])
    _, other, _ = layer(*GEOMETRIES[0], seed=1)
    x = torch.randn(1, 64, 5, 5)
    first, second = packed(x), other(x)
    assert torch.equal(copy.deepcopy(packed)(x), first)
    packed.load_state_dict(other.state_dict())
    assert torch.equal(packed(x), second)
    assert torch.equal(packed.to(memory_format=torch.channels_last)(x), second)  # its 4-D buffer is no image
    assert torch.equal(packed.half()(x), second) and packed.scale.dtype == torch.float32
    packed.absorb_prelu(torch.ones(64), after=torch.ones(64))
    assert not torch.equal(packed(x), second)
    assert packed(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(packed(x.bfloat16()), packed(x.bfloat16().float()).bfloat16())


def test_a_bit_per_weight_and_the_order_of_the_kernel():
    """Vector v, step k = (tap, word), lane i: word of the channels 64 word + bit of output 8 v + i."""
    _, packed, signs = layer(*GEOMETRIES[1])
    assert packed.words.shape == (1, 5, 9 * 2, 8)
    bits = (signs[13].permute(1, 2, 0).reshape(9, 2, 64) >= 0).long()
    words = [sum(int(b) << i for i, b in enumerate(row)) for row in bits.reshape(-1, 64)]
    assert [w % 2**64 for w in packed.words[0, 1, :, 5].tolist()] == words
    assert vector_starts(33)[-1].tolist() == list(range(25, 33)) and vector_starts(5).tolist() == [list(range(8))]


def test_what_has_no_bit_or_does_not_fit_is_named():
    conv = nn.Conv2d(4, 4, 3)
    for call, error in (
        (lambda: PackedConv2d.of(torch.zeros_like(conv.weight), conv), "144 weights are not"),
        (lambda: SignWeightConv2d.of(torch.zeros_like(conv.weight), conv, scale=torch.ones(4)), "144 weights are not"),
        (lambda: PackedConv2d(4, 4, 3, zero=0), "zero=0"),
        (lambda: PackedConv2d(4, 4, 3, backend="cuda"), "backend='cuda'"),
        (lambda: PackedConv2d(4, 6, 3, groups=4), "groups=4"),
        (lambda: PackedConv2d(4, 4, 3)(torch.ones(1, 3, 5, 5)), r"expected \(B, 4, H, W\)"),
        (lambda: PackedConv2d(4, 4, 3)(torch.ones(1, 4, 2, 5)), "smaller than the kernel"),
        (lambda: PackedConv2d(4, 4, 3)(torch.ones(1, 4, 5, 5), torch.ones(1, 4, 5, 5)), "skip"),
        (lambda: PackedConv2d(4, 4, 3).absorb_norm(nn.BatchNorm2d(4, track_running_stats=False)), "running statistics"),
    ):
        with pytest.raises(ValueError, match=error):
            call()


def test_norms_are_folded_and_the_signs_of_real_inputs_stored_as_bits():
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 8, 3, groups=2)
    signs = torch.where(torch.rand_like(conv.weight) < 0.5, -1.0, 1.0)
    norm = nn.BatchNorm2d(8).eval()
    for t in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(t)
    norm.weight.data[0] = 0  # a dead channel
    network = nn.Sequential(SignWeightConv2d.of(signs, conv, scale=torch.rand(8)), nn.Sequential(norm, nn.ReLU()))
    x = torch.randn(2, 6, 7, 7)
    expected = network(x)
    again = copy.deepcopy(network)
    fold_norms_(network), fold_norms_(again)
    assert isinstance(network[1][0], nn.Identity)
    torch.testing.assert_close(network(x), expected, rtol=1e-5, atol=1e-5)
    state = network.state_dict()
    assert (
        state["0.signs"].dtype == torch.uint8
        and len(state["0.signs"]) == signs.numel() // 8
        and "0.weight" not in state
    )
    nn.init.zeros_(again[0].weight)
    again.load_state_dict(state)
    assert torch.equal(again(x), network(x))
    plain = nn.Conv2d(6, 8, 3)
    expected = norm(plain(x))
    fold_norm_(plain, norm)
    torch.testing.assert_close(plain(x), expected, rtol=1e-5, atol=1e-5)


def test_numba_is_imported_only_where_it_is_used_and_its_absence_is_explained_or_bridged():
    code = """
import sys
import torch
from common.quant.packed_conv import PackedConv2d
assert "numba" not in sys.modules
sys.modules["numba"] = None
layer = PackedConv2d(8, 8, 3, padding=1)
assert layer(torch.ones(1, 8, 4, 4))[0, 0, 0, 0] == -32  # bits of 0 are -1
layer.backend = "numba"
try:
    layer(torch.ones(1, 8, 4, 4))
except ImportError as e:
    assert "[deploy]" in str(e), e
else:
    raise SystemExit("no error")
"""
    root = Path(common.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, timeout=120)


def test_a_network_is_put_back_into_floats():
    _, packed, _ = layer(*GEOMETRIES[0])
    network = nn.Sequential(packed, nn.ReLU())
    x = torch.randn(1, 64, 5, 5)
    assert torch.equal(in_float_(copy.deepcopy(network), exact=True)(x), network(x))
    folded = in_float_(copy.deepcopy(network))
    torch.testing.assert_close(folded(x), network(x), rtol=1e-4, atol=1e-4)
    assert not [m for m in folded.modules() if isinstance(m, PackedConv2d)]
    torch.testing.assert_close(folded.bfloat16()(x.bfloat16()).float(), network(x), rtol=0.1, atol=0.2)
