"""Tiny data sets in the layouts in which people have the real ones, and short configurations to train on."""

import pickle
import struct
from pathlib import Path

import numpy as np
from hydra import compose, initialize_config_dir
from PIL import Image

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SHORT = ["train.epochs=3", "train.save_every=1", "train.batch_size=32", "schedule.warmup=1"]
DIGITS = ["data.n_max=40", "data.imbalance=4"]


def short_config(*overrides):
    """The embedded default, three epochs on fewer digits; on class folders with data=folder among the overrides."""
    digits = [] if "data=folder" in overrides else DIGITS
    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
        return compose("config", overrides=[*SHORT, *digits, "arm=test", *overrides])


def folder_arm(root):
    """NCL++ with layer norm (no batch statistics), on class folders, with the ImageNet augmentation."""
    return [
        "data=folder", f"data.root={root}", "data.size=32", "data.workers=0", "train.batch_size=8", "model=timm",
        "model.backbone=test_convnext", "model.head=linear", "optim.lr=0.01", "method=nclpp", "method.copies=2",
        "method.loss.hard=2",
    ]  # fmt: skip


def write_image(path, value=128, size=40):
    """A square of noise, decided by `value`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(value).integers(0, 255, (size, size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


def write_cifar(root, name):
    """The files torchvision expects, 20 tiny batches of random images."""
    rng = np.random.default_rng(0)
    base, key, classes = (
        ("cifar-10-batches-py", b"labels", 10) if name == "cifar10" else ("cifar-100-python", b"fine_labels", 100)
    )
    files = {"cifar10": [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], "cifar100": ["train", "test"]}[name]
    (root / base).mkdir(parents=True)
    for file in files:
        n = 200
        batch = {b"data": rng.integers(0, 255, (n, 3072), dtype=np.uint8), key: [i % classes for i in range(n)]}
        (root / base / file).write_bytes(pickle.dumps({k.decode(): v for k, v in batch.items()}))
    meta = {"label_names": [str(i) for i in range(10)], "fine_label_names": [str(i) for i in range(100)]}
    (root / base / ("batches.meta" if name == "cifar10" else "meta")).write_bytes(pickle.dumps(meta))


def write_mnist(root):
    raw = root / "MNIST/raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 200), ("t10k", 50)):
        images = np.random.default_rng(0).integers(0, 255, (n, 28, 28), dtype=np.uint8)
        labels = np.arange(n, dtype=np.uint8) % 10
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, n, 28, 28) + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, n) + labels.tobytes())


def write_class_folders(root, splits, classes, **options):
    """root/<split>/<class>/<i>.png; splits: {split: images per class}."""
    for split, per_class in splits.items():
        for c, name in enumerate(classes):
            for i in range(per_class):
                write_image(Path(root) / split / name / f"{i}.png", value=1000 * c + i, **options)


def write_lists(root, names, classes=3, per_class=6):
    """Images under root/train/<class>/ and the lists "relative/path label" that name them; names: {split: file}."""
    for s, file in enumerate(names.values()):
        rows = []
        for c in range(classes):
            for i in range(per_class):
                path = f"train/n{c:08d}/{s}_{i}.JPEG"
                write_image(Path(root) / path, value=100 * s + 10 * c + i, size=48)
                rows.append(f"{path} {c}")
        (Path(root) / file).write_text("\n".join(rows) + "\n")
