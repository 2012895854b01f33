import pytest

from dcp_nas import train
from dcp_nas.tests.layouts import config


@pytest.fixture(scope="session")
def step1(fabric, tmp_path_factory):
    """The checkpoint of a short first step on digits, genotype=random."""
    folder = tmp_path_factory.mktemp("step1")
    train.fit(config("stage=step1"), fabric, folder)
    return folder / "last.ckpt"
