import pytest

from rbonn.tests.layouts import config, folder_config, write_class_folders
from rbonn.train import fit


@pytest.fixture(scope="session")
def checkpoint(fabric, tmp_path_factory):
    """RBONN on digits, two epochs, of another seed than the default: the noise of the digits is the seed's."""
    out = tmp_path_factory.mktemp("digits")
    fit(config("method=drelu_fixed", "seed=1"), fabric, out)
    return out / "last.ckpt"


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Class folders of apples and pears."""
    root = tmp_path_factory.mktemp("folders")
    write_class_folders(root)
    return root


@pytest.fixture(scope="session")
def folder_checkpoint(fabric, folders, tmp_path_factory):
    """RBONN on the class folders, one epoch."""
    out = tmp_path_factory.mktemp("on_folders")
    fit(folder_config(folders, "method=drelu_fixed", "train.epochs=1"), fabric, out)
    return out / "last.ckpt"
