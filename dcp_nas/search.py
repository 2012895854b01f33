"""Search a genotype for 1-bit networks: one arm of Parent-Child search, DARTS, or CP-NAS. Writes genotype.json and two pictures.

python search.py                                            digits, DCP-NAS with the Gauss-Newton form, under a minute
python search.py method=direct                              another arm
python search.py experiment=search_cifar10 data.root=/datasets budget_minutes=300
python search.py experiment=search_folder data.root=/my/images          train/<class>/, val/<class>/

Interrupted, it goes on where its last checkpoint was. budget_minutes ends it early with the genotype found so far.
"""

import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning_fabric import Fabric
from omegaconf import DictConfig, OmegaConf

from common import runs
from common.data.batches import Plan, stream
from dcp_nas.child_parent import ChildParentSearch
from dcp_nas.cp_nas import CPNAS
from dcp_nas.data import Images, build_data, split_for_search
from dcp_nas.draw import draw_cells, draw_search
from dcp_nas.operations import Bits
from dcp_nas.supernet import Supernet

ALGORITHMS = ("child_parent", "darts", "cp_nas")
NETWORKS: dict[str, dict[str, Any]] = {
    "real": {"weights": "real", "activations": "real"},
    "binary": {"weights": "beta", "activations": "binary"},
}


def build(cfg: DictConfig, data: Images, steps: int, device: torch.device) -> ChildParentSearch | CPNAS:
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
        nets[name] = Supernet(num_classes=data.classes, in_channels=data.channels, bits=bits, **cfg.model).to(device)
    generator = torch.Generator().manual_seed(stream(cfg.seed, 1))
    if algorithm == "cp_nas":
        return CPNAS(nets["real"], nets["binary"], generator=generator, w=cfg.w, **cfg.cp_nas)
    if algorithm == "darts":  # as many steps as Parent and Child together
        for key in ("lam", "mu", "hessian", "distance", "chunks", "tangent", "recon_reduction", "inherit"):
            method.pop(key)
        options = {"rounds": cfg.search.rounds, "steps": 2 * steps, "alpha_start": cfg.search.alpha_start, **method}
        return ChildParentSearch(nets[network], None, generator=generator, w=cfg.w, alpha=cfg.alpha, **options)
    options = {"rounds": cfg.search.rounds, "steps": steps, "alpha_start": cfg.search.alpha_start, **method}
    return ChildParentSearch(nets["real"], nets["binary"], generator=generator, w=cfg.w, alpha=cfg.alpha, **options)


def endless(batches: Any, phase: int):
    """(images, labels) of one epoch after another; which ones depends on the phase alone."""
    for k in itertools.count():
        for (images,), labels in batches.epoch(1000 * phase + k):
            yield images, labels


def snapshot(algorithm: ChildParentSearch | CPNAS, phase: str) -> dict[str, Any]:
    normal, reduce = algorithm.alphas()
    return {"phase": phase, "normal": normal.tolist(), "reduce": reduce.tolist(), "skips": algorithm.genotype().skips()}


def preflight(fabric: Fabric, algorithm: Any, batches: tuple, total: int) -> None:
    """Two steps of every kind of phase; prints memory and hours. Writes nothing."""
    seconds = []
    for phase in range(min(2, len(algorithm.phases()))):
        algorithm.begin(phase)
        pair = next(endless(batches[0], 0)), next(endless(batches[1], 0))
        for _ in range(2):  # the first step also pays for allocation
            start = time.perf_counter()
            algorithm.step(phase, *pair)
            if fabric.device.type == "cuda":
                torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    cuda = fabric.device.type == "cuda"
    memory = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB on the card, " if cuda else ""
    mean = sum(seconds) / len(seconds)
    fabric.print(
        f"preflight: data found, {memory}{mean:.3f} s per step without data loading, about {mean * total / 3600:.2g} h for "
        f"{total} steps"
    )


def summary(algorithm: Any, rows: list[dict], trajectory: list[dict], stopped: str) -> dict[str, float]:
    """Final metrics: the last value of each phase's accuracies, the means over the search of what the tangent did, skips."""
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
    return metrics


def fit(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    """Search to the end (or the budget) and write the genotype; resumes from out/last.ckpt."""
    if fabric.world_size != 1:
        raise ValueError("the search runs on one device: start it without torchrun (train.py takes several)")
    if cfg.fabric.precision != "32-true":
        raise ValueError(
            f"fabric.precision={cfg.fabric.precision}: the search takes second derivatives in 32-true only"
        )
    if cfg.budget_minutes is not None and cfg.budget_minutes <= 0:
        raise ValueError(f"budget_minutes={cfg.budget_minutes} must be positive, or null for no limit")
    data = build_data(seed=cfg.seed, **cfg.data)
    parts = split_for_search(data, cfg.search.shares, seed=cfg.seed)
    plans = [Plan(len(p), cfg.search.batch_size, seed=stream(cfg.seed, 2, k)) for k, p in enumerate(parts)]
    batches = tuple(part.batches(plan, fabric.device) for part, plan in zip(parts, plans, strict=True))
    algorithm = build(cfg, data, cfg.search.steps or len(plans[0]), fabric.device)
    phases = algorithm.phases()
    if cfg.preflight:
        return preflight(fabric, algorithm, batches, sum(algorithm.steps(p) for p in range(len(phases))))
    run = runs.Run.open(out, cfg, fabric)
    if run is None:
        return
    with run:
        phase, step, rows, totals, stopped = 0, 0, [], {}, ""
        trajectory = [snapshot(algorithm, "start")]
        if (state := run.load_checkpoint()) is not None:
            algorithm.load_state_dict(state["algorithm"])
            phase, step, rows, totals, trajectory = (
                state[k] for k in ("phase", "step", "rows", "totals", "trajectory")
            )

        def save() -> None:
            run.save_checkpoint({
                "algorithm": algorithm.state_dict(), "phase": phase, "step": step, "rows": rows, "totals": totals,
                "trajectory": trajectory, "config": run.config,
            })  # fmt: skip

        fabric.print(
            f"{cfg.arm} on {cfg.data.name}: {len(parts[0])} images for the weights, {len(parts[1])} for alpha, batch "
            f"{cfg.search.batch_size}, {len(phases)} phases of {algorithm.steps(0)} steps, "
            f"from phase {phase + 1} step {step + 1}"
        )
        while phase < len(phases) and not stopped:
            begun = time.perf_counter()
            if step == 0:
                algorithm.begin(phase)
                totals = {}
            pairs = zip(endless(batches[0], phase), endless(batches[1], phase), strict=False)
            for train, val in itertools.islice(pairs, step, algorithm.steps(phase)):
                row = algorithm.step(phase, train, val)
                values = torch.stack(
                    [torch.as_tensor(v, dtype=torch.float32, device=fabric.device) for v in row.values()]
                )
                runs.check_finite(dict(zip(row, values, strict=True)), step=step, last_good=run.checkpoint)
                for name, value in zip(row, values.tolist(), strict=True):
                    total, count = totals.get(name, (0.0, 0))
                    totals[name] = (total + value, count + 1)
                step += 1
                if cfg.budget_minutes is not None and run.seconds > 60 * cfg.budget_minutes:
                    stopped = f"budget_minutes={cfg.budget_minutes}"
                    break
                if step % cfg.search.save_every == 0 and step < algorithm.steps(phase):
                    save()
            if not stopped:
                algorithm.end(phase)
            means = {name: total / count for name, (total, count) in totals.items()}
            trajectory.append(snapshot(algorithm, phases[phase]))
            skips = trajectory[-1]["skips"]
            rows.append(means)
            run.log(phase=phases[phase], steps=step, skips=skips, **means)
            for logger in fabric.loggers:
                logger.log_metrics({"skips": skips, **means}, step=phase + 1)
            if cfg.search.max_skips is not None and skips > cfg.search.max_skips:
                stopped = stopped or f"more than search.max_skips={cfg.search.max_skips} skip connections"
            terms = "  ".join(f"{k} {v:.4g}" for k, v in means.items())
            left = (time.perf_counter() - begun) * (len(phases) - phase - 1)
            fabric.print(
                f"phase {phase + 1}/{len(phases)} ({phases[phase]})  skips {skips}  {terms}  {left:.0f} s left"
            )
            phase, step = phase + 1, 0
            if not stopped:
                save()
        if stopped:
            fabric.print(f"stopped by {stopped}")
        genotype = algorithm.genotype()
        genotype.save(out / "genotype.json")
        (out / "trajectory.json").write_text(json.dumps(trajectory) + "\n")
        draw_cells(genotype, out / "genotype.png")
        draw_search(trajectory, rows, cfg.model.order, out / "search.png")
        run.finish(summary(algorithm, rows, trajectory, stopped))
        fabric.print(f"{genotype}\nwritten to {out / 'genotype.json'}")


@hydra.main(version_base="1.3", config_path="configs", config_name="search")
def main(cfg: DictConfig) -> None:
    out = HydraConfig.get().runtime.output_dir
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    try:
        loggers = [instantiate(cfg.logger)] if cfg.logger else []
        fit(cfg, runs.launch(cfg.fabric, loggers=loggers), Path(out))
    finally:
        runs.remove_if_empty(out, cfg.run_root)


if __name__ == "__main__":
    main()
