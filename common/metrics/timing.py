"""Times that can be compared: interleaved rounds in one process, medians with quartiles, and what they were measured on."""

import copy
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common.runs import provenance

PAUSE = 0.02  # seconds; idle workers of onnxruntime and OpenMP give their core back within some milliseconds
BLOCK = 0.03  # seconds of calls in a row that make one time
MOST = 1000  # calls of a block


class Timing(NamedTuple):
    """Milliseconds of one call: the median of the rounds, the quartiles, and the number of rounds."""

    median: float
    low: float
    high: float
    rounds: int


def interleaved(
    calls: Mapping[str, Callable[[], object]], *, rounds: int = 20, warmup: int = 3, seconds: float = 30.0
) -> dict[str, Timing]:
    """Times every call once per round, in turn, so that a drift of the machine's speed meets all of them alike.

    A time is the mean of as many calls in a row as take `BLOCK` seconds, behind as many untimed ones: what a program sees that
    calls again and again. (A call of few milliseconds whose caches the others have emptied took up to twice as long.) Each call
    is warmed up first; ends after `rounds`, or when `seconds` are over and 3 rounds are done. With several threads the workers of
    the call before wait busily for more and take a core from the next one: a pause and an untimed call stand before it. A call
    that works on a GPU must wait for it by itself."""
    repeats = {}
    for name, call in calls.items():
        _in_a_row(call, warmup)
        repeats[name] = max(1, round(BLOCK / max(_in_a_row(call, 1), BLOCK / MOST)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    settle = torch.get_num_threads() > 1
    end = time.perf_counter() + seconds
    for k in range(rounds):
        if k >= 3 and time.perf_counter() > end:
            break
        for name, call in calls.items():
            if settle:
                time.sleep(PAUSE)
            if settle or repeats[name] > 1:
                _in_a_row(call, repeats[name])
            times[name].append(1000 * _in_a_row(call, repeats[name]) / repeats[name])
    return {name: _timing(values) for name, values in times.items()}


def _in_a_row(call: Callable[[], object], count: int) -> float:
    """Seconds of so many calls."""
    start = time.perf_counter()
    for _ in range(count):
        call()
    return time.perf_counter() - start


def _timing(values: list[float]) -> Timing:
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return Timing(median, low, high, len(values))


# of torch.compile. Nothing from its cache on disk: code that was compiled under a cap on the instructions is taken for weights
# that are frozen in the order of others, and crashes.
COMPILE = {"freezing": True, "force_disable_caches": True}


def compiled_calls(
    networks: Mapping[str, tuple[nn.Module, Tensor]], skipped: dict[str, str]
) -> dict[str, Callable[[], object]]:
    """{name: a call of the network compiled for its input}; what does not compile goes to `skipped`, with the reason."""
    torch._dynamo.reset()  # the number of threads is compiled in
    calls: dict[str, Callable[[], object]] = {}
    for name, (network, x) in networks.items():
        call = torch.compile(copy.deepcopy(network), dynamic=False, options=COMPILE)  # type: ignore[call-overload]
        try:
            with torch.no_grad():
                call(x)
            calls[name] = lambda call=call, x=x: call(x)
        except Exception as error:  # no compiler, or whatever it has to say
            skipped[name] = (str(error).splitlines() or [type(error).__name__])[0]
    return calls


class Bench:
    """The rows of bench.json: {name, ours, baseline, ratio, unit, threads, batch, isa, machine, quartiles, rounds}.

    ratio = baseline / ours, above 1 where ours is faster. Nothing is asserted."""

    def __init__(self, out: str | Path):
        self.out, self.rows = Path(out).expanduser(), []
        capped = os.environ.get("ONEDNN_MAX_CPU_ISA")
        self.about: dict[str, Any] = {
            "isa": torch.backends.cpu.get_cpu_capability() + (f", oneDNN capped at {capped}" if capped else ""),
            "machine": provenance()["machine"],
        }

    def add(
        self,
        name: str,
        ours: Timing | float,
        baseline: Timing | float,
        *,
        batch: int = 1,
        unit: str = "ms",
        **more: Any,
    ):
        """Adds and prints one row; plain numbers (bytes, counts) have no quartiles."""
        a, b = (x.median if isinstance(x, Timing) else float(x) for x in (ours, baseline))
        row = {"name": name, "ours": a, "baseline": b, "ratio": b / a, "unit": unit, "batch": batch}
        for key, value in (("ours_quartiles", ours), ("baseline_quartiles", baseline)):
            if isinstance(value, Timing):
                row |= {key: [value.low, value.high], "rounds": value.rounds}
        self.rows.append(row | {"threads": torch.get_num_threads()} | self.about | more)
        print(f"{name:64s} batch {batch:4d}  {_shown(ours)} {_shown(baseline)} {unit}  x {b / a:.2f}", flush=True)

    def write(self) -> list[dict[str, Any]]:
        """Writes `out` and returns the rows."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(self.rows, indent=1) + "\n")
        print(f"written to {self.out}")
        return self.rows


def _shown(value: Timing | float) -> str:
    if isinstance(value, Timing):
        return f"{value.median:9.3f} [{value.low:.3f}, {value.high:.3f}]"
    return f"{value:9.3f}"
