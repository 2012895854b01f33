"""The transfer tables of one split: every model (rows) on the counterexamples of every model and fidelity measure (columns).

python tables.py            reads runs/<scale>/<nr>_<fr>_<attack>/seed<k>, writes table.csv and transfer_<fr>.png
python tables.py made_by=random
"""

import csv
from pathlib import Path

import numpy as np
from lightning_fabric import Fabric
from omegaconf import DictConfig

from common import runs
from common.scripts import script
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


def summarise(cells: dict[tuple[str, str], dict[str, float]]) -> dict[str, float]:
    """Means over the table: *_diagonal of the attacked model, *_off of all others, r_gap their difference in R.

    r_extreme_gap is the smallest R off the diagonal minus the largest on it (claim C2: every one above every one)."""
    evaluated = sorted(
        {k[2:] for m in cells.values() for k in m if k.startswith("r_") and k not in ("r_intra", "r_transfer")}
    )
    out: dict[str, float] = {}
    for key in ("r", "change", "srcc24", "srcc_clean"):
        diagonal = [m[f"{key}_{nr}"] for (nr, _), m in cells.items() if f"{key}_{nr}" in m]
        off = [m[f"{key}_{n}"] for (nr, _), m in cells.items() for n in evaluated if n != nr and f"{key}_{n}" in m]
        if diagonal:
            out[f"{key}_diagonal"] = float(np.mean(diagonal))
        if off:
            out[f"{key}_off"] = float(np.mean(off))
        if key == "r" and off:
            out["r_gap"], out["r_extreme_gap"] = out["r_off"] - out["r_diagonal"], float(min(off) - max(diagonal))
    for key in ("success", "max_change", "visibility", "share_above_4", "share_up"):
        values = [m[key] for m in cells.values() if key in m]
        if values:
            out[key] = float(np.mean(values))
    return out


def write_tables(cells: dict[tuple[str, str], dict[str, float]], out: Path, title: str) -> None:
    """table.csv: a row per (attacked, fidelity, evaluated); a heat map of R per fidelity measure."""
    columns = ("r", "still", "change", "srcc_clean", "srcc24", "srcc12", "krcc12", "plcc12", "rmse12")
    evaluated = [k[2:] for k in next(iter(cells.values())) if k.startswith("r_") and k not in ("r_intra", "r_transfer")]
    with (out / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["attacked", "fidelity", "evaluated", *columns])
        for (nr, fr), m in cells.items():
            for name in evaluated:
                writer.writerow([nr, fr, name, *(m.get(f"{c}_{name}", "") for c in columns)])
    for fr in dict.fromkeys(f for _, f in cells):
        attacked = [nr for nr, f in cells if f == fr]
        r = np.array([[cells[nr, fr][f"r_{n}"] for nr in attacked] for n in evaluated])
        transfer_matrix(r, evaluated, attacked, out / f"transfer_{fr}.png", title=f"R under {fr}, {title}")


@script("tables")
def main(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    cells = read_cells(cfg)
    if (run := runs.Run.open(out, cfg, fabric)) is not None:
        with run:
            write_tables(cells, out, f"{cfg.made_by}, seed {cfg.seed}")
            metrics = summarise(cells)
            run.finish(metrics)
            print("  ".join(f"{k} {v:.4g}" for k, v in metrics.items()))


if __name__ == "__main__":
    main()
