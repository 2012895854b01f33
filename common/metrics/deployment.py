"""How fast a network with layers on bits is, beside every float form of it that a user of the same machine has."""

import copy
import csv
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.metrics.timing import Bench, Timing, compiled_calls, interleaved
from common.onnx_export import export_onnx
from common.quant.packed_conv import PackedConv2d, in_float_

Call = Callable[[], object]


class Forms:
    """The calls that are timed: the network on bits, its real-valued rest in float32 or bfloat16, eager or compiled, and its
    float forms (norms folded).

    skipped: {form: why} of those that this machine does not have."""

    def __init__(self, packed: nn.Module, image: Tensor, *, compiled: bool = True):
        last: Any = {"memory_format": torch.channels_last}
        self.packed = packed.eval().to(**last)
        self.answers = _Answers(self.packed)
        self.plain = in_float_(copy.deepcopy(packed)).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        self.last = copy.deepcopy(self.plain).to(**last)
        self.half = copy.deepcopy(self.last).bfloat16()
        self.packed_half = copy.deepcopy(self.packed).bfloat16()
        self.compiled, self.skipped = compiled, {}
        self.onnx: bytes | None = None
        if cap := os.environ.get("ONEDNN_MAX_CPU_ISA"):
            self.skipped["onnxruntime fp32"] = (
                f"no variable caps it at {cap}, it would keep all instructions of the machine"
            )
            return
        try:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "model.onnx"
                export_onnx(copy.deepcopy(self.plain), image, file, about={}, tolerance=float("inf"))
                self.onnx = file.read_bytes()
        except ImportError as error:
            self.skipped["onnxruntime fp32"] = str(error)

    def calls(self, images: Tensor, *, threads: int) -> dict[str, Call]:
        """{form: call} for images (B, C, H, W) with as many threads, "packed" first."""
        last = images.contiguous(memory_format=torch.channels_last)
        half = last.bfloat16()
        calls: dict[str, Call] = {
            "packed": lambda: self.packed(last), "packed, rest bf16": lambda: self.packed_half(half),
            "fp32 eager": lambda: self.plain(images),
            "fp32 channels_last": lambda: self.last(last), "bf16 channels_last": lambda: self.half(half),
        }  # fmt: skip
        if self.compiled:
            networks: dict[str, tuple[nn.Module, Tensor]] = {
                "packed compiled": (self.packed, last), "packed, rest bf16 compiled": (self.packed_half, half),
                "fp32 compiled": (self.last, last), "bf16 compiled": (self.half, half),
            }  # fmt: skip
            calls |= compiled_calls(networks, self.skipped)
        if self.onnx is not None:
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            session = onnxruntime.InferenceSession(self.onnx, options, providers=["CPUExecutionProvider"])
            feed = {"images": images.numpy()}
            calls["onnxruntime fp32"] = lambda: session.run(None, feed)
        return calls

    def share_of_rest(self, call: Call, *, rounds: int) -> float:
        """Which part of the time of a packed form its packed layers do not take, measured with layers that give a copy of what
        they gave before. The limit of any faster kernel."""
        self.answers.replay(call)
        times = interleaved({"whole": call, "rest": lambda: self.answers.replay(call)}, rounds=rounds, seconds=10)
        return times["rest"].median / times["whole"].median

    def layers(self, x: Tensor) -> list[tuple[str, Any, Tensor]]:
        """(name, inputs, output) of every packed layer in a pass of x."""
        found: list[tuple[str, Any, Tensor]] = []

        def note(name: str) -> Any:
            return lambda _, inputs, out: found.append((name, inputs, out))

        packed = [(n, m) for n, m in self.packed.named_modules() if isinstance(m, PackedConv2d)]
        hooks = [m.register_forward_hook(note(n)) for n, m in packed]
        self.packed(x)
        for hook in hooks:
            hook.remove()
        return found


class _Answers:
    """What the packed layers of a network and of its copies gave, compiled or not."""

    def __init__(self, network: nn.Module):
        self.replaying = False
        for layer in network.modules():
            if isinstance(layer, PackedConv2d):
                layer.compute = self._kept(layer.compute)  # type: ignore[method-assign]

    def _kept(self, compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
        answers: dict[Any, Tensor] = {}

        def call(x: Tensor, skip: Tensor | None = None) -> Tensor:
            if not self.replaying:
                return compute(x, skip)
            if (key := (x.shape, x.dtype)) not in answers:
                answers[key] = compute(x, skip)
            return answers[key].clone()  # the graph may write into it

        return call

    def replay(self, call: Call) -> None:
        self.replaying = True
        try:
            call()
        finally:
            self.replaying = False


def layer_calls(layer: PackedConv2d, inputs: tuple[Tensor, ...]) -> dict[str, Call]:
    """The layer with all that it absorbed, and its bare convolution in float from signs that are there already: channels last,
    and in oneDNN's own order of weights and images."""
    image = inputs[0]
    x = torch.where(image < 0, -1.0, 1.0).contiguous(memory_format=torch.channels_last)
    weight = layer.signs().contiguous(memory_format=torch.channels_last)
    top, bottom, left, right = layer.padding
    x = F.pad(x, (0, right - left, 0, bottom - top)) if (top, left) != (bottom, right) else x
    geometry = layer.stride, (top, left), layer.dilation, layer.groups
    calls: dict[str, Call] = {
        "packed": lambda: layer(*inputs), "fp32 channels_last": lambda: F.conv2d(x, weight, None, *geometry),
    }  # fmt: skip
    if torch.backends.mkldnn.is_available():
        from torch.utils import mkldnn

        conv: Any = nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, *geometry, bias=False)
        conv.weight.data.copy_(weight)
        own, image = mkldnn.to_mkldnn(conv.eval()), x.contiguous().to_mkldnn()
        calls["fp32 prepacked"] = lambda: own(image)
    return calls


def time_network(
    table: Bench, name: str, forms: Forms, image: Tensor, *, batches: Sequence[int], threads: Sequence[int], rounds: int
) -> None:  # fmt: skip
    """Adds a row per number of threads and batch, and a row per shape of a packed layer at batch 1; prints the limit.

    A row of the network has `forms` (milliseconds: median and quartiles of every form), `baseline_is` (the fastest float one),
    `rest` (milliseconds of what is real-valued) and `limit` (the ratio with packed layers that take no time). ValueError where a
    packed layer is not its float twin, to the bit."""
    before = torch.get_num_threads()
    try:
        for count in threads:
            torch.set_num_threads(count)
            for batch in batches:
                images = torch.randn(batch, *image.shape[1:], generator=torch.Generator().manual_seed(0))
                calls = forms.calls(images, threads=count)
                times = interleaved(calls, rounds=rounds)
                ours = min((k for k in times if k.startswith("packed")), key=lambda k: times[k].median)
                rest = times[ours].median * forms.share_of_rest(calls[ours], rounds=rounds)
                _add_network(table, name, times, ours, rest, batch=batch, skipped=forms.skipped)
            _add_layers(table, name, forms, image, rounds=rounds)
    finally:
        torch.set_num_threads(before)


def _add_network(
    table: Bench, name: str, times: dict[str, Timing], ours: str, rest: float, *, batch: int, skipped: dict[str, str]
) -> None:
    best = min((k for k in times if not k.startswith("packed")), key=lambda k: times[k].median)
    limit = times[best].median / rest
    table.add(
        f"{name}, {ours} against {best}, {torch.get_num_threads()} threads", times[ours], times[best], batch=batch,
        kind="network", network=name, ours_is=ours, baseline_is=best, rest=rest, limit=limit, skipped=dict(skipped),
        forms={k: [t.median, t.low, t.high] for k, t in times.items()},
    )  # fmt: skip
    others = ", ".join(f"{k} {t.median:.2f}" for k, t in times.items())
    whole = times[ours].median
    print(
        f"    {others}\n    real-valued rest {rest:.2f} ms of the {whole:.2f} of '{ours}': with binary layers that take no time "
        f"x {limit:.2f} over {best}; it is {whole / rest:.2f} times away from that"
    )


def _add_layers(table: Bench, name: str, forms: Forms, image: Tensor, *, rounds: int) -> None:
    seen = set()
    for own, inputs, out in forms.layers(image.contiguous(memory_format=torch.channels_last)):
        layer: Any = forms.packed.get_submodule(own)
        if not torch.equal(layer.twin()(*inputs), out):
            raise ValueError(f"{name}: the bits of {own} do not give the result of its float twin")
        shape = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, tuple(out.shape[2:]))
        if shape in seen:
            continue
        seen.add(shape)
        times = interleaved(layer_calls(layer, inputs), rounds=2 * rounds, seconds=5)
        best = min((k for k in times if k != "packed"), key=lambda k: times[k].median)
        side = "x".join(map(str, layer.kernel_size))
        table.add(
            f"layer {side}, {shape[0]} to {shape[1]} at {out.shape[2]}x{out.shape[3]}, {torch.get_num_threads()} threads",
            times["packed"], times[best], kind="layer", network=name, baseline_is=best,
        )  # fmt: skip


def add_sizes(table: Bench, name: str, packed: nn.Module) -> None:
    """Bytes of the state of the packed network and of the same in float32 (a row) and bfloat16 (in the row)."""
    ours = sum(v.numel() * v.element_size() for v in packed.state_dict().values())
    whole = in_float_(copy.deepcopy(packed))
    numbers = sum(p.numel() for p in whole.parameters()) + sum(b.numel() for b in whole.buffers())
    table.add(f"{name}, bytes", ours, 4 * numbers, unit="bytes", kind="bytes", network=name, bf16=2 * numbers)


def add_accuracy(table: Bench, name: str, cells: Path, *, arm: str, metric: str, data: str) -> None:
    """Adds what the recorded evidence (a cells.csv) says of an arm with bits, where there is a record: mean, and in the row the
    standard deviation and the number of seeds. Nothing is compared: bits give the outputs of the trained network."""
    if not cells.is_file():
        return
    with cells.open(newline="") as file:
        values = [float(r[metric]) for r in csv.DictReader(file) if r["arm"] == arm and r.get(metric)]
    if len(values) > 1:
        mean = statistics.mean(values)
        table.add(
            f"{metric} on {data}", mean, mean, unit="%", kind="accuracy", network=name, data=data, arm=arm,
            std=statistics.stdev(values), seeds=len(values),
        )  # fmt: skip


def usable_threads(asked: int | None) -> list[int]:
    """The numbers of threads that are measured: the one asked for, or 1 and 2 as far as there are processors."""
    return [asked] if asked else [n for n in (1, 2) if n <= (os.cpu_count() or 1)]
