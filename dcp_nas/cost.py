"""What the second-order term costs: CPU time of alternating steps with the exact product, with Gauss-Newton, without.

python cost.py                       a minute at most; one thread, so that other load on the machine matters least
python cost.py hessian=true          also with the matrix formed row by row
"""

from pathlib import Path

from lightning_fabric import Fabric
from omegaconf import DictConfig

from common import runs
from common.scripts import script
from dcp_nas.analysis.rule_costs import measure
from dcp_nas.analysis.snapshots import build, check


@script("cost")
def main(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    check(cfg)
    if cfg.repeats < 1:
        raise ValueError(f"repeats={cfg.repeats}, allowed: >= 1")
    if (run := runs.Run.open(out, cfg, fabric)) is not None:
        with run:
            search, batches, seen = build(cfg)
            metrics = measure(search, batches, seen, repeats=cfg.repeats, hessian=cfg.hessian)
            run.finish(metrics)
            for key, value in metrics.items():
                print(f"{key:28s} {value:.4g}")


if __name__ == "__main__":
    main()
