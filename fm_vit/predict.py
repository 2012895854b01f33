"""Score one's own aligned faces with a checkpoint of train.py: any subset of sensors, with the threshold of that subset.

python predict.py weights=runs/default/fmvit/seed0/last.ckpt images=faces/rgb out=scores.csv
python predict.py weights=... images=faces/rgb also.ir=faces/ir missing=use
python predict.py weights=... images=faces/ir sensor=ir
Images of several sensors are joined by their names below their folders.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from omegaconf import DictConfig
from torch.utils.data import DataLoader, Dataset

from common.data.files import ImageStream, Table, find_images
from common.loop import Loaded
from common.scripts import script
from fm_vit.checkpoint import load
from fm_vit.losses import subsets
from fm_vit.protocols import Frames, join_names
from fm_vit.triplets import Triplets, unpack

Sample = dict[str, Path]


class _Decoded(Dataset):
    def __init__(self, samples: Sequence[Sample], pack: Triplets):
        self.samples, self.pack = samples, pack

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> tuple[Sample, Any, str]:
        try:
            return self.samples[i], self.pack.pack(self.samples[i]), ""
        except (OSError, ValueError) as error:
            return self.samples[i], None, str(error)


class SampleStream(ImageStream):
    """`ImageStream` of samples that have a file per sensor."""

    def __init__(self, samples: Sequence[Sample], pack: Triplets, *, batch_size: int, workers: int):
        self.broken, self.done = [], 0
        self.loader = DataLoader(
            _Decoded(samples, pack), batch_size=batch_size, num_workers=workers, collate_fn=list,  # type: ignore[arg-type]
        )  # fmt: skip


def find_samples(cfg: DictConfig, modalities: Sequence[str]) -> dict[tuple[str, ...], list[Sample]]:
    """{subset of the sensors: samples of it}. One sensor: everything that images= names; several: folders joined by name, where
    missing=skip leaves out what a folder lacks, and missing=use scores it by the sensors that it has."""
    sensor = cfg.sensor or modalities[0]
    also = {m: str(folder) for m, folder in cfg.also.items() if folder is not None}
    if unknown := [m for m in (sensor, *also) if m not in modalities]:
        raise ValueError(f"sensor, also: this network has {', '.join(modalities)}, not {', '.join(unknown)}")
    if sensor in also:
        raise ValueError(f"also.{sensor}={also[sensor]}: the images of {sensor} are those of images={cfg.images}")
    if not also:
        return {(sensor,): [{sensor: path} for path in find_images(cfg.images)]}
    if not isinstance(cfg.images, str) or not Path(cfg.images).expanduser().is_dir():
        raise ValueError(f"images={cfg.images}: images of several sensors are joined by name, give a folder")
    folders = {sensor: Path(cfg.images).expanduser()} | {m: Path(f).expanduser() for m, f in also.items()}
    folders = {m: folders[m] for m in modalities if m in folders}
    whole, alone = join_names(folders)
    found = {tuple(folders): whole}
    if cfg.missing == "use":
        taken = {path for sample in whole for path in sample.values()}
        for names in reversed(subsets(list(folders))[:-1]):
            try:
                samples, _ = join_names({m: folders[m] for m in names})
            except ValueError:  # nothing shared
                continue
            fresh = [s for s in samples if not taken & set(s.values())]
            found[names] = fresh
            taken |= {path for sample in fresh for path in sample.values()}
    else:
        for name in alone:
            print(f"left out, not in every folder: {name}", file=sys.stderr)
    return {names: samples for names, samples in found.items() if samples}


def threshold_of(trained: Loaded, names: Sequence[str], given: float | None) -> float:
    """The threshold of a subset of the sensors. ValueError where the checkpoint has none and none is given."""
    known: Mapping[str, float] = trained.about["thresholds"] or {}
    if given is not None:
        return given
    if "_".join(names) not in known:
        raise ValueError(
            f"the checkpoint has no threshold of {', '.join(names)} (its training has not ended): give threshold="
        )
    return known["_".join(names)]


@torch.no_grad()
def score(cfg: DictConfig, fabric: Fabric) -> Path:
    """Writes cfg.out and returns its path; see configs/predict.yaml."""
    if cfg.missing not in ("skip", "use"):
        raise ValueError(f"missing={cfg.missing!r}, allowed: skip, use")
    trained = load(cfg.weights)
    about = trained.about
    look = {
        "size": about["size"],
        "outline_only": about["outline_only"],
        "depth_max": cfg.depth_max or about["depth_max"],
    }
    mean, std = about["normalise"]["mean"][0], about["normalise"]["std"][0]
    groups = find_samples(cfg, about["modalities"])
    thresholds = {names: threshold_of(trained, names, cfg.threshold) for names in groups}
    model = fabric.setup_module(trained.model)
    streams = []
    with Table(cfg.out) as table:
        for names, samples in groups.items():
            pack, accepted = Triplets(Frames(), names, train=False, **look), 0
            stream = SampleStream(samples, pack, batch_size=cfg.batch_size, workers=cfg.workers)
            for files, packed in stream:
                images = unpack(packed.to(fabric.device), names, mean=mean, std=std)
                for sample, value in zip(files, trained.model.score(model(images)).tolist(), strict=True):  # type: ignore[operator]
                    live = value >= thresholds[names]
                    accepted += live
                    table.write({
                        "path": sample[names[0]], "sensors": "+".join(names), "liveness": f"{value:.6f}",
                        "threshold": f"{thresholds[names]:.6f}", "decision": about["classes"][int(live)],
                    })  # fmt: skip
            print(f"{'+'.join(names)}: {stream.done} samples, {accepted} live at {thresholds[names]:.6f}: {table.out}")
            streams.append(stream)
    finish(streams)
    return table.out


def finish(streams: Sequence[ImageStream]) -> None:
    """Lists what could not be read of all streams; SystemExit(1) if there is anything."""
    first, *others = streams
    for other in others:
        first.broken += other.broken
        first.done += other.done
    first.finish()


main = script("predict", score)


if __name__ == "__main__":
    main()
