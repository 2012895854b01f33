"""Score one's own aligned faces with a checkpoint of train.py: any subset of sensors, with the threshold of that subset.

python predict.py weights=runs/default/fmvit/seed0/last.ckpt folders.rgb=faces/rgb folders.ir=faces/ir out=scores.csv
Images of the modalities are joined by file name without its ending; those without a counterpart are named and left out.
"""

import csv
import json
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig
from torch.utils.data import DataLoader
from torchvision.datasets.folder import IMG_EXTENSIONS

from common import runs
from fm_vit.evaluate import load
from fm_vit.protocols import Frames
from fm_vit.triplets import Triplets, unpack


def join(folders: dict[str, Path]) -> Frames:
    """The files that every folder has. FileNotFoundError for a folder that is missing, ValueError if nothing is shared."""
    found = {}
    for m, folder in folders.items():
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {folder} (folders.{m})")
        found[m] = {p.stem: p for p in sorted(folder.iterdir()) if p.suffix.lower() in IMG_EXTENSIONS}
    common = sorted(set.intersection(*(set(f) for f in found.values())))
    if not common:
        raise ValueError(f"the folders of {', '.join(folders)} share no file name")
    for name in sorted(set.union(*(set(f) for f in found.values())) - set(common)):
        print(f"left out, not in every folder: {name}")
    return Frames([{m: found[m][name] for m in folders} for name in common], [False] * len(common))


@torch.no_grad()
def score(cfg: DictConfig) -> Path:
    """Writes cfg.out and returns its path; see configs/predict.yaml."""
    model, trained, modalities = load(cfg.weights)
    given = {m: Path(folder).expanduser() for m, folder in cfg.folders.items() if folder is not None}
    if not given or (unknown := [m for m in given if m not in model.modalities]):
        raise ValueError(
            f"folders: give one or more of {', '.join(model.modalities)}" + (f", not {unknown}" if given else "")
        )
    names = [m for m in modalities if m in given]
    frames = join({m: given[m] for m in names})
    tag, threshold = "_".join(names), cfg.threshold
    if threshold is None:
        table = runs.read_json(Path(cfg.weights).expanduser().with_name("thresholds.json"))
        if table is None or tag not in table:
            raise ValueError(f"no threshold of {tag} beside {cfg.weights}: give threshold=")
        threshold = table[tag]
    samples = Triplets(frames, names, size=trained.data.size, train=False, depth_max=cfg.depth_max)
    fabric = runs.launch(cfg.fabric)
    wrapped = fabric.setup_module(model)
    rows: list[float] = []
    for packed, _ in DataLoader(samples, batch_size=cfg.batch_size, num_workers=cfg.workers):
        rows += model.score(wrapped(unpack(packed.to(fabric.device), names))).tolist()
    out = Path(cfg.out)
    with out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["name", "liveness", "decision"])
        for paths, value in zip(frames.paths, rows, strict=True):
            writer.writerow([paths[names[0]].stem, f"{value:.6f}", "live" if value >= threshold else "attack"])
    accepted = sum(value >= threshold for value in rows)
    print(json.dumps({"samples": len(rows), "modalities": names, "threshold": threshold, "live": accepted}))
    return out


@hydra.main(version_base="1.3", config_path="configs", config_name="predict")
def main(cfg: DictConfig) -> None:
    score(cfg)


if __name__ == "__main__":
    main()
