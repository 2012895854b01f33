import pytest

from ap_fer.tests.helpers import short_config
from ap_fer.train import fit
from common import runs


@pytest.fixture(scope="session")
def fabric():
    return runs.launch({"accelerator": "cpu", "devices": 1})


@pytest.fixture(scope="session")
def checkpoint(fabric, tmp_path_factory):
    """The default arm (APP + ATP) after two epochs."""
    out = tmp_path_factory.mktemp("trained")
    fit(short_config(), fabric, out)
    return out / "last.ckpt"
