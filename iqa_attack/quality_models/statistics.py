"""The models that are fitted and not trained, or published: BRISQUE, CORNIA, NIQE."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from iqa_attack.photographs.images import from_bytes
from iqa_attack.photographs.photos import QualitySet, scenes
from iqa_attack.quality_models.brisque import Brisque, fit_brisque, load_brisque
from iqa_attack.quality_models.cornia import Cornia, fit_cornia
from iqa_attack.quality_models.niqe import Niqe, fit_niqe, load_niqe

FITTING = {  # keys of the fit; the others are the model's own
    "brisque": {"c": 0.0, "gamma": 0.0, "epsilon": 0.0}, "cornia": {"c": 0.0, "codebook_patches": 1}, "niqe": {"sharpest": 0.0},
}  # fmt: skip
MODELS = {"brisque": Brisque, "cornia": Cornia, "niqe": Niqe}
READERS = {"brisque": load_brisque, "niqe": load_niqe}


def published(options: Mapping[str, Any], root: str | None) -> Path:
    """The file of published parameters, relative to the data's root."""
    return Path(root or "").expanduser() / Path(str(options["file"])).expanduser()


def check_statistics(name: str, options: Mapping[str, Any], root: str | None = None) -> None:
    """ValueError or TypeError for an option that the model or its fit does not have, FileNotFoundError for published parameters
    that are not there, before anything is read."""
    if options.get("file") and not (path := published(options, root)).is_file():
        raise FileNotFoundError(f"statistics.{name}.file: no published parameters {path}")
    own = own_options(name, options)
    MODELS[name](**own, **({"support": 1} if name == "brisque" else {}))
    for key, low in FITTING[name].items():
        if key in options and not options[key] >= low:
            raise ValueError(f"statistics.{name}.{key}={options[key]}, allowed: >= {low:g}")


def own_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that belong to the model itself and not to its fit or its file."""
    return {k: v for k, v in options.items() if k not in FITTING[name] and (k != "file" or name not in READERS)}


@torch.no_grad()
def fit_statistics(
    name: str, data: QualitySet, options: Mapping[str, Any], *, seed: int, split: Mapping[str, Any]
) -> nn.Module:
    """BRISQUE or CORNIA on the training images; NIQE on the pristine photographs of the split (the node `data`).

    BRISQUE and NIQE with an option `file`: the published parameters in that file (relative to the data's root) and no fit."""
    if options.get("file"):
        return READERS[name](published(options, split["root"]), **own_options(name, options))
    options = {k: v for k, v in options.items() if k != "file"}
    if name == "niqe":
        keys = {"test": split["test_photos"], "reduce": split["reduce"], "size": split["size"]}
        pristine = scenes(split["root"], seed, **keys)[0]
        return fit_niqe([from_bytes(torch.from_numpy(p.copy()).permute(2, 0, 1)) for p in pristine], **options)
    if name == "brisque":
        reader = Brisque(support=1, **own_options(name, options)).eval()
        features = torch.cat([reader.features(from_bytes(data.image(i))[None]) for i in range(len(data))])
        return fit_brisque(features, data.mos, **options)
    return fit_cornia(data.stack(), data.mos, seed=seed, **options)
