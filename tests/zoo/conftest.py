"""Fixtures of the tests of the Hub: a server of its protocol on this machine, clients, folders."""
import shutil
from pathlib import Path

import pytest
import timm

from _hub import NAME, PUBLISHED, make_folder
from _hub_client import Client, digest
from _hub_server import Hub


@pytest.fixture(scope='module')
def server():
    hub = Hub()
    yield hub
    hub.close()


@pytest.fixture(scope='module')
def client(server, tmp_path_factory):
    client = Client(server.url, tmp_path_factory.mktemp('home'))
    yield client
    client.close()


@pytest.fixture
def hub(server):
    server.reset()
    return server


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / 'cache'


@pytest.fixture
def published(hub) -> str:
    """The bundled checkpoint on the Hub of organisation 'org', and its commit."""
    return hub.add(f'org/{NAME}', {p.name: p.read_bytes() for p in PUBLISHED.folder.iterdir()})


@pytest.fixture(scope='module')
def expected() -> str:
    return digest(timm.create_model(NAME, pretrained=True))


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp('made') / 'vvt_nano.test'
    return folder, digest(make_folder(folder))


@pytest.fixture
def folder(made, tmp_path) -> Path:
    return Path(shutil.copytree(made[0], tmp_path / 'vvt_nano.test'))
