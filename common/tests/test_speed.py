"""The loading speed that is printed is that of the images that were loaded."""

import time

import numpy as np
import pytest
import torch
from PIL import Image

from common.data import speed


class Slow(torch.utils.data.Dataset):
    """Twenty milliseconds an image, and half a second for the first."""

    started = False

    def __len__(self):
        return 12

    def __getitem__(self, index):
        time.sleep(0.02 if self.started else 0.5)
        self.started = True
        return torch.zeros(1), index


def test_images_and_seconds_are_those_of_the_batches_after_the_first():
    images, seconds = speed.speed(Slow(), lambda x: x, batch=4, workers=0, seconds=0.3)
    assert images % 4 == 0 and images >= 12, "more than an epoch: it goes on"
    assert 0.02 * images <= seconds < 0.04 * images + 0.1


@pytest.mark.parametrize("extra", [[], ["--plain"]])
def test_a_line_for_every_number_of_workers(tmp_path, capsys, extra):
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        for i in range(4):
            pixels = np.random.default_rng(i).integers(0, 255, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.jpg")
    line = [str(tmp_path), "--size", "32", "--batch", "4", "--workers", "0", "1", "--seconds", "0.1", *extra]
    assert speed.main(line) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert "8 images, 32 x 32, batches of 4" in head and [row.split()[1] for row in rows] == ["0", "1"]
    assert all(float(row.split()[2]) > 0 for row in rows)
    assert speed.main([str(tmp_path), "--batch", "64"]) == 1 and "error: " in capsys.readouterr().err
    assert speed.main([str(tmp_path / "nowhere")]) == 1 and "no folder" in capsys.readouterr().err
