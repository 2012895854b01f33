"""What every script of every paper does around its own work: read the command line, check it, start, end in one line.

    main = script("config", fit)            # fit(cfg, fabric, out), with configs/config.yaml beside the file

A wrong value, a missing file or data set ends in one line `error: ...` and exit status 1, and leaves no directory behind;
HYDRA_FULL_ERROR=1 shows the traceback. An override has the type of the value that it replaces.
"""

import contextlib
import difflib
import fnmatch
import functools
import hashlib
import inspect
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import hydra
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning_fabric.loggers.csv_logs import CSVLogger
from lightning_fabric.loggers.tensorboard import TensorBoardLogger
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common.data.files import on_broken
from common.runs import NOT_IN_FINGERPRINT, RunError, flatten, launch, leave, plain, remove_if_empty
from common.trackio_logger import TrackioLogger

# Errors whose message says all there is to say; any other is a defect of this project and shows its traceback.
EXPECTED = (ValueError, OSError, RunError, FloatingPointError, OmegaConfBaseException, HydraException)

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is ten times as fast
_SHOW_TRACEBACK = os.environ.get("HYDRA_FULL_ERROR") == "1" and "HYDRA_FULL_ERROR_BY_FRAME" not in os.environ

HYDRA_FLAGS = {
    "-m", "--multirun", "-r", "--run", "-c", "--cfg", "--resolve", "-p", "--package", "-cn", "--config-name", "-cd",
    "--config-dir", "-cp", "--config-path", "-i", "--info", "--hydra-help", "--version", "-sc", "--shell-completion",
    "--experimental-rerun",
}  # fmt: skip
# Values that no script of any paper can use, by the names that the papers share. (lowest, highest); None is open.
LIMITS: dict[str, tuple[float | None, float | None]] = {
    "seed": (0, 2**32 - 1), "*.seed": (0, 2**32 - 1), "threads": (1, None), "*batch_size": (1, None), "*workers": (0, None),
    "*accumulation": (1, None), "train.epochs": (0, None), "*log_every": (1, None), "*save_every": (1, None),
    "*eval_every": (0, None), "*.lr": (0, None), "*_lr": (0, None), "*.lr_*": (0, None), "*_lr_mult": (0, None),
    "*weight_decay": (0, None), "*.momentum": (0, 1), "*.clip": (0, None), "*.clip_norm": (0, None),
    "*statistics_images": (1, None), "*calibration_images": (1, None), "top": (1, None), "*label_smoothing": (0, 1),
}  # fmt: skip


# --------------------------------------------------------------------------------------------------------- the script
def script(config: str = "config", body: Callable[..., Any] | None = None) -> Any:
    """`body` as a Hydra script with the configuration `configs/<config>.yaml` beside its file; without `body` a decorator.

    body is called with as many of (cfg, fabric, out) as it takes. out: the run directory (the working directory for verbs that
    write to `out=`). cfg has been checked (`check`); fabric is launched on `cfg.fabric` with the logger `cfg.logger`, on one
    device where the configuration has no such node."""
    if body is None:
        return functools.partial(script, config)
    takes = len(inspect.signature(body).parameters)

    @functools.wraps(body)
    def task(cfg: DictConfig) -> Any:
        out, multirun = Path(HydraConfig.get().runtime.output_dir), HydraConfig.get().mode == RunMode.MULTIRUN
        try:
            check(cfg)
            with on_broken(cfg.get("broken_images", "stop")), _threads(cfg.get("threads")):
                loggers = [make_logger(cfg.logger, out)] if cfg.get("logger") else []
                fabric = launch(cfg.get("fabric") or {"accelerator": "auto", "devices": 1}, loggers=loggers)
                try:
                    return body(*(cfg, fabric, out)[:takes])
                finally:
                    for logger in loggers:  # csv has written nothing of the last hundred rows before
                        logger.finalize("finished")
        except BaseException as error:
            if multirun and isinstance(error, Exception):  # the other cells go on
                print(f"{out}: {one_line(error)}", file=sys.stderr, flush=True)
                raise
            _end(error)
        finally:
            root = cfg.get("run_root")
            remove_if_empty(out, root if isinstance(root, str) and root else ".")

    @functools.wraps(body)
    def main() -> None:
        here = Path(sys.modules[body.__module__].__file__ or ".").parent / "configs"
        if {"-h", "--help"} & set(sys.argv[1:]):
            return print(options(here, config, sys.modules[body.__module__].__doc__ or ""))
        _terminate_cleanly()
        if unknown := [w for w in sys.argv[1:] if w.startswith("-") and w.partition("=")[0] not in HYDRA_FLAGS]:
            word = unknown[0].lstrip("-").partition("=")[0]
            _end(ValueError(f"there is no option {unknown[0]}: options are words like {word}=..., see --help"))
        # Hydra raises its own errors as they are, and they end in one line below; a script that this one starts must not take it
        # for the user's wish.
        os.environ |= {"HYDRA_FULL_ERROR": "1"} | ({} if _SHOW_TRACEBACK else {"HYDRA_FULL_ERROR_BY_FRAME": "1"})
        try:
            hydra.main(version_base="1.3", config_path=str(here.resolve()), config_name=config)(task)()
        except BaseException as error:
            _end(explained(error, here, config))
        leave()

    return main


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """`count` threads for torch, and what was before afterwards: the next cell of a multirun has its own `threads=`."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _end(error: BaseException) -> None:
    """One line for an error that explains itself; anything else goes on as it is."""
    if isinstance(error, KeyboardInterrupt):
        print("interrupted; the same command goes on where the last checkpoint was", file=sys.stderr)
        raise SystemExit(130) from None
    if _SHOW_TRACEBACK or not explains_itself(error):
        raise error
    rank = f"[rank {os.environ['RANK']}] " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    print(f"{rank}error: {one_line(error)}", file=sys.stderr, flush=True)
    raise SystemExit(1) from None


def explains_itself(error: BaseException) -> bool:
    """Whether the message of an error is all that a user needs. A TypeError is when it names a keyword of a configuration."""
    keyword = isinstance(error, TypeError) and re.search(
        r"unexpected keyword|required keyword|keyword-only", str(error)
    )
    return isinstance(error, EXPECTED) or bool(keyword)


def one_line(error: BaseException) -> str:
    """The message of an error on one line; Hydra's say first which override was wrong."""
    text = str(error)
    if isinstance(error, ConfigCompositionException) and error.__cause__ is not None:
        text = f"{text}: {error.__cause__}"
    if isinstance(error, OmegaConfBaseException):
        text = "\n".join(line for line in text.splitlines() if not re.match(r"\s*(object_type|reference_type)=", line))
    if not text.strip():
        text = type(error).__name__
    return re.sub(r"\s*\n\s*", " ", text.strip())


def explained(error: BaseException, configs: Path, config: str) -> BaseException:
    """The error itself, or for a misspelt key or choice one that names the nearest or the allowed ones."""
    text = str(error)
    if choice := re.search(
        r"Could not find '(\S+)/([^'/]+)'\s+Available options in '[^']+':\s+(.*?)\s+Config search", text, re.S
    ):
        group, name, allowed = choice.groups()
        return ValueError(f"{group}={name}, allowed: {', '.join(allowed.split())}")
    if key := re.search(r"Could not override '([^']+)'", text):
        GlobalHydra.instance().clear()
        with initialize_config_dir(config_dir=str(configs.resolve()), version_base="1.3"):
            keys: Any = OmegaConf.to_container(compose(config), resolve=False)
            known = [*flatten(keys), *(p.name for p in configs.iterdir())]
        return ValueError(f"there is no key {key[1]}{nearest(key[1], known)} (python <script>.py --help lists all)")
    return error


def make_logger(logger: Any, out: Path) -> Any:
    """A Fabric logger: tensorboard or csv (written to `out`), trackio, or any that the node instantiates (_target_)."""
    named = {"tensorboard": TensorBoardLogger, "csv": CSVLogger}
    if logger == "trackio":
        paper = Path(sys.modules["__main__"].__file__ or "run").resolve().parent.name
        return TrackioLogger(out, paper)
    if isinstance(logger, str):
        if logger not in named:
            raise ValueError(f"logger={logger}, allowed: {', '.join(named)}, trackio, or a node with a _target_")
        return named[logger](root_dir=str(out), name="", version="")
    return instantiate(logger)


def _terminate_cleanly() -> None:
    """SIGTERM (a scheduler, a supervisor) ends a script as Ctrl-C does: what it holds is released, what it wrote is whole."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)


def options(configs: Path, config: str, doc: str) -> str:
    """The text of `--help`: the script's docstring, its configuration with its comments, and what can be chosen by name."""
    parts = [doc.strip(), f"\nOptions and their defaults (configs/{config}.yaml), each set as key=value:\n"]
    parts.append((configs / f"{config}.yaml").read_text().strip())
    groups = sorted(p for p in configs.iterdir() if p.is_dir() and p.name != "reproduce")
    if config == "config" and groups:
        parts.append("\nTo choose by name:")
        parts += [f"  {g.name + '=':12s} {', '.join(sorted(f.stem for f in g.glob('*.yaml')))}" for g in groups]
    return "\n".join(parts)


# ------------------------------------------------------------------------------------------------- values and their types
def check(cfg: DictConfig) -> None:
    """Refuse a configuration with a value of another type than the one that it replaces, or one that nothing can use.

    Raises `RunError` or ValueError, naming the key, before data is read."""
    flat = flatten(plain(cfg))
    if HydraConfig.initialized():
        check_types(cfg, list(HydraConfig.get().overrides.task), HydraConfig.get())
    check_values(flat)


def check_types(cfg: DictConfig, overrides: list[str], hydra_cfg: Any) -> None:
    """ValueError for an override whose value has another type than the one it replaces. A null takes anything; anything takes
    null, or another type, where one of the folder's own configurations gives it to that key. Whole numbers given for a text
    become text."""
    groups = set(hydra_cfg.runtime.choices)
    parsed = [
        o for o in OverridesParser.create().parse_overrides(overrides) if o.value() is not None or not o.is_delete()
    ]
    plain = [o for o in parsed if o.get_key_element().lstrip("+~") not in groups and o.key_or_group not in groups]
    plain = [o for o in plain if not o.is_add() and not o.is_delete()]
    if not plain:
        return
    chosen = [line for o, line in zip(parsed, overrides, strict=True) if o not in plain]
    before = compose(hydra_cfg.job.config_name, overrides=chosen)
    source = next((Path(s.path) for s in hydra_cfg.runtime.config_sources if s.provider == "main"), None)
    for o in plain:
        key = o.key_or_group
        old, new = OmegaConf.select(before, key), OmegaConf.select(cfg, key)
        if old is None or _fits(old, new):
            continue
        if any(_fits(other, new) for other in _given_elsewhere(source, key)):
            continue
        if isinstance(old, str) and isinstance(new, int | float) and not isinstance(new, bool):
            OmegaConf.update(cfg, key, str(new))
            continue
        raise ValueError(f"{key}={_shown(new)} must be {_kind(old)}, as its default {_shown(old)} is")


def _fits(old: Any, new: Any) -> bool:
    if old is None or new is None:
        return old is None and new is None
    if isinstance(old, bool) or isinstance(new, bool):
        return isinstance(old, bool) and isinstance(new, bool)
    if isinstance(old, int | float):
        whole = isinstance(old, float) or isinstance(new, int)
        return isinstance(new, int | float) and whole and math.isfinite(new)
    if isinstance(old, ListConfig | list):
        same = {type(x) for x in old}
        return isinstance(new, ListConfig | list) and (len(same) != 1 or all(_fits(old[0], x) for x in new))
    if isinstance(old, DictConfig | dict):
        return isinstance(new, DictConfig | dict)
    return isinstance(new, str)


def _given_elsewhere(configs: Path | None, key: str) -> list[Any]:
    """Every value that a configuration file of the folder gives to `key`, those that a sweep goes through included."""
    found = []
    for file in configs.rglob("*.yaml") if configs else ():
        text = file.read_text()
        if key.rpartition(".")[2] not in text:  # as YAML, all of them take longer than all else before the first image
            continue
        node: Any = yaml.load(text, Loader=_Loader) or {}
        group = file.parent.relative_to(configs).as_posix()  # type: ignore[arg-type]
        for name in {key, key.removeprefix(f"{group}.")}:
            value = node
            for part in name.split("."):
                value = value.get(part, ...) if isinstance(value, Mapping) else ...
            if value is not ... and not (isinstance(value, str) and "${" in value):
                found.append(value)
        swept = OmegaConf.select(OmegaConf.create(node), "hydra.sweeper.params") or {}
        found += [yaml.safe_load(choice) for choice in str(swept[key]).split(",")] if key in swept else []
    return found


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a whole number" if isinstance(value, int) else "a finite number"
    return (
        "a list"
        if isinstance(value, ListConfig | list)
        else "a mapping"
        if isinstance(value, Mapping | DictConfig)
        else "a text"
    )


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def check_values(flat: Mapping[str, Any]) -> None:
    """ValueError for a value outside `LIMITS`. flat: {dotted key: value}."""
    for key, value in flat.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{key}={value} must be a finite number")
        if value is None or isinstance(value, bool | list):
            continue
        for pattern, (low, high) in LIMITS.items():
            if not fnmatch.fnmatch(key, pattern):
                continue
            if not isinstance(value, int | float):  # its default is null, which takes anything
                raise ValueError(f"{key}={value} must be a number")
            if (low is not None and value < low) or (high is not None and value > high):
                allowed = f">= {low:g}" if high is None else f"{low:g} .. {high:g}"
                raise ValueError(f"{key}={value}, allowed: {allowed}")
    for key in ("run_root", "scale", "arm"):
        if key in flat and "run_root" in flat and (not isinstance(flat[key], str) or not flat[key].strip()):
            raise ValueError(f"{key}={_shown(flat[key])} must be a text that is not empty: it names a directory")
    for key in ("scale", "arm"):
        if key in flat and (".." in Path(flat[key]).parts or Path(flat[key]).is_absolute()):
            raise ValueError(f"{key}={flat[key]} must stay below run_root")


def override(key: str, value: str | Path) -> str:
    """`key=value` for Hydra, whatever is in the value: blanks, brackets, '=', ',', quotes, '~'."""
    text = str(value)
    if "/" in text and re.fullmatch(r"[\w./+-]+", text, re.ASCII):
        return f"{key}={text}"
    escaped = re.sub(r"(\\*)'", lambda m: 2 * m[1] + "\\'", text)  # a backslash counts only before a quote
    tail = len(escaped) - len(escaped.rstrip("\\"))
    return f"{key}='{escaped}{tail * chr(92)}'".replace("${", "\\${")


def nearest(name: str, known: list[str]) -> str:
    """'; did you mean x?' for the closest of the known names, or nothing."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


# --------------------------------------------------------------------------------------------- names of run directories
def run_name(*leave_out: str, _root_: DictConfig) -> str:
    """`<arm>/[<overrides>/]seed<k>` of the run that Hydra composes: the resolver `run_name` of configs/*.yaml.

    leave_out: keys that the arm or the seed stand for already, e.g. ${run_name:method}."""
    hydra_cfg = _root_.hydra
    stated = ("seed", "scale", "arm", *leave_out)
    parts = []
    for o in OverridesParser.create().parse_overrides(list(hydra_cfg.overrides.task)):
        key = o.key_or_group
        silent = any(key == k or key.startswith(f"{k}.") for k in NOT_IN_FINGERPRINT)
        if silent or key in stated or key.startswith("reproduce/"):
            continue
        parts.append(f"{key}={'' if o.is_delete() else o.get_value_element_as_str()}")
    name = arm_name("/".join([_root_.arm, ",".join(sorted(parts))] if parts else [_root_.arm]))
    return f"{name}/seed{_root_.seed}"


def arm_name(arm: str) -> str:
    """An arm and its overrides as they stand in a path: `bil/method.loss.mode=renorm,w=1` -> `bil/method.loss.mode-renorm+w-1`.

    Nothing in it means anything to Hydra's grammar or to a shell, so `weights=<path>` works unquoted. A value that is a path,
    and what is longer than a file name may be, is replaced by a short hash. Applied to its own result it changes nothing."""
    head, slash, overrides = arm.partition("/")
    if not slash or "=" not in overrides:
        return arm
    parts = []
    for part in re.split(r",(?=[\w./@+~]+=)", overrides):
        key, _, value = part.partition("=")
        value = value.strip("\"'")
        if "/" in value or value.startswith("~"):
            value = hashlib.sha256(value.encode()).hexdigest()[:8]
        parts.append(f"{_plain(key)}-{_plain(value)}")
    name = "+".join(parts)
    if len(name) > 160:
        name = f"{name[:140]}.{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return f"{head}/{name}"


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.@+-]+", "_", text).strip("_") if not re.fullmatch(r"[\w.]*", text) else text


OmegaConf.register_new_resolver("run_name", run_name, replace=True)
