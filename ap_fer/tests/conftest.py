import pytest

from ap_fer.tests.helpers import short_config, write_image
from ap_fer.train import fit


@pytest.fixture(scope="session")
def checkpoint(fabric, tmp_path_factory):
    """The default arm (APP + ATP) after two epochs."""
    out = tmp_path_factory.mktemp("trained")
    fit(short_config(), fabric, out)
    return out / "last.ckpt"


@pytest.fixture
def raf(tmp_path):
    """RAF-DB in miniature: two training images and one test image of every class."""
    rows = [f"train_{i:05d}.jpg {1 + i % 7}" for i in range(14)] + [f"test_{i:05d}.jpg {1 + i % 7}" for i in range(7)]
    label = tmp_path / "basic/EmoLabel/list_patition_label.txt"
    label.parent.mkdir(parents=True)
    label.write_text("\n".join(rows) + "\n")
    for i, row in enumerate(rows):
        name = row.split()[0]
        write_image(tmp_path / "basic/Image/aligned_224" / name, i)
        write_image(tmp_path / "basic/Image/aligned" / name.replace(".jpg", "_aligned.jpg"), i)
    return tmp_path
