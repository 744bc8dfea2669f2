"""Fixtures of the tests of the commands: a folder of images, and training on it."""
from pathlib import Path

import pytest
from _runs import COMMON, TINY

from _data import image_folder
from vitlinear.tools import train


@pytest.fixture(scope='session')
def data(tmp_path_factory) -> str:
    """A small image folder that tests leave as it is."""
    return str(image_folder(tmp_path_factory.mktemp('images')))


@pytest.fixture
def fit(data, tmp_path):
    """Train in this process into tmp_path/NAME and return that folder."""
    def fit(name: str, *extra: str, expect: int = 0) -> Path:
        argv = [*TINY, *COMMON, '--data-dir', data, '--output', str(tmp_path), '--experiment', name, *extra]
        assert train.main(argv) == expect
        return tmp_path / name
    return fit
