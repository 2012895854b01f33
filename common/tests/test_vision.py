import struct

import numpy as np
import pytest
import torch
from PIL import Image

from common.data.vision import (
    KNOWN,
    data_root,
    image_folder,
    image_list,
    in_memory,
    open_image,
    torchvision_set,
)


def _idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(header + array.tobytes())


@pytest.fixture
def mnist(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, n in (("train", 7), ("t10k", 3)):
        _idx(raw / f"{part}-images-idx3-ubyte", rng.integers(0, 256, (n, 28, 28), dtype=np.uint8))
        _idx(raw / f"{part}-labels-idx1-ubyte", np.arange(n, dtype=np.uint8))
    return tmp_path


def _picture(path, colour, size=(4, 3)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def test_data_root(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "sets").mkdir()
    assert data_root("~/sets") == tmp_path / "sets"
    for unset in (None, "", " "):
        with pytest.raises(ValueError, match=r"data\.root is not set"):
            data_root(unset)
    with pytest.raises(FileNotFoundError, match="no folder"):
        data_root("~/other")


def test_mnist_reads_and_decodes(mnist):
    train, test = torchvision_set("mnist", mnist), torchvision_set("mnist", mnist, train=False)
    assert (len(train), len(test)) == (7, 3)
    images, targets = in_memory(train)
    assert images.shape == (7, 1, 28, 28) and images.dtype == torch.uint8
    assert targets.tolist() == list(range(7)) and targets.dtype == torch.int64
    assert np.array_equal(images[4, 0].numpy(), np.asarray(train[4][0]))


@pytest.mark.parametrize("name", KNOWN)
def test_missing_files_one_error_with_layout_and_remedy(name, tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        torchvision_set(name, tmp_path)
    for part in (str(tmp_path / KNOWN[name].layout[0]), "Expected under", "data.download=true", KNOWN[name].layout[-1]):
        assert part in str(error.value)
    assert "download failed" not in str(error.value)  # none was asked for


def test_zipped_files_are_pointed_at(mnist):
    raw = mnist / "MNIST" / "raw"
    (raw / "train-images-idx3-ubyte").rename(raw / "train-images-idx3-ubyte.gz")
    with pytest.raises(FileNotFoundError, match="gunzip -k"):
        torchvision_set("mnist", mnist)


def test_corrupt_files_are_a_value_error(mnist, tmp_path):
    (mnist / "MNIST" / "raw" / "train-labels-idx1-ubyte").write_bytes(b"broken")
    with pytest.raises(ValueError, match="corrupt"):
        torchvision_set("mnist", mnist)
    for file in KNOWN["cifar10"].layout:  # present, but not the files whose checksums torchvision knows
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(b"x")
    with pytest.raises(ValueError, match=r"corrupt.*cifar-10-batches-py"):
        torchvision_set("cifar10", tmp_path)


def test_failed_download_names_layout(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no route to host")

    monkeypatch.setattr(KNOWN["mnist"].reader, "download", fail)
    with pytest.raises(FileNotFoundError, match=r"Expected under.*\n.*\nThe download failed: no route"):
        torchvision_set("mnist", tmp_path / "new", download=True)


def test_unknown_set_lists_choices(tmp_path):
    with pytest.raises(ValueError, match="choose from mnist"):
        torchvision_set("mnits", tmp_path)


def test_image_folder(tmp_path):
    _picture(tmp_path / "train" / "cat" / "a.png", (255, 0, 0))
    _picture(tmp_path / "train" / "ant" / "b.png", (0, 255, 0))
    data = image_folder(tmp_path, "train")
    assert data.classes == ["ant", "cat"]
    images, targets = in_memory(data)
    assert images.shape == (2, 3, 3, 4) and targets.tolist() == [0, 1]
    assert images[1, :, 0, 0].tolist() == [255, 0, 0]
    with pytest.raises(FileNotFoundError, match=r"val.*one folder per class"):
        image_folder(tmp_path, "val")
    (tmp_path / "train" / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty"):
        image_folder(tmp_path, "train")


def test_corrupt_image_is_named(tmp_path):
    _picture(tmp_path / "a" / "good.png", (1, 2, 3), size=(64, 64))
    whole = (tmp_path / "a" / "good.png").read_bytes()
    for name, content in (("cut.png", whole[: len(whole) // 2]), ("text.jpg", b"no image"), ("none.png", b"")):
        (tmp_path / "a" / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"cannot decode image .*{name}"):
            open_image(tmp_path / "a" / name)
    with pytest.raises(ValueError, match=r"cut\.png"):
        in_memory(image_folder(tmp_path))
    with pytest.raises(FileNotFoundError, match="gone"):
        open_image(tmp_path / "gone.png")


@pytest.mark.parametrize(
    ("name", "text", "prefix"),
    [
        ("l.txt", "x/a b.png 3\n\ny/c.png 0\n", None),
        ("l.txt", "/old/place/x/a b.png 3\n/old/place/y/c.png 0\n", "/old/place"),
        ("l.csv", 'path,label\n"x/a b.png",3\ny/c.png,0\n', None),
        ("l.csv", "x/a b.png,3\ny/c.png,0\n", None),
        (
            "l.json",
            '{"annotations": [{"fpath": "/old/x/a b.png", "category_id": 3, "im_height": 3}, '
            '{"fpath": "/old/y/c.png", "category_id": 0}], "num_classes": 5}',
            "/old/",
        ),
    ],
)
def test_lists(tmp_path, name, text, prefix):
    _picture(tmp_path / "data" / "x" / "a b.png", (9, 8, 7))
    _picture(tmp_path / "data" / "y" / "c.png", (0, 0, 0))
    (tmp_path / name).write_text(text)
    data = image_list(tmp_path / name, tmp_path / "data", strip_prefix=prefix)
    assert data.targets == [3, 0]
    assert data.num_classes == (5 if name.endswith("json") else 4)
    image, label = data[0]
    assert label == 3 and image.getpixel((0, 0)) == (9, 8, 7)


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("l.txt", "a.png 1\na.png\n", "line 2"),
        ("l.txt", "a.png -1\n", "line 1.*-1.*>= 0"),
        ("l.txt", "a.png 1.5\n", "line 1"),
        ("l.txt", "", "names no image"),
        ("l.csv", "a.png,1,2\n", "two columns"),
        ("l.json", '{"annotations": [{"fpath": "a.png"}], "num_classes": 2}', "category_id"),
        ("l.json", '{"annotations": [{"fpath": "a.png", "category_id": 2}], "num_classes": 2}', r"2\.\.2"),
        ("l.json", "[", r"l\.json, line 1.*not valid JSON"),
        ("l.yaml", "a", "suffix"),
    ],
)
def test_bad_lists(tmp_path, name, text, match):
    _picture(tmp_path / "a.png", (0, 0, 0))
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=match):
        image_list(tmp_path / name, tmp_path)


def test_list_with_images_elsewhere(tmp_path):
    (tmp_path / "l.txt").write_text("x/a.png 0\n")
    with pytest.raises(FileNotFoundError, match=r"x/a\.png.*strip_prefix"):
        image_list(tmp_path / "l.txt", tmp_path)
    with pytest.raises(FileNotFoundError, match="no list"):
        image_list(tmp_path / "none.txt", tmp_path)
    with pytest.raises(ValueError, match="does not start with"):
        image_list(tmp_path / "l.txt", tmp_path, strip_prefix="/old")


def test_in_memory_rejects(tmp_path):
    _picture(tmp_path / "a" / "1.png", (0, 0, 0))
    _picture(tmp_path / "a" / "2.png", (0, 0, 0), size=(5, 5))
    with pytest.raises(ValueError, match="image 1 is"):
        in_memory(image_folder(tmp_path))
    with pytest.raises(ValueError, match="without a transform"):
        in_memory(image_folder(tmp_path, transform=lambda x: x))
    with pytest.raises(ValueError, match="empty"):
        in_memory(torch.utils.data.Subset(image_folder(tmp_path), []))


def test_in_memory_channel_order_of_cifar_arrays():
    class Cifar:
        def __init__(self):
            self.data, self.targets, self.transform = np.zeros((2, 4, 4, 3), dtype=np.uint8), [7, 1], None
            self.data[1, 2, 3] = (10, 20, 30)

        def __len__(self):
            return 2

    images, targets = in_memory(Cifar())
    assert images.shape == (2, 3, 4, 4) and images[1, :, 2, 3].tolist() == [10, 20, 30]
    assert targets.tolist() == [7, 1]
