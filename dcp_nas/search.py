"""Search a genotype for 1-bit networks: one arm of Parent-Child search, DARTS, or CP-NAS. Writes genotype.json and two pictures.

python search.py                                            digits, DCP-NAS with the Gauss-Newton form, under a minute
python search.py method=direct                              another arm
python search.py experiment=search_cifar10 data.root=/datasets budget_minutes=300
torchrun --nproc_per_node=4 search.py experiment=search_cifar10 data.root=/datasets
python search.py experiment=search_folder data.root=/my/images          train/<class>/, val/<class>/

Interrupted, it goes on where its last checkpoint was. budget_minutes ends it early with the genotype found so far; with a larger
one, or none, it goes on from there.
"""

import itertools
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from omegaconf import DictConfig, OmegaConf

from common import runs
from common.data.batches import Plan, stream
from common.loop import Progress, once, preflight
from common.scripts import script
from dcp_nas.analysis.draw import draw_cells, draw_search
from dcp_nas.child_parent import ChildParentSearch
from dcp_nas.counts import count
from dcp_nas.cp_nas import CPNAS
from dcp_nas.data import SIDES, Data, build_data, check_data, check_shares, split_for_search
from dcp_nas.network import Network
from dcp_nas.operations import Bits
from dcp_nas.ranks import over_ranks
from dcp_nas.search_space import NOISE, Genotype
from dcp_nas.supernet import Supernet

ALGORITHMS = ("child_parent", "darts", "cp_nas")
NETWORKS: dict[str, dict[str, Any]] = {
    "real": {"weights": "real", "activations": "real"},
    "binary": {"weights": "beta", "activations": "binary"},
}
OF_A_CHILD = (
    "lam",
    "mu",
    "hessian",
    "distance",
    "chunks",
    "tangent",
    "recon_reduction",
    "inherit",
    "reduction",
    "product",
)


def build(
    cfg: DictConfig, *, classes: int, channels: int, steps: int, device: torch.device
) -> ChildParentSearch | CPNAS:
    """The algorithm of a configuration with its supernets on `device`. ValueError or TypeError names a wrong value or key."""
    method: dict[str, Any] = OmegaConf.to_container(cfg.method)  # type: ignore[assignment]
    algorithm, network = method.pop("algorithm"), method.pop("network")
    if algorithm not in ALGORITHMS or network not in NETWORKS:
        raise ValueError(
            f"method.algorithm={algorithm!r}, method.network={network!r}, allowed: {', '.join(ALGORITHMS)}; {', '.join(NETWORKS)}"
        )
    if method["hessian"] in ("fisher_empirical", "ggn_diag") and cfg.search.batch_size % method["chunks"]:
        raise ValueError(f"method.chunks={method['chunks']} must divide search.batch_size={cfg.search.batch_size}")
    torch.manual_seed(stream(cfg.seed))
    nets = {}
    for name in dict.fromkeys(["real", "binary"] if algorithm != "darts" else [network]):
        bits = Bits(**NETWORKS[name], strict_1bit=cfg.strict_1bit, affine=False)
        nets[name] = Supernet(num_classes=classes, in_channels=channels, bits=bits, **cfg.model).to(device)
    generator = torch.Generator().manual_seed(stream(cfg.seed, 1))
    if algorithm == "cp_nas":
        return CPNAS(nets["real"], nets["binary"], generator=generator, w=cfg.w, **cfg.cp_nas)
    if algorithm == "darts":  # as many steps as Parent and Child together
        for key in OF_A_CHILD:
            method.pop(key)
        options = {"rounds": cfg.search.rounds, "steps": 2 * steps, "alpha_start": cfg.search.alpha_start, **method}
        return ChildParentSearch(nets[network], None, generator=generator, w=cfg.w, alpha=cfg.alpha, **options)
    options = {"rounds": cfg.search.rounds, "steps": steps, "alpha_start": cfg.search.alpha_start, **method}
    return ChildParentSearch(nets["real"], nets["binary"], generator=generator, w=cfg.w, alpha=cfg.alpha, **options)


def check(cfg: DictConfig, fabric: Fabric) -> None:
    """ValueError or TypeError for everything that can be wrong before data is read: all values, the supernets."""
    if fabric.world_size > 1 and (cfg.method.algorithm == "cp_nas" or cfg.model.order == "control"):
        raise ValueError("method=cp_nas and model.order=control run on one device: start them without torchrun")
    if cfg.search.batch_size % fabric.world_size:
        raise ValueError(
            f"search.batch_size={cfg.search.batch_size} must be a multiple of the {fabric.world_size} devices"
        )
    if cfg.fabric.precision != "32-true":
        raise ValueError(
            f"fabric.precision={cfg.fabric.precision}: the search takes second derivatives in 32-true only"
        )
    if cfg.budget_minutes is not None and cfg.budget_minutes <= 0:
        raise ValueError(f"budget_minutes={cfg.budget_minutes} must be positive, or null for no limit")
    s = cfg.search
    if s.max_skips is not None and s.max_skips < 0:
        raise ValueError(f"search.max_skips={s.max_skips}, allowed: >= 0, or null for no limit")
    if not 0 <= s.alpha_start < s.rounds:
        raise ValueError(
            f"search.alpha_start={s.alpha_start}: alpha would never move in search.rounds={s.rounds} rounds"
        )
    if s.floor is not None and not 0 <= s.floor <= 1:
        raise ValueError(f"search.floor={s.floor}, allowed: an accuracy of 0..1, or null for none")
    if s.steps is not None and s.steps < 1:
        raise ValueError(f"search.steps={s.steps}, allowed: >= 1, or null for an epoch")
    if min(cfg.w.lr, cfg.w.lr_min, cfg.alpha.lr) < 0 or cfg.w.clip <= 0:
        raise ValueError(
            f"w.lr={cfg.w.lr}, w.lr_min={cfg.w.lr_min}, alpha.lr={cfg.alpha.lr} must be >= 0, w.clip={cfg.w.clip} > 0"
        )
    check_shares(s.shares)
    check_data(**cfg.data)
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    parts = {key: config[key] for key in ("method", "model", "search", "strict_1bit", "w", "alpha", "cp_nas")}
    once(_step_on_shapes, json.dumps(parts | {"seed": 0}), cfg.data.get("size") or SIDES[cfg.data.name])


def _step_on_shapes(config: str, side: int) -> None:
    """Names a cell whose map cannot be halved, too. A quarter of a second, and the same for all seeds of a sweep."""
    with torch.device("meta"), torch.no_grad():
        cfg = OmegaConf.create(json.loads(config))
        algorithm = build(cfg, classes=10, channels=3, steps=1, device=torch.device("meta"))
        net = next(iter(algorithm.nets.values()))
        alphas = net.new_alphas(torch.Generator(device="cpu"))
        net(torch.zeros(2, 3, side, side), alphas)


def endless(batches: Any, phase: int):
    """(images, labels) of one epoch after another; which ones depends on the phase alone."""
    for k in itertools.count():
        for (images,), labels in batches.epoch(1000 * phase + k):
            yield images, labels


def snapshot(algorithm: ChildParentSearch | CPNAS, phase: str) -> dict[str, Any]:
    normal, reduce = algorithm.alphas()
    return {"phase": phase, "normal": normal.tolist(), "reduce": reduce.tolist(), "skips": algorithm.genotype().skips()}


def summary(algorithm: Any, rows: list[dict], trajectory: list[dict], stopped: str) -> dict[str, float]:
    """Final metrics: the last value of each phase's accuracies, the means over the search of what the tangent did, skips, the
    entropy of softmax(alpha) as a share of the largest one, and in the space with a noise operation how often it is kept."""
    metrics = {"skips": trajectory[-1]["skips"], "stopped_early": int(bool(stopped)), "phases": len(rows)}
    for key in ("gradient_cosine", "tangent_ratio", "discrepancy", "backtrack_ratio"):
        if values := [row[key] for row in rows if key in row]:
            metrics[key] = sum(values) / len(values)
    for key in ("val_accuracy", "objective", "parent_accuracy", "child_accuracy"):
        if values := [row[key] for row in rows if key in row]:
            metrics[key] = values[-1]
    for kind, alpha in zip(("normal", "reduce"), algorithm.alphas(), strict=True):
        p = alpha.detach().softmax(-1)
        metrics[f"entropy_{kind}"] = -(p * p.log()).sum(-1).mean().item() / math.log(p.shape[-1])
    metrics["entropy"] = (metrics["entropy_normal"] + metrics["entropy_reduce"]) / 2
    if algorithm.nets["parent"].order == "control":
        metrics["noise_kept"] = algorithm.genotype().share(NOISE)
    return metrics


def below_floor(metrics: dict[str, float], floor: float | None) -> str:
    """What is to be said of a search whose Parent (of DARTS: its one network) is no competent one, or ''."""
    accuracy = metrics.get("parent_accuracy", metrics.get("val_accuracy"))
    if floor is None or accuracy is None or accuracy >= floor:
        return ""
    return f"{accuracy:.1%} on the half for alpha, below search.floor={floor:.0%}: this alpha follows a network that knows little"


@dataclass
class Course:
    """How far a search has come. totals: {term: (sum, count)} of the phase; good: the last cell within search.max_skips."""

    phase: int = 0
    step: int = 0
    rows: list[dict[str, float]] = field(default_factory=list)
    totals: dict[str, tuple[float, int]] = field(default_factory=dict)
    trajectory: list[dict[str, Any]] = field(default_factory=list)
    good: dict[str, Any] | None = None

    def means(self) -> dict[str, float]:
        return {name: total / count for name, (total, count) in self.totals.items()}


def run_phase(
    fabric: Fabric, run: runs.Run, cfg: DictConfig, algorithm: Any, batches: tuple, course: Course, save
) -> str:
    """The remaining steps of the current phase, one on the weights and one on alpha each; returns why it stopped, or ''."""
    phase = course.phase
    if course.step == 0:
        algorithm.begin(phase)
        course.totals = {}
    pairs = zip(endless(batches[0], phase), endless(batches[1], phase), strict=False)
    for train, val in itertools.islice(pairs, course.step, algorithm.steps(phase)):
        row = algorithm.step(phase, train, val)
        row["minutes"] = run.seconds / 60  # of all ranks alike, so that they stop at one step
        values = torch.stack([torch.as_tensor(v, dtype=torch.float32, device=fabric.device) for v in row.values()])
        values = over_ranks(values.detach())
        runs.check_finite(dict(zip(row, values, strict=True)), step=course.step, last_good=run.checkpoint)
        *means, minutes = values.tolist()
        row.pop("minutes")
        for name, value in zip(row, means, strict=True):
            total, count = course.totals.get(name, (0.0, 0))
            course.totals[name] = (total + value, count + 1)
        course.step += 1
        if cfg.budget_minutes is not None and minutes > cfg.budget_minutes:
            save()
            return f"budget_minutes={cfg.budget_minutes}"
        if course.step % cfg.search.save_every == 0 and course.step < algorithm.steps(phase):
            save()
    algorithm.end(phase)
    return ""


def search(fabric: Fabric, run: runs.Run, cfg: DictConfig, data: Data, algorithm: Any, batches: tuple) -> None:
    """The phases from the last checkpoint on, then the genotype and its pictures."""
    course, stopped, phases = Course(trajectory=[snapshot(algorithm, "start")]), "", algorithm.phases()
    if (saved := run.load_checkpoint()) is not None:
        algorithm.load_state_dict(saved["algorithm"])
        course = Course(**saved["course"])

    def save() -> None:
        run.save_checkpoint({"algorithm": algorithm.state_dict(), "course": vars(course).copy(), "config": run.config})

    fabric.print(
        f"{cfg.arm} on {cfg.data.name}: batch {cfg.search.batch_size}, {len(phases)} phases of {algorithm.steps(0)} steps, "
        f"from phase {course.phase + 1} step {course.step + 1}"
    )
    progress = Progress(fabric, run, first=course.phase + 1, last=len(phases), every=1)
    while course.phase < len(phases) and not stopped:
        stopped = run_phase(fabric, run, cfg, algorithm, batches, course, save)
        name, steps = phases[course.phase], course.step
        course.trajectory.append(snapshot(algorithm, name))
        skips = course.trajectory[-1]["skips"]
        course.rows.append(course.means())
        progress.report(
            course.phase + 1,
            {"phase": name, "steps": steps, "skips": skips, **course.rows[-1]},
            images=steps,
            unit="steps",
        )
        limit = cfg.search.max_skips
        if limit is not None and skips > limit:
            stopped = stopped or f"more than search.max_skips={limit} skip connections"
        else:
            course.good = algorithm.genotype().plain()
        course.phase, course.step = course.phase + 1, 0
        if not stopped:
            save()
    if stopped:
        fabric.print(f"stopped by {stopped}")
    genotype = algorithm.genotype()
    if cfg.search.max_skips is not None and genotype.skips() > cfg.search.max_skips:
        note = "the cell before that is kept" if course.good else "no cell was within it, so this one is written"
        genotype = Genotype.parse(course.good) if course.good else genotype
        fabric.print(f"search.max_skips={cfg.search.max_skips}: {note}")
    if fabric.is_global_zero:
        write(run, cfg, data, genotype, course, stopped)
    metrics = summary(algorithm, course.rows, course.trajectory, stopped)
    if said := below_floor(metrics, cfg.search.floor):
        fabric.print(f"notice: {cfg.arm}, seed {cfg.seed}: {said}")
    run.finish(metrics | {"below_floor": int(bool(said))})
    fabric.print(f"{genotype}\nwritten to {run.dir / 'genotype.json'}")


def write(run: runs.Run, cfg: DictConfig, data: Data, genotype: Genotype, course: Course, stopped: str) -> None:
    """genotype.json (with how it was found, and what its network at the size of the search costs), trajectory.json, pictures."""
    options = {k: v for k, v in cfg.model.items() if k not in ("nodes", "order")}
    bits = Bits("beta", "binary", strict_1bit=cfg.strict_1bit)
    with torch.device("meta"):
        network = Network(genotype, num_classes=data.classes, in_channels=data.channels, bits=bits, **options)
        cost = count(network, torch.empty(1, data.channels, data.size, data.size))
    found = {
        "arm": cfg.arm, "seed": cfg.seed, "method": run.config["method"], "data": dict(data.source), "phases": len(course.rows),
        "stopped": stopped, "config_sha256": run.sha,
    }  # fmt: skip
    size = {"channels": cfg.model.channels, "cells": cfg.model.cells, "size": data.size, "classes": data.classes}
    genotype.save(run.dir / "genotype.json", found=found, cost={**size, **cost})
    (run.dir / "trajectory.json").write_text(json.dumps(course.trajectory) + "\n")
    draw_cells(genotype, run.dir / "genotype.png")
    draw_search(course.trajectory, course.rows, cfg.model.order, run.dir / "search.png")


def reopen(out: Path, budget_minutes: float | None) -> None:
    """Marks a search that its budget has ended as running, if there is more budget now than it has used."""
    file, result = out / "result.json", runs.read_json(out / "result.json")
    found = (runs.read_json(out / "genotype.json") or {}).get("found", {})
    if (
        result is None
        or result["status"] != "finished"
        or not str(found.get("stopped", "")).startswith("budget_minutes")
    ):
        return
    if budget_minutes is None or result["seconds"] < 60 * budget_minutes:
        beside = file.with_name(".result.json.tmp")
        beside.write_text(json.dumps({**result, "status": "running", "metrics": {}}, indent=1) + "\n")
        os.replace(beside, file)


def fit(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    """Search to the end (or the budget) and write the genotype; resumes from out/last.ckpt."""
    check(cfg, fabric)
    data = build_data(seed=cfg.seed, **cfg.data)
    parts = split_for_search(data, cfg.search.shares, seed=cfg.seed)
    share = {"rank": fabric.global_rank, "world": fabric.world_size}
    plans = [Plan(len(p), cfg.search.batch_size, seed=stream(cfg.seed, 2, k), **share) for k, p in enumerate(parts)]
    batches = tuple(part.batches(plan, fabric.device) for part, plan in zip(parts, plans, strict=True))
    steps = cfg.search.steps or len(plans[0])
    algorithm = build(cfg, classes=data.classes, channels=data.channels, steps=steps, device=fabric.device)
    fabric.print(f"{len(parts[0])} images for the weights, {len(parts[1])} for alpha")
    if cfg.preflight:
        pair = next(endless(batches[0], 0)), next(endless(batches[1], 0))
        kinds = range(min(2, len(algorithm.phases())))

        def one_of_each() -> None:
            for phase in kinds:
                algorithm.begin(phase)
                algorithm.step(phase, *pair)

        total = sum(algorithm.steps(p) for p in range(len(algorithm.phases())))
        parameters = sum(p.numel() for net in algorithm.nets.values() for p in net.parameters())
        preflight(
            fabric, one_of_each, parameters=parameters, what=f"{cfg.search.batch_size} images", steps=total // len(kinds),
            note=f"a step here is one of each of {len(kinds)} networks",
        )  # fmt: skip
        return
    if fabric.is_global_zero:
        reopen(out, cfg.budget_minutes)
    fabric.barrier()
    cfg_of_run = cfg.copy()
    cfg_of_run.budget_minutes = None  # how long, not what: a larger budget continues the run
    if (run := runs.Run.open(out, cfg_of_run, fabric, data=data.source)) is not None:
        with run:
            search(fabric, run, cfg, data, algorithm, batches)


main = script("search", fit)


if __name__ == "__main__":
    main()
