"""How fast a network on 8-bit integers is, beside every float form that a user of the same machine has; and the table of it."""

import copy
import logging
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.metrics import tables
from common.metrics.timing import Bench, compiled_calls, interleaved

Call = Callable[[], object]
SECONDS = 120.0  # of a measurement at most, once each form has run 3 times


def float_calls(
    network: nn.Module, images: Tensor, *, last: bool, compiled: bool, skipped: dict[str, str]
) -> dict[str, Call]:  # fmt: skip
    """{form: call} of a float network in torch, in evaluation. last: channels_last as well, which only convolutions gain by.

    skipped: what this machine does not have goes there, with the reason."""
    half, rows = copy.deepcopy(network).bfloat16(), images.bfloat16()
    calls: dict[str, Call] = {"fp32 eager": lambda: network(images), "bf16 eager": lambda: half(rows)}
    form: Any = {"memory_format": torch.channels_last}
    if last:
        networks, inputs = (
            [copy.deepcopy(n).to(**form) for n in (network, half)],
            [x.to(**form) for x in (images, rows)],
        )
        calls |= {
            "fp32 channels_last": lambda: networks[0](inputs[0]),
            "bf16 channels_last": lambda: networks[1](inputs[1]),
        }
    if compiled:
        calls |= compiled_calls({"fp32 compiled": (network, images), "bf16 compiled": (half, rows)}, skipped)
    return calls


def onnx_call(file: Path, images: Tensor, *, threads: int) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    feed = {"images": images.numpy()}
    return lambda: session.run(None, feed)


def dynamic_int8(file: Path, out: Path) -> None:
    """What a user gets without training: onnxruntime's own 8-bit form of a float ONNX file, activations measured as it runs."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.disable(logging.WARNING)  # a line for every product that it leaves in float
    try:
        quantize_dynamic(file, out, per_channel=True, weight_type=QuantType.QInt8)
    finally:
        logging.disable(logging.NOTSET)


PEAK = """
import sys, numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
for _ in range(3):
    session.run(None, {"images": numpy.zeros([int(n) for n in sys.argv[2:]], "float32")})
print(*(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def peak_memory(file: Path, images: Tensor) -> int:
    """Bytes that a process without torch holds at its peak while it loads an ONNX file and runs it on such images (Linux)."""
    # not getrusage: its peak is inherited from the process that starts this one
    command = [sys.executable, "-c", PEAK, str(file), *map(str, images.shape)]
    return 1024 * int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def time_integer(
    table: Bench, name: str, network: nn.Module, files: Mapping[str, Path], images: Tensor, *, rounds: int, last: bool = False,
    compiled: bool = True,
) -> None:  # fmt: skip
    """Adds a row (kind "integer") with `forms`: {form: median and quartiles in milliseconds} of images (B, C, H, W) with the
    threads of torch; ours is the fastest of `files` whose name ends in "bit", the baseline the fastest float form.

    files: {"onnxruntime fp32": ..., "onnxruntime int8 dynamic": ..., "8 bit": ...}, ONNX files with one input, `images`."""
    threads, skipped = torch.get_num_threads(), {}
    calls = float_calls(network, images, last=last, compiled=compiled, skipped=skipped)
    calls |= {form: onnx_call(file, images, threads=threads) for form, file in files.items()}
    times = interleaved(calls, rounds=rounds, seconds=SECONDS)
    ours, best = (
        min((form for form in times if choose(form)), key=lambda form: times[form].median)
        for choose in (lambda form: form.endswith(" bit"), lambda form: "fp32" in form or "bf16" in form)
    )
    table.add(
        f"{name}, {ours} on integers against {best}, {threads} threads", times[ours], times[best], batch=len(images),
        kind="integer", network=name, ours_is=ours, baseline_is=best, skipped=skipped,
        forms={form: [t.median, t.low, t.high] for form, t in times.items()},
    )  # fmt: skip
    print("    " + ", ".join(f"{form} {t.median:.2f}" for form, t in times.items()))


def time_layer(table: Bench, name: str, integer: Path, real: Path, images: Tensor, *, rounds: int) -> None:
    """Adds a row (kind "integer layer"): one layer on integers, quantising its input included, against the same in float32, both
    in onnxruntime with the threads of torch."""
    threads = torch.get_num_threads()
    calls = {form: onnx_call(file, images, threads=threads) for form, file in (("integer", integer), ("fp32", real))}
    times = interleaved(calls, rounds=rounds, seconds=SECONDS)
    table.add(f"{name}, {threads} threads", times["integer"], times["fp32"], kind="integer layer", batch=len(images))


# --------------------------------------------------------------------------------------------------------- the table
def render(rows: Iterable[Mapping[str, Any]]) -> str:
    """The recorded rows as Markdown: a line per way to run the network, and what to read from it."""
    rows = list(rows)
    kinds = {
        kind: [r for r in rows if r.get("kind") == kind] for kind in ("integer", "bytes", "memory", "accuracy", "ops")
    }
    settings = sorted(kinds["integer"], key=lambda r: (r["threads"], r["batch"]))
    chosen = [settings[0], settings[-1]] if len(settings) > 1 else settings
    size, memory = ({r["form"]: r["ours"] for r in kinds[k]} for k in ("bytes", "memory"))
    accuracy = {r["network"]: f"{r['ours']:.1f}" for r in kinds["accuracy"]}
    data, table = sorted({r["data"] for r in kinds["accuracy"]}), []
    for label, forms in _ways(settings[0]["forms"]):
        cells = []
        for row in chosen:
            best = min((f for f in forms if f in row["forms"]), key=lambda f: row["forms"][f][0])
            median, low, high = row["forms"][best]
            cells.append(f"{median:.1f} [{low:.1f}, {high:.1f}]" + (f", {_which(best)}" if len(forms) > 1 else ""))
        own = forms[-1]
        disk, peak = (f"{found[own] / 1e6:.1f}" if own in found else "" for found in (size, memory))
        disk += f" ({size[f'{own} packed'] / 1e6:.1f} packed)" if f"{own} packed" in size else ""
        table.append([label, *([accuracy.get(own, "")] if data else []), disk, peak, *cells])
    header = [
        f"{settings[0]['network']} in", *([f"top-1, {', '.join(data)}"] if data else []), "MB on disk", "MB at the peak",
        *(f"ms: batch {r['batch']}, {r['threads']} thread{'s' * (r['threads'] > 1)}" for r in chosen),
    ]  # fmt: skip
    return tables.markdown(header, table) + "\n\n" + " ".join(_notes(settings, kinds))


def _ways(forms: Sequence[str]) -> list[tuple[str, list[str]]]:
    """(label, forms of which the fastest is shown; sizes are those of the last) per line."""
    found = [
        ("float32", [f for f in forms if "fp32" in f and "onnxruntime" not in f] + ["onnxruntime fp32"]),
        ("bfloat16", [f for f in forms if f.startswith("bf16")]),
        ("int8 after training (onnxruntime, dynamic)", ["onnxruntime int8 dynamic"]),
        *((f"{f}, quantisation-aware training, on 8-bit integers", [f]) for f in forms if f.endswith(" bit")),
    ]
    return [(label, names) for label, names in found if any(n in forms for n in names)]


def _which(form: str) -> str:
    return " ".join(word for word in form.split() if word not in ("fp32", "bf16"))


def _span(ratios: Sequence[float]) -> str:
    low, high = (f"{bound(ratios):.2f}" for bound in (min, max))
    return f"x {low}" + f" to {high}" * (high != low)


def _notes(settings: list[Mapping[str, Any]], kinds: Mapping[str, list[Mapping[str, Any]]]) -> list[str]:
    ratios = [r["ratio"] for r in settings]
    over = [r["forms"]["onnxruntime fp32"][0] / r["ours"] for r in settings if "onnxruntime fp32" in r["forms"]]
    notes = [f"Over the fastest float form, bfloat16 included: {_span(ratios)}."]
    notes += [f"Over onnxruntime in float32: {_span(over)}."] if over else []
    if kinds["ops"]:
        theory = ", ".join(f"{r['form']} x {r['ratio']:.2f}" for r in kinds["ops"])
        notes.append(f"In theory (OPs, another thing): {theory}.")
    if found := kinds["accuracy"]:
        arms = ", ".join(f"`{r['arm']}` {r['ours']:.1f} +/- {r['std']:.1f}" for r in found)
        notes.append(f"Top-1 is the recorded evidence of a smaller network ({found[0]['seeds']} seeds): {arms} %.")
    machine = settings[0]["machine"].get("cpu", "unknown")
    return [*notes, f"Medians and quartiles of one run, random weights; {machine}, {settings[0]['isa']}."]
