"""A checkpoint in the form in which people exchange weights: a folder with model.safetensors, config.json and a model card.

python export.py weights=runs/default/nclpp/seed0/last.ckpt out=my-model/        a name that ends in a slash
python predict.py weights=my-model images=photos/                                and `load("my-model")` in Python

Tensors go into model.safetensors, everything else (configuration, classes, normalisation) into config.json; the optimizer stays
behind. README.md says what the network is, what was measured, how to use it and how it differs from the paper.
"""

import functools
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
LEFT_BEHIND = ("optimizer", "learning")  # what only a run needs to go on
TENSOR = "__tensor__"  # {TENSOR: name} in config.json stands for a tensor of model.safetensors
NUMBERED = "__numbered__"  # {NUMBERED: {"0": ...}} for a dictionary whose keys are whole numbers


def publishable(export: Callable[..., Any]) -> Callable[..., Any]:
    """An export script that writes the folder when `out` ends in a slash, and does its own work otherwise."""

    @functools.wraps(export)
    def wrapped(cfg: DictConfig, *rest: Any) -> Any:
        if not str(cfg.out).endswith(("/", os.sep)):
            return export(cfg, *rest)
        paper = Path(sys.modules[export.__module__].__file__ or ".").resolve().parent
        return publish(cfg.weights, cfg.out, paper)

    return wrapped


def publish(weights: str | Path, out: str | Path, paper: Path) -> Path:
    """Writes the folder `out` of a checkpoint of train.py (or a packed file) of the folder `paper`, reads it back and compares.

    ValueError for weights that do not say what they are, for a folder that holds something else, or where JSON would change a
    value; nothing is left then."""
    from common.runs import load_checkpoint  # it reads such folders, too

    weights, out = Path(weights).expanduser(), Path(out).expanduser()
    found = load_checkpoint(weights)
    if not isinstance(found, Mapping) or not {"config", "about"} <= found.keys():
        raise ValueError(
            f"{weights} does not say its configuration and classes: give a checkpoint of {paper.name}/train.py"
        )
    if out.exists() and not (out.is_dir() and {p.name for p in out.iterdir()} <= {WEIGHTS, CONFIG, CARD}):
        raise ValueError(f"{out} exists and holds something else: name a new folder")
    kept = {k: v for k, v in found.items() if k not in LEFT_BEHIND}
    tensors: dict[str, Tensor] = {}
    plain = {"paper": paper.name, "checkpoint": _split(kept, "", tensors)}
    beside = out.with_name(f".{out.name}.tmp")
    try:
        beside.mkdir(parents=True, exist_ok=True)
        save_file(tensors, beside / WEIGHTS, metadata={"format": "pt"})
        (beside / CONFIG).write_text(json.dumps(plain, indent=1) + "\n")
        if not _equal(read(beside), kept):
            raise ValueError(f"{weights} holds something that {CONFIG} cannot keep")
        (beside / CARD).write_text(card(weights, kept, paper))
        out.mkdir(exist_ok=True)
        for name in (WEIGHTS, CONFIG, CARD):
            os.replace(beside / name, out / name)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    size = (out / WEIGHTS).stat().st_size
    print(
        f"{out}/: {WEIGHTS} ({len(tensors)} tensors, {size / 1e6:.3f} MB), {CONFIG} and a model card; weights={out} reads it"
    )
    return out


def read(folder: str | Path) -> dict[str, Any]:
    """The checkpoint of a published folder, on the CPU. FileNotFoundError or ValueError name what is missing or broken."""
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"no checkpoint at {folder.absolute()}: a folder of weights holds {CONFIG} and {WEIGHTS}"
            )
    try:
        tensors = load_file(folder / WEIGHTS)
        content = json.loads((folder / CONFIG).read_text())["checkpoint"]
        return _join(content, tensors)
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: {CONFIG} and {WEIGHTS} are damaged or of something else ({error!r})") from error


def _split(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON has it; its tensors go into `tensors` under the way to them, 'model.head.weight'."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {TENSOR: name}
    if isinstance(value, Mapping):
        numbered = bool(value) and all(type(k) is int for k in value)
        if not numbered and (wrong := [k for k in value if not isinstance(k, str)]):
            raise ValueError(
                f"{name or 'the checkpoint'}: keys like {wrong[0]!r} are no text, which {CONFIG} cannot keep"
            )
        found = {str(k): _split(v, f"{name}.{k}" if name else str(k), tensors) for k, v in value.items()}
        return {NUMBERED: found} if numbered else found
    if isinstance(value, list | tuple):
        return [_split(v, f"{name}.{i}", tensors) for i, v in enumerate(value)]
    return value


def _join(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {TENSOR}:
            return tensors[value[TENSOR]]
        if value.keys() == {NUMBERED}:
            return {int(k): _join(v, tensors) for k, v in value[NUMBERED].items()}
        return {k: _join(v, tensors) for k, v in value.items()}
    return [_join(v, tensors) for v in value] if isinstance(value, list) else value


def _equal(a: Any, b: Any) -> bool:
    """Whether two checkpoints hold the same; a tuple is a list."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        same = isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape
        return same and torch.equal(
            a.nan_to_num() if a.is_floating_point() else a, b.nan_to_num() if b.is_floating_point() else b
        )
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a == b or (a != a and b != b)


# ---------------------------------------------------------------------------------------------------------- the model card
def card(weights: Path, checkpoint: Mapping[str, Any], paper: Path) -> str:
    """The model card: what it is, what was measured (result.json beside a last.ckpt), how to use it, how it differs."""
    from common.metrics.site import section

    readme = (paper / "README.md").read_text() if (paper / "README.md").is_file() else f"# {paper.name}\n"
    title = readme.splitlines()[0].removeprefix("# ")
    about, config = checkpoint["about"], checkpoint["config"]
    inside = ", ".join(f"{k} ({n})" for k, n in _tensors(checkpoint).items())
    facts = [
        f"- {k}: {_short(about[k])}" for k in ("classes", "channels", "size", "normalise") if about.get(k) is not None
    ]
    parts = [
        f"---\nlibrary_name: pytorch\ntags: [{paper.name}, reproduction]\n---",
        f"# {paper.name}: a network of \"{title}\"",
        f"A reproduction, not the authors' weights. Trained with scale `{config.get('scale')}`, arm `{config.get('arm')}`, seed "
        f"{config.get('seed')}; `{CONFIG}` has the whole configuration.",
        "\n".join([*facts, f"- tensors: {inside}"]), "## Measured", _measured(weights, paper), "## Use",
        f"From the folder `{paper.name}` of the repository that wrote this (`common/hub.py` reads both files):",
        "```bash\npython evaluate.py weights=<this folder>\npython predict.py weights=<this folder> images=<photos>\n```\n\n"
        f"```python\nfrom {paper.name}.checkpoint import load\n\nmodel, config, about = load(\"<this folder>\")\n```",
    ]  # fmt: skip
    for heading in ("Deviations", "Not verified"):
        if text := section(readme, heading):
            parts += [f"## {heading}", text]
    parts.append(
        "## Licence\nThe code is Apache-2.0. State here what the licence of the training images allows for these weights."
    )
    return "\n\n".join(parts) + "\n"


def _tensors(checkpoint: Mapping[str, Any]) -> dict[str, int]:
    """How many tensors each part of a checkpoint holds."""
    counts: dict[str, int] = {}
    for part, value in checkpoint.items():
        tensors: dict[str, Tensor] = {}
        _split(value, part, tensors)
        counts |= {part: len(tensors)} if tensors else {}
    return counts


def _measured(weights: Path, paper: Path) -> str:
    from common.metrics import tables
    from common.metrics.claims import load_document

    file = weights.with_name("result.json")
    if weights.name != "last.ckpt" or not file.is_file():
        return "Nothing that belongs to these weights alone is on record; `evaluate.py` measures."
    result = json.loads(file.read_text())
    words = load_document(paper)["metrics"] if (paper / "claims.yaml").is_file() else {}
    numbers = {k: v for k, v in (result.get("metrics") or {}).items() if isinstance(v, int | float)}
    named = {k: v for k, v in numbers.items() if k in words} or numbers
    rows = [
        [words.get(k, {"says": k})["says"], tables.number(v), words.get(k, {"unit": ""})["unit"]]
        for k, v in named.items()
    ]
    data, versions = result.get("data") or {}, result.get("versions") or {}
    kind, commit = _short(data.get("kind", "unknown")), str(result.get("commit"))[:12]
    note = f"Data: {kind}; commit {commit}; torch {versions.get('torch', 'unknown')}."
    return (
        f"{tables.markdown(['metric', 'value', 'unit'], rows)}\n\n{note}"
        if rows
        else f"The run is {result.get('status')}."
    )


def _short(value: Any, most: int = 20) -> str:
    if isinstance(value, list | tuple) and len(value) > most:
        return f"{len(value)}: {', '.join(map(str, value[:most]))}, ..."
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
