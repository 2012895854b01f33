"""The mean of several runs of one seed as an arm of its own: the random genotypes, of which one would be an accident.

python average.py scale=mini seed=100 arm=random_mean 'of=[random_0, random_1]'
"""

from pathlib import Path

from lightning_fabric import Fabric
from omegaconf import DictConfig

from common import runs
from common.scripts import arm_name, script


def mean_of(folders: list[Path]) -> dict[str, float]:
    """Mean of every metric that all results have. FileNotFoundError or ValueError names a run that is missing or unfinished."""
    results = []
    for folder in folders:
        result = runs.read_json(folder / "result.json")
        if result is None:
            raise FileNotFoundError(f"no run in {folder}: carry out the arms to average first")
        if result["status"] != "finished":
            raise ValueError(f"{folder} holds a {result['status']} run")
        results.append(result["metrics"])
    if not results:
        raise ValueError("of=[]: name at least one arm")
    names = set.intersection(*(set(r) for r in results))
    return {name: sum(r[name] for r in results) / len(results) for name in sorted(names)}


@script("average")
def main(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    metrics = mean_of([Path(cfg.run_root) / cfg.scale / arm_name(arm) / f"seed{cfg.seed}" for arm in cfg.of])
    if (run := runs.Run.open(out, cfg, fabric)) is not None:
        with run:
            run.finish(metrics)
            print("  ".join(f"{k} {v:.4g}" for k, v in metrics.items()))


if __name__ == "__main__":
    main()
