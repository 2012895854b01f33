"""The transfer tables of one split: every model (rows) on the counterexamples of every model and fidelity measure (columns).

python tables.py            reads runs/<scale>/<nr>_<fr>_<attack>/seed<k>, writes table.csv and transfer_<fr>.png
python tables.py made_by=random
"""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from lightning_fabric import Fabric
from omegaconf import DictConfig

from common import runs
from common.scripts import script
from iqa_attack.quality_metrics import COMPETENT
from iqa_attack.study.pictures import transfer_matrix


def read_cells(cfg: DictConfig) -> dict[tuple[str, str], dict[str, float]]:
    """{(nr, fr): metrics} of the finished attacks of this seed. FileNotFoundError naming the first that is missing."""
    found = {}
    for nr in cfg.attacked:
        for fr in cfg.fidelity:
            where = Path(cfg.run_root) / cfg.scale / f"{nr}_{fr}_{cfg.made_by}" / f"seed{cfg.seed}"
            result = runs.read_json(where / "result.json")
            if result is None or result["status"] != "finished":
                raise FileNotFoundError(
                    f"no finished attack in {where}: run `python attack.py nr={nr} fr={fr} attack={cfg.made_by}` first"
                )
            found[nr, fr] = result["metrics"]
    return found


def competent(
    metrics: dict[str, float], name: str, *, floor: float = COMPETENT, carries: Sequence[str] | None = None
) -> bool:
    """Whether a model may carry a claim: its clean SRCC on the attacked images reaches the floor, and it is one of those declared
    beforehand (carries; null: any)."""
    return metrics.get(f"srcc_clean_{name}", -1.0) >= floor and (carries is None or name in carries)


def summarise(
    cells: dict[tuple[str, str], dict[str, float]], *, floor: float = COMPETENT, carries: Sequence[str] | None = None
) -> dict[str, float]:
    """Means over the table: *_diagonal of the attacked model, *_off of all others, r_gap their difference in R.

    r_extreme_gap is the smallest R off the diagonal minus the largest on it (claim C2: every one above every one). The same with
    _competent: of the competent models alone (see `competent`), absent where none is left. change_diagonal_smallest: of the
    attacked model that moves least; cells_below_floor: attacks of models that are not competent, share_below_floor of all."""
    evaluated = sorted(
        {k[2:] for m in cells.values() for k in m if k.startswith("r_") and k not in ("r_intra", "r_transfer")}
    )
    out = _means(cells, lambda m, n: f"r_{n}" in m, evaluated, "")
    out |= _means(cells, lambda m, n: competent(m, n, floor=floor, carries=carries), evaluated, "_competent")
    below = [not competent(m, nr, floor=floor, carries=carries) for (nr, _), m in cells.items()]
    out |= {"cells_below_floor": sum(below), "share_below_floor": sum(below) / len(cells)}
    for key in ("success", "max_change", "visibility", "share_above_4", "share_up"):
        values = [m[key] for m in cells.values() if key in m]
        if values:
            out[key] = float(np.mean(values))
    return out


def _means(cells: dict, counts: Callable[[dict, str], bool], evaluated: Sequence[str], suffix: str) -> dict[str, float]:
    """The means of `summarise` over the entries (metrics of a cell, evaluated model) that count, on and off the diagonal."""
    out: dict[str, float] = {}
    kept = {cell: m for cell, m in cells.items() if counts(m, cell[0])}
    for key in ("r", "change", "srcc24", "srcc_clean"):
        diagonal = [m[f"{key}_{nr}"] for (nr, _), m in kept.items() if f"{key}_{nr}" in m]
        off = [
            m[f"{key}_{n}"]
            for (nr, _), m in kept.items()
            for n in evaluated
            if n != nr and counts(m, n) and f"{key}_{n}" in m
        ]
        if diagonal:
            out[f"{key}_diagonal{suffix}"] = float(np.mean(diagonal))
        if diagonal and key == "change":
            out[f"change_diagonal_smallest{suffix}"] = float(min(diagonal))
        if off:
            out[f"{key}_off{suffix}"] = float(np.mean(off))
        if key == "r" and off:
            out[f"r_gap{suffix}"] = float(np.mean(off) - np.mean(diagonal))
            out[f"r_extreme_gap{suffix}"] = float(min(off) - max(diagonal))
    return out


def write_tables(
    cells: dict[tuple[str, str], dict[str, float]], out: Path, title: str, *, floor: float = COMPETENT,
    carries: Sequence[str] | None = None,
) -> None:  # fmt: skip
    """table.csv: a row per (attacked, fidelity, evaluated), with the clean SRCC beside R and whether the evaluated model is
    competent; a heat map of R per fidelity measure."""
    columns = ("r", "still", "change", "srcc_clean", "srcc24", "srcc12", "krcc12", "plcc12", "rmse12")
    evaluated = [k[2:] for k in next(iter(cells.values())) if k.startswith("r_") and k not in ("r_intra", "r_transfer")]
    with (out / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["attacked", "fidelity", "evaluated", *columns, "competent"])
        for (nr, fr), m in cells.items():
            for name in evaluated:
                fit = competent(m, name, floor=floor, carries=carries)
                writer.writerow([nr, fr, name, *(m.get(f"{c}_{name}", "") for c in columns), str(fit).lower()])
    for fr in dict.fromkeys(f for _, f in cells):
        attacked = [nr for nr, f in cells if f == fr]
        r = np.array([[cells[nr, fr][f"r_{n}"] for nr in attacked] for n in evaluated])
        named = [f"{n} ({cells[attacked[0], fr].get(f'srcc_clean_{n}', float('nan')):.2f})" for n in evaluated]
        transfer_matrix(r, named, attacked, out / f"transfer_{fr}.png", title=f"R under {fr}, {title} (clean SRCC)")


@script("tables")
def main(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    if not -1 <= cfg.floor <= 1:
        raise ValueError(f"floor={cfg.floor}, allowed: -1..1")
    if cfg.carries is not None and (unknown := set(cfg.carries) - set(cfg.attacked)):
        raise ValueError(f"carries={list(cfg.carries)}: {', '.join(sorted(unknown))} is not attacked")
    cells, gate = read_cells(cfg), {"floor": cfg.floor, "carries": cfg.carries}
    if (run := runs.Run.open(out, cfg, fabric)) is not None:
        with run:
            write_tables(cells, out, f"{cfg.made_by}, seed {cfg.seed}", **gate)
            metrics = summarise(cells, **gate)
            run.finish(metrics)
            print("  ".join(f"{k} {v:.4g}" for k, v in metrics.items()))
            for (nr, fr), m in cells.items():
                if not competent(m, nr, **gate):
                    clean = f"clean SRCC {m.get(f'srcc_clean_{nr}', float('nan')):.3f}, floor {cfg.floor}"
                    print(
                        f"{nr} under {fr} carries no primary claim: {clean}"
                        + ("" if cfg.carries is None or nr in cfg.carries else ", not declared")
                    )


if __name__ == "__main__":
    main()
