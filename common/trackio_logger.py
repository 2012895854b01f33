"""logger=trackio: the numbers of a run in a Trackio project on this machine (`trackio show`), beside metrics.jsonl."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_fabric.loggers.logger import Logger, rank_zero_experiment
from lightning_fabric.utilities.rank_zero import rank_zero_only


class TrackioLogger(Logger):
    """A run of the project `project`, named by its directory below `runs/`; an interrupted run goes on under its name.

    ValueError where trackio is not installed."""

    def __init__(self, out: Path, project: str):
        try:
            import trackio  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ValueError(f"logger=trackio needs trackio ({error}): pip install '.[logbook]'") from error
        self._trackio, self._project, self._run = trackio, project, None
        parts = Path(out).parts
        self._name = "/".join(parts[parts.index("runs") + 1 :] if "runs" in parts else parts[-3:])

    @property
    def name(self) -> str:
        return self._project

    @property
    def version(self) -> str:
        return self._name

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._run is None:
            self._run = self._trackio.init(project=self._project, name=self._name, resume="allow", embed=False)
        return self._run

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any], *_: Any, **__: Any) -> None:  # config.yaml has them
        pass

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.experiment.log(dict(metrics), step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None
