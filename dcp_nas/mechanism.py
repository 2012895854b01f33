"""What the tangent term does, on a fixed snapshot of the supernets: does a small step along it bring the Child's gradient closer?

python mechanism.py                  against random steps of the same length, see analysis/snapshots.py
python mechanism.py network=real     the control: without signs the exact step must succeed
"""

from pathlib import Path

from lightning_fabric import Fabric
from omegaconf import DictConfig

from common import runs
from common.scripts import script
from dcp_nas.analysis.snapshots import build, check, examine


@script("mechanism")
def main(cfg: DictConfig, fabric: Fabric, out: Path) -> None:
    check(cfg)
    if (run := runs.Run.open(out, cfg, fabric)) is not None:
        with run:
            search, _, seen = build(cfg)
            metrics = examine(search, seen, list(cfg.lengths), cfg.chunks, cfg.lam, cfg.seed)
            run.finish(metrics)
            for key, value in metrics.items():
                print(f"{key:28s} {value:.4g}")


if __name__ == "__main__":
    main()
