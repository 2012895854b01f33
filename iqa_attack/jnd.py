"""The just-noticeable difference: the map of Chou and Li (1995), a simulated observer with it, and other observers.

An observer answers `detect(x, x0, names)` -> (times "different", trials), both (B,). A candidate is below the JND where
"different" is answered in at most a quarter of the trials.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from common.data.batches import stream
from common.data.files import read_table
from iqa_attack.photographs.images import luma

DETECTED = 0.25  # "same" in at least 75 % of the trials is below the JND
BACKGROUND = ((1, 1, 1, 1, 1), (1, 2, 2, 2, 1), (1, 2, 0, 2, 1), (1, 2, 2, 2, 1), (1, 1, 1, 1, 1))
# Directional high-pass kernels of zero mean; the other two are the first transposed and the second mirrored.
GRADIENTS = (
    ((0, 0, 0, 0, 0), (1, 3, 8, 3, 1), (0, 0, 0, 0, 0), (-1, -3, -8, -3, -1), (0, 0, 0, 0, 0)),
    ((0, 0, 1, 0, 0), (0, 8, 3, 0, 0), (1, 3, 0, -3, -1), (0, 0, -3, -8, 0), (0, 0, -1, 0, 0)),
)


def jnd_map(x: Tensor) -> Tensor:
    """(B, 3, H, W) in 0..1 -> (B, 1, H, W): gray levels that are just noticeable at each pixel, at least 3.

    f1 = mg (0.0001 bg + 0.115) + (0.5 - 0.01 bg), f2 = 17 (1 - sqrt(bg/127)) + 3 or 3/128 (bg - 127) + 3; the larger.
    bg: mean of the surroundings, mg: largest directional gradient; borders replicated."""
    grey = F.pad(luma(x), (2, 2, 2, 2), mode="replicate")
    first, second = (torch.tensor(g, dtype=x.dtype, device=x.device) for g in GRADIENTS)
    kernels = torch.stack([first, first.T, second, second.flip(1)])[:, None] / 16
    mg = F.conv2d(grey, kernels).abs().amax(1, keepdim=True)
    bg = F.conv2d(grey, torch.tensor(BACKGROUND, dtype=x.dtype, device=x.device)[None, None] / 32)
    f1 = mg * (0.0001 * bg + 0.115) + (0.5 - 0.01 * bg)
    dark = 17 * (1 - (bg.clamp(min=0) / 127).sqrt()) + 3
    f2 = torch.where(bg <= 127, dark, 3 / 128 * (bg - 127) + 3)
    return torch.maximum(f1, f2)


def visibility(x: Tensor, x0: Tensor) -> Tensor:
    """v (B,): 4-norm mean over pixels of the largest channel change, in units of the JND."""
    change = (x - x0).abs().amax(1, keepdim=True) * 255 / jnd_map(x0)
    return change.pow(4).mean((1, 2, 3)).pow(0.25)


def probability_different(v: Tensor) -> Tensor:
    """1 - 2^(-v^3.5): half the answers are "different" at v = 1."""
    return 1 - torch.exp2(-v.pow(3.5))


class SimulatedObserver:
    """Observers who follow `probability_different`. subjects null: the expected answer itself, without chance (the
    default offline; its threshold is v = 0.778); a number: so many subjects with sensitivities exp(0.1 n), one yes/no
    answer each."""

    def __init__(self, *, subjects: int | None = None, spread: float = 0.1, seed: int = 0):
        if subjects is not None and subjects < 1:
            raise ValueError(f"subjects={subjects}, allowed: null or a number >= 1")
        self.subjects, self.spread, self.seed = subjects, spread, seed

    def detect(self, x: Tensor, x0: Tensor, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        v = visibility(x, x0).double().cpu()
        if self.subjects is None:
            return probability_different(v), torch.ones(len(v), dtype=torch.float64)
        answers = []
        for name, vi in zip(names, v, strict=True):
            g = torch.Generator().manual_seed(stream(self.seed, *name.encode()))
            seen = vi * torch.exp(self.spread * torch.randn(self.subjects, generator=g, dtype=torch.float64))
            chance = torch.rand(self.subjects, generator=g, dtype=torch.float64)
            answers.append((chance < probability_different(seen)).double().sum())
        return torch.stack(answers), torch.full((len(v),), float(self.subjects), dtype=torch.float64)


class ThresholdObserver:
    """Sees a change of more than `levels` gray levels anywhere, and nothing else."""

    def __init__(self, *, levels: float):
        self.levels = levels

    def detect(self, x: Tensor, x0: Tensor, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        largest = (x - x0).abs().flatten(1).amax(1).cpu() * 255
        return (largest > self.levels + 1e-3).double(), torch.ones(len(x), dtype=torch.float64)


ANSWER_COLUMNS = ("nr", "fr", "image", "candidate", "subject", "order", "answer", "seconds")


def read_answers(path: Path) -> list[tuple[int, dict[str, str]]]:
    """(line, {column: cell}) of a file of answers. ValueError naming the bad line."""
    rows, expected = read_table(path), f"expected {', '.join(ANSWER_COLUMNS)}, answer same or different"
    if rows and set(rows[0][1]) != set(ANSWER_COLUMNS):
        raise ValueError(f"{path}, line {rows[0][0]}: {expected}, got {', '.join(rows[0][1])}")
    found = []
    for line, cells in rows[1:]:
        if len(cells) != len(ANSWER_COLUMNS):
            raise ValueError(f"{path}, line {line}: {len(cells)} cells; {expected}")
        row = dict(zip(rows[0][1], cells, strict=True))
        if row["answer"] not in ("same", "different"):
            raise ValueError(f"{path}, line {line}: answer {row['answer']!r}; {expected}")
        found.append((line, row))
    return found


class CsvObserver:
    """Answers of people from a file written by collect.py: columns ANSWER_COLUMNS, answer "same" or "different".

    A candidate is asked for as "<nr>/<fr>/<image>/<candidate>". Raises FileNotFoundError, or ValueError naming the
    bad line or a candidate without answers."""

    def __init__(self, *, file: str | Path):
        path = Path(file).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"no answers {path}: collect them first with collect.py")
        self.different, self.trials, self.path = Counter(), Counter(), path
        for _, row in read_answers(path):
            key = "/".join(row[c] for c in ANSWER_COLUMNS[:4])
            self.trials[key] += 1
            self.different[key] += row["answer"] == "different"

    def detect(self, x: Tensor, x0: Tensor, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        if missing := [n for n in names if not self.trials[n]]:
            raise ValueError(
                f"{self.path} has no answer for {len(missing)} of {len(names)} candidates, e.g. {missing[0]}"
            )
        counts = [[c[n] for n in names] for c in (self.different, self.trials)]
        return tuple(torch.tensor(c, dtype=torch.float64) for c in counts)  # type: ignore[return-value]


OBSERVERS = {"simulated": SimulatedObserver, "threshold": ThresholdObserver, "csv": CsvObserver}


def build_observer(options: Mapping, *, seed: int):
    """The observer options["kind"] with its own options options[kind]. ValueError for an unknown one."""
    kind = options["kind"]
    if kind not in OBSERVERS:
        raise ValueError(f"observer.kind={kind!r}, allowed: {', '.join(OBSERVERS)}")
    more = {"seed": seed} if kind == "simulated" else {}
    return OBSERVERS[kind](**(options.get(kind) or {}), **more)


def below_jnd(observer, x: Tensor, x0: Tensor, names: Sequence[str]) -> Tensor:
    """(B,) bool: judged the same in at least three quarters of the trials."""
    different, trials = observer.detect(x, x0, names)
    return different <= DETECTED * trials + 1e-12


def select(change: Tensor, below: Tensor) -> Tensor:
    """Index (S,) of the counterexample: below the JND, with the largest |change| (K, S); -1 where no candidate is
    below."""
    masked = torch.where(below, change.abs(), torch.full_like(change, -1.0))
    best = masked.argmax(0)
    return torch.where(below.any(0), best, torch.full_like(best, -1))


def straddle(strengths: Tensor, below: Tensor, *, visible_end: str) -> Tensor:
    """Next strengths (S,) of a bisection around the JND, in logs: between the most visible strength that is still
    below it and the next one that is not. strengths (K, S) > 0; visible_end: at which end of the strengths the
    changes are the most visible.

    Where all are below, or none is, the range is widened by a factor of ten at the proper end."""
    if visible_end not in ("low", "high"):
        raise ValueError(f"visible_end={visible_end!r}, allowed: low, high")
    sign = 1.0 if visible_end == "high" else -1.0
    log = sign * strengths.log()  # ascending = more visible
    inf = torch.full_like(log, torch.inf)
    good = torch.where(below, log, -inf).amax(0)
    bad = torch.where(~below & (log > good), log, inf).amin(0)
    step = torch.log(torch.tensor(10.0)).to(log)
    middle = torch.where(good.isinf(), bad - step, torch.where(bad.isinf(), good + step, (good + bad) / 2))
    return (sign * middle).exp()
