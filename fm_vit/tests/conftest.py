import pytest

from fm_vit.tests.helpers import short
from fm_vit.train import fit


@pytest.fixture(scope="session")
def checkpoint(fabric, tmp_path_factory):
    """FM-ViT trained for two epochs on a few faces."""
    out = tmp_path_factory.mktemp("trained")
    fit(short(), fabric, out)
    return out / "last.ckpt"
