"""The Hub when it refuses, cuts, lies or is not there, and folders that are in the way."""
import hashlib
import os
import time
from pathlib import Path

import pytest

from _hub import LOAD, NAME, ORG, PUBLISHED, WEIGHTS, blobs, command
from _hub_server import TOKEN
from vitlinear.zoo.records import read_record, records

# failures

def fails(client, cache: Path, error: str, *words: str, code: str = LOAD, **kwargs) -> dict:
    told = client.run(code, cache, **{**ORG, **kwargs})
    assert told['error'] == error, told
    assert all(word in told['message'] for word in words), told['message']
    assert '\n' not in told['message']
    return told


def test_no_such_repository(hub, client, cache):
    fails(client, cache, 'HubError', f"'org/{NAME}'", 'no such repository', 'no token')
    fails(client, cache, 'HubError', f"'org/{NAME}'", 'no such repository', 'your token', HF_TOKEN=TOKEN)
    told = client.run(command('pull', 'org/nowhere', cache / 'x'), cache)
    assert told['value'] == 1 and 'org/nowhere' in told['err'] and not (cache / 'x').exists()


def test_private_repository(hub, client, cache, published, expected):
    hub.repos[f'org/{NAME}'].private = True
    fails(client, cache, 'HubError', 'private', 'hf auth login', 'HF_TOKEN')
    told = fails(client, cache, 'HubError', 'private', HF_TOKEN='hf_wrong')
    assert 'hf_wrong' not in told['message']
    assert client.run(LOAD, cache, HF_TOKEN=TOKEN, **ORG)['value'] == expected


def test_no_such_revision(hub, client, cache, published):
    code = f"result = load('vvt_nano', pretrained_cfg_overlay=dict(hf_hub_id='org/{NAME}@nowhere'))"
    fails(client, cache, 'HubError', "no revision 'nowhere'", code=code)
    told = client.run(command('pull', f'org/{NAME}', cache / 'x', '--revision', 'nowhere'), cache)
    assert told['value'] == 1 and "no revision 'nowhere'" in told['err']


def test_pickles_are_not_loaded(hub, client, cache):
    hub.add(f'org/{NAME}', {'pytorch_model.bin': b'x', 'config.json': b'{}'})
    fails(client, cache, 'HubError', "'model.safetensors'", 'no such file')
    code = "result = load('vvt_nano', pretrained_cfg_overlay=dict(hf_hub_id='org/a', hf_hub_filename='model.bin'))"
    fails(client, cache, 'HubError', "'model.bin'", 'safetensors', 'vitlinear convert', code=code)
    assert not hub.asked('GET', r'\.bin')


@pytest.mark.parametrize('method, status', [('HEAD', 500), ('HEAD', 429), ('GET', 500), ('GET', 503)])
def test_server_errors(hub, client, cache, published, expected, method: str, status: int):
    hub.fault = lambda m, path, count: status if m == method and path.endswith('.safetensors') else None
    words = ['too many requests'] if status == 429 else [str(status), 'try again later']
    told = fails(client, cache, 'HubError', *words)
    assert told['seconds'] < 5 and blobs(cache) == []
    hub.fault = lambda *args: None
    assert client.run(LOAD, cache, **ORG)['value'] == expected
    hub.fault = lambda *args: 500  # a copy in the cache serves
    assert client.run(LOAD, cache, **ORG)['value'] == expected


def test_connection_cut_once(hub, client, cache, published, expected):
    hub.fault = lambda m, path, count: .4 if m == 'GET' and path.endswith('.safetensors') and not count else None
    assert client.run(LOAD, cache, **ORG)['value'] == expected
    assert hub.asked('GET', 'model.safetensors') == 2
    assert [p.stat().st_size for p in blobs(cache)] == [PUBLISHED.size]


def test_connection_cut_again_and_again(hub, client, cache, published, expected):
    def fault(method, path, count):
        return None if method != 'GET' or not path.endswith('.safetensors') else 0. if count else .4

    hub.fault = fault
    fails(client, cache, 'HubError', 'connection', 'Try again')
    assert blobs(cache) == []
    hub.fault = lambda *args: None
    assert client.run(LOAD, cache, **ORG)['value'] == expected


def test_killed_in_the_middle(hub, client, cache, published, expected):
    """What a killed process leaves behind is never taken for the file."""
    hub.slow = 30.
    job = client.start(LOAD, cache, **ORG)
    end = time.monotonic() + 20
    while not (left := list(cache.rglob('*.incomplete'))) and time.monotonic() < end:
        time.sleep(.02)
    job.kill()
    assert len(left) == 1 and left[0].exists() and not job.reply.exists()
    hub.slow = 0.
    fails(client, cache, 'HubError', 'HF_HUB_OFFLINE', offline=True)
    assert client.run(LOAD, cache, **ORG)['value'] == expected


@pytest.mark.parametrize(('name', 'bare'), [
    (NAME, False), ('hf-hub:org/vvt_nano.test', False), ('hf-hub:org/vvt_nano.test', True)])
def test_flipped_bit(hub, client, cache, published, expected, made, name: str, bare: bool):
    """Also without a record to compare with, thanks to the Hub's own hash; nothing is removed."""
    hub.bare = bare  # the hash is then in the list of files alone
    files = {p.name: p.read_bytes() for p in made[0].iterdir()}
    hub.add('org/vvt_nano.test', {k: v for k, v in files.items() if k != 'record.json' or not bare})
    data = WEIGHTS if name == NAME else (made[0] / 'model.safetensors').read_bytes()
    good, damaged = hashlib.sha256(data).hexdigest(), bytearray(data)
    damaged[len(data) // 2] ^= 16
    hub.blobs[f'damaged {good}'] = bytes(damaged)
    code = f'result = load({name!r})'
    for _ in range(2):  # the second time from the cache
        told = fails(client, cache, 'IntegrityError', good, hashlib.sha256(damaged).hexdigest(), code=code)
        [file] = blobs(cache)
        assert f"'{file}'" in told['message'] and file.read_bytes() == damaged
    del hub.blobs[f'damaged {good}']
    file.unlink()  # as the message says
    assert client.run(code, cache, **ORG)['value'] == (expected if name == NAME else made[1])


def test_other_weights_than_the_record_says(hub, client, cache, made):
    """Well-formed weights of the right model that are not the published ones."""
    hub.add(f'org/{NAME}', {p.name: p.read_bytes() for p in made[0].iterdir()})
    fails(client, cache, 'IntegrityError', PUBLISHED.sha256, read_record(made[0]).sha256, NAME)
    told = client.run(command('verify', NAME), cache, **ORG)
    assert told['value'] == 1 and PUBLISHED.sha256 in told['err']
    assert client.run(command('verify', NAME), cache)['value'] == 0


def test_disk_full(hub, client, cache, published, expected):
    told = fails(client, cache, 'HubError', 'too large', str(cache), 'HF_HUB_CACHE', largest_file=1_000_000)
    assert told['seconds'] < 20 and blobs(cache) == []
    target = cache.parent / NAME
    told = client.run(command('pull', f'org/{NAME}', target), cache, largest_file=1_000_000)
    assert told['value'] == 1 and not target.exists()
    assert client.run(LOAD, cache, **ORG)['value'] == expected
    # the download is in the cache, and the folder is what does not fit
    told = client.run(command('pull', f'org/{NAME}', target), cache, largest_file=1_000_000)
    assert told['value'] in (1, 2) and sorted(p.name for p in cache.parent.iterdir()) == ['cache'], told


def test_two_processes_at_once(hub, client, cache, published, expected):
    hub.slow = .5
    jobs = [client.start(LOAD, cache, **ORG) for _ in range(2)]
    assert [job.told()['value'] for job in jobs] == [expected] * 2
    assert [p.stat().st_size for p in blobs(cache)] == [PUBLISHED.size]


def test_offline(hub, client, cache, published, expected):
    told = fails(client, cache, 'HubError', 'HF_HUB_OFFLINE', 'not in the cache', offline=True)
    assert told['seconds'] < 5
    assert client.run(LOAD, cache, **ORG)['value'] == expected
    requests = len(hub.requests)
    assert client.run(LOAD, cache, offline=True, **ORG)['value'] == expected
    assert len(hub.requests) == requests


def test_no_network(hub, client, cache, published, expected):
    """Nobody answers: told within seconds, and the copy in the cache serves where there is one."""
    cut = """
import socket
def connect(*args):
    raise ConnectionRefusedError(111, 'Connection refused')
socket.socket.connect = connect
"""
    told = fails(client, cache, 'HubError', hub.url, 'connection', code=cut + LOAD)
    assert told['seconds'] < 5
    told = client.run(cut + command('push', PUBLISHED.folder, 'org/name', '--dry-run'), cache)
    assert told['value'] == 0 and 'not asked' in told['err'] and PUBLISHED.sha256 in told['out']
    told = client.run(cut + command('pull', f'org/{NAME}', cache.parent / 'new'), cache)
    assert told['value'] == 1 and 'connection' in told['err'] and told['seconds'] < 5
    assert client.run(LOAD, cache, **ORG)['value'] == expected
    assert client.run(cut + LOAD, cache, **ORG)['value'] == expected


def test_read_only_cache(hub, client, cache, published, expected):
    code = f'lose_root()\n{LOAD}'
    cache.mkdir()
    cache.chmod(0o555)
    fails(client, cache, 'HubError', 'cannot be written', 'HF_HUB_CACHE', code=code)
    cache.chmod(0o755)
    assert client.run(LOAD, cache, **ORG)['value'] == expected
    before = sorted(str(p) for p in cache.rglob('*'))
    for path in [cache, *cache.rglob('*')]:
        if not path.is_symlink():
            path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert fails(client, cache, 'PermissionError', code=f"lose_root(); open({str(cache / 'x')!r}, 'w')")
        assert client.run(code, cache, **ORG)['value'] == expected
        assert client.run(code, cache, offline=True, **ORG)['value'] == expected
    finally:
        for path in [cache, *cache.rglob('*')]:
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o755)
    assert sorted(str(p) for p in cache.rglob('*')) == before


# pulling what is not as it should be

def test_pull_checks(hub, client, cache, made, tmp_path):
    files = {p.name: p.read_bytes() for p in made[0].iterdir()}
    target = tmp_path / 'target'
    hub.add('org/name', {**files, 'model.safetensors': WEIGHTS})
    told = client.run(command('pull', 'org/name', target), cache)
    assert told['value'] == 1 and PUBLISHED.sha256 in told['err'] and not target.exists()

    hub.add('org/name', {**files, 'pytorch_model.bin': b'x', '.gitattributes': b'x', '../../evil.txt': b'x'})
    told = client.run(command('pull', 'org/name', target), cache)
    assert told['value'] == 0 and 'pytorch_model.bin is left out' in told['err'], told
    assert {p.name for p in target.iterdir()} == set(files)
    assert not list(tmp_path.rglob('evil.txt'))

    hub.fault = lambda method, path, count: 500 if path.endswith('record.json') and method == 'GET' else None
    hub.add('org/name', {'record.json': files['record.json'] + b' '})
    before = {p.name: p.read_bytes() for p in target.iterdir()}
    assert client.run(command('pull', 'org/name', target), cache)['value'] == 1
    assert {p.name: p.read_bytes() for p in target.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ['cache', 'target']


def test_pull_spares_other_folders(hub, client, cache, published, tmp_path):
    (tmp_path / 'photos').mkdir()
    (tmp_path / 'photos' / 'a.jpg').write_bytes(b'x')
    told = client.run(command('pull', f'org/{NAME}', tmp_path / 'photos'), cache)
    assert told['value'] == 2 and 'other things than a checkpoint' in told['err']
    assert os.listdir(tmp_path / 'photos') == ['a.jpg']


# verify

def test_verify_ours(hub, client, cache, published):
    for name in records():
        told = client.run(command('verify', name), cache)
        assert told['value'] == 0 and name in told['out'], told
    told = client.run(command('verify', NAME), cache, **ORG)
    assert told['value'] == 0 and 'on the Hub' in told['out'], told
    told = client.run(command('verify', 'vvt_nano.fashion_mnits'), cache)
    assert told['value'] == 2 and NAME in told['err']
