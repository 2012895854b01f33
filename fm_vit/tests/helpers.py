"""Configurations of the tests, and tiny data in the layouts of the real sets."""

from pathlib import Path

import numpy as np
from hydra import compose, initialize_config_dir
from PIL import Image

PAPER = Path(__file__).resolve().parents[1]
CONFIGS = PAPER / "configs"
SHORT = [
    "train.epochs=2",
    "train.batch_size=16",
    "data.train=48",
    "data.validation=32",
    "data.test=48",
    "train.save_every=1",
]


def config(*overrides, name="config"):
    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
        return compose(name, overrides=list(overrides))


def short(*overrides):
    return config("arm=test", *SHORT, *overrides)


def picture(path: Path, seed: int, *, size=(30, 26), mode="RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    if mode == "I;16":
        Image.fromarray(rng.integers(1, 4000, size, dtype=np.uint16)).save(path)
        return
    Image.fromarray(rng.integers(1, 255, (*size, 3) if mode == "RGB" else size, dtype=np.uint8)).save(path)


def write_triplets(root: Path, *, subjects=4, frames=2) -> None:
    """CASIA-SURF: {split}_list.txt with rows "rgb depth ir label"; every subject once live, once attacked."""
    for k, split in enumerate(("train", "val", "test")):
        rows = []
        for s in range(subjects):
            for label, part in ((1, "real_part"), (0, "fake_part")):
                for f in range(frames):
                    clip = f"{split}/{part}/CLKJ_AS{k}{s:03d}/v"
                    names = [f"{clip}/{m}/{f}.png" for m in ("color", "depth", "ir")]
                    for i, name in enumerate(names):
                        picture(root / name, 1000 * k + 100 * s + 10 * f + i, mode="RGB" if i == 0 else "L")
                    rows.append(" ".join([*names, str(label)]))
        (root / f"{split}_list.txt").write_text("\n".join(rows) + "\n")


def write_videos(root: Path, *, live_label=0) -> None:
    """Lists of video folders: "<video>/color label"; the infrared frames of every second video lack one. Names as in CeFA."""
    for k, split in enumerate(("train", "val", "test")):
        rows = []
        for s in range(4):
            live = s % 2 == 0
            video = f"CASIA_CeFA/Ethnicity/AF/AF-{k}{s:02d}/1_{k}{s:02d}_1_1_{1 if live else 4}"
            for i, folder in enumerate(("color", "depth", "ir")):
                for f in range(3 if folder != "ir" or live else 2):
                    picture(root / video / folder / f"frame_{f:04d}.jpg", 100 * k + 10 * s + f + i)
            rows.append(f"{video}/color {live_label if live else 1 - live_label}")
        (root / f"{split}_list.txt").write_text("\n".join(rows) + "\n")


LISTS = "data.lists={train: train_list.txt, validation: val_list.txt, test: test_list.txt}"
COPY = ["data.expected=null", LISTS, "data.workers=0"]  # another copy than the published one


def write_own(root: Path, *, modalities=("rgb", "depth", "ir"), people=3) -> None:
    """One's own folders: <split>/<live|print|mask>/<modality>/person<k>.png, with what editors leave behind."""
    for k, split in enumerate(("train", "val", "test")):
        for c, name in enumerate(("live", "print", "mask")):
            for i, m in enumerate(modalities):
                for p in range(people):
                    file = root / split / name / m / f"person{k}{p}.{'png' if i == 0 else 'jpg'}"
                    picture(file, 100 * k + 10 * p + c, mode="RGB" if i == 0 else "L")
            (root / split / name / ".DS_Store").write_bytes(b"x")
        (root / split / ".ipynb_checkpoints").mkdir()
