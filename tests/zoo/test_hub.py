"""Weights to the Hub and back, through the real client and a Hub on the loopback interface, in order and out of it."""
import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import pytest
import timm
import torch

import vitlinear
from _hub_client import Client, digest
from _hub_server import TOKEN, Hub
from vitlinear.tools.export import export_model
from vitlinear.zoo import hub as hub_module
from vitlinear.zoo.records import Cfg, find_record, read_record, records

NAME = 'vvt_nano.fashion_mnist'
PUBLISHED = find_record(NAME)
ORG = dict(VITLINEAR_HUB_ORG='org')
LOAD = f'result = load({NAME!r})'
WEIGHTS = PUBLISHED.weights.read_bytes()
# the smallest model of each family
NANOS = [n for n in timm.list_models('*_nano') if timm.models.model_entrypoint(n).__module__.startswith('vitlinear.')]


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


def make_folder(folder: Path, name: str = 'vvt_nano', num_classes: int = 3, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=num_classes, in_chans=1)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=.1)
    labels = tuple(f'class {i}' for i in range(num_classes))
    cfg = Cfg(num_classes, (1, 32, 32), (2, 2), 1., 'bilinear', (.5,), (.25,), labels)
    export_model(model, folder, 'test', cfg, dict(provenance=dict(
        trained_by='a test', mechanism='as published', configuration='of a test')))
    return model


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp('made') / 'vvt_nano.test'
    return folder, digest(make_folder(folder))


@pytest.fixture
def folder(made, tmp_path) -> Path:
    return Path(shutil.copytree(made[0], tmp_path / 'vvt_nano.test'))


def command(*words: str) -> str:
    return f'from vitlinear.tools import cli\nresult = cli.main({[str(w) for w in words]!r})'


def blobs(cache: Path) -> list:
    """Files of weights in a cache, complete or not."""
    return [p for p in cache.rglob('*') if p.is_file() and not p.is_symlink() and p.stat().st_size > 1e5]


# in order

@pytest.mark.parametrize('name', NANOS)
def test_round_trip(hub, client, cache, tmp_path, name: str):
    """Pushed to a private repository, loaded from it and pulled, with every bit, record and label."""
    folder, repo = tmp_path / f'{name}.test', f'org/{name}.test'
    expected = digest(make_folder(folder, name))
    told = client.run(command('push', folder, repo, '--private'), cache, HF_TOKEN=TOKEN)
    assert told['value'] == 0, told
    assert hub.repos[repo].private and set(hub.files(repo)) == {
        'README.md', 'config.json', 'model.safetensors', 'record.json'}
    commit = hub.repos[repo].branches['main']
    record = read_record(folder)
    assert (record.hub.repo_id, record.hub.revision) == (repo, commit)
    assert f'hf-hub:{repo}' in hub.files(repo)['README.md'].decode()
    for text in (told['out'], told['err'], *(f.decode(errors='replace') for f in hub.files(repo).values())):
        assert TOKEN not in text
    assert not any(TOKEN.encode() in p.read_bytes() for p in client.home.rglob('*') if p.is_file())

    told = client.run(f'''
        import timm
        model = timm.create_model('hf-hub:{repo}', pretrained=True)
        result = [digest(model), model.num_classes, list(model.pretrained_cfg['label_names'])]
        '''.replace('\n        ', '\n'), cache, HF_TOKEN=TOKEN)
    assert told['value'] == [expected, 3, ['class 0', 'class 1', 'class 2']], told

    pulled = tmp_path / 'pulled' / f'{name}.test'
    assert client.run(command('pull', repo, pulled), cache, HF_TOKEN=TOKEN)['value'] == 0
    assert {p.name: p.read_bytes() for p in pulled.iterdir()} == {p.name: p.read_bytes() for p in folder.iterdir()}
    assert digest(timm.create_model(f'local-dir:{pulled}', pretrained=True)) == expected
    told = client.run(command('verify', repo), cache, HF_TOKEN=TOKEN)
    assert told['value'] == 0, told


def test_push_again_sends_what_changed(hub, client, cache, folder):
    push = command('push', folder, 'org/again')
    assert client.run(push, cache, HF_TOKEN=TOKEN)['value'] == 0
    first = hub.repos['org/again'].branches['main']
    uploads = hub.asked('PUT', '/lfs/')
    hub.requests.clear()

    told = client.run(push, cache, HF_TOKEN=TOKEN)
    assert told['value'] == 0 and 'Nothing to send' in told['out']
    assert not hub.asked('POST', '') and not hub.asked('PUT', '')
    assert read_record(folder).hub.revision == first

    card = folder / 'README.md'
    card.write_text(card.read_text() + '\nA remark.\n')
    told = client.run(push, cache, HF_TOKEN=TOKEN)
    assert told['value'] == 0 and '1 files' in told['out'], told
    assert hub.files('org/again')['README.md'].endswith(b'A remark.\n')
    assert uploads == 1 and not hub.asked('PUT', '/lfs/')
    assert read_record(folder).hub.revision == hub.repos['org/again'].branches['main'] != first


def test_push_new_weights(hub, client, cache, folder):
    assert client.run(command('push', folder, 'org/name'), cache, HF_TOKEN=TOKEN)['value'] == 0
    expected = digest(make_folder(folder, seed=1))
    told = client.run(command('push', folder, 'org/name'), cache, HF_TOKEN=TOKEN)
    assert told['value'] == 0 and 'changed' in told['out']
    assert client.run("result = load('hf-hub:org/name')", cache)['value'] == expected


def test_push_to_a_branch(hub, client, cache, folder):
    told = client.run(command('push', folder, 'org/name', '--revision', 'v2'), cache, HF_TOKEN=TOKEN)
    assert told['value'] == 0, told
    assert hub.files('org/name') == {} and 'model.safetensors' in hub.files('org/name', 'v2')
    target = folder.parent / 'pulled'
    assert client.run(command('pull', 'org/name', target, '--revision', 'v2'), cache)['value'] == 0
    told = client.run(command('pull', 'org/name', target), cache)
    assert told['value'] == 1 and 'has no model.safetensors' in told['err']


@pytest.mark.parametrize('there', [False, True])
def test_dry_run(hub, client, cache, folder, there: bool):
    if there:
        hub.add('org/name', {'config.json': (folder / 'config.json').read_bytes(), 'README.md': b'old'})
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    told = client.run(command('push', folder, 'org/name', '--dry-run'), cache)
    assert told['value'] == 0, told
    digest = hashlib.sha256((folder / 'model.safetensors').read_bytes()).hexdigest()
    assert digest in told['out'] and f"{(folder / 'model.safetensors').stat().st_size:,}" in told['out']
    states = {line.split()[-1]: line.split()[0] for line in told['out'].splitlines()[:4]}
    assert states == {
        'model.safetensors': 'new', 'record.json': 'new',
        'README.md': 'changed' if there else 'new', 'config.json': 'unchanged' if there else 'new'}
    assert {method for method, _ in hub.requests} == {'GET'}
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def spoil(folder: Path, how: str) -> None:
    path = folder / 'model.safetensors'
    if how == 'bit':
        data = bytearray(path.read_bytes())
        data[-1000] ^= 1
        path.write_bytes(data)
    elif how == 'short':
        path.write_bytes(path.read_bytes()[:-4])
    elif how == 'pickle':
        torch.save({}, folder / 'pytorch_model.bin')
    elif how == 'hidden pickle':
        torch.save({}, folder / 'weights.dat')
    elif how == 'config':
        config = json.loads((folder / 'config.json').read_text())
        config['pretrained_cfg']['mean'] = [.1]
        (folder / 'config.json').write_text(json.dumps(config))
    elif how == 'card':
        card = folder / 'README.md'
        card.write_text(card.read_text().replace(read_record(folder).sha256, '0' * 64))
    else:
        (folder / how).unlink()


@pytest.mark.parametrize('how, words', [
    ('bit', ['sha256', 'record.json']), ('short', ['no readable safetensors']), ('pickle', ['pytorch_model.bin']),
    ('hidden pickle', ['weights.dat']), ('config', ['mean', '0.1', '0.5']), ('card', ['README.md', 'sha256']),
    ('record.json', ['record.json is missing']), ('config.json', ['config.json is missing']),
    ('README.md', ['README.md is missing']), ('model.safetensors', ['model.safetensors is missing'])])
def test_push_and_verify_refuse(hub, client, cache, folder, how: str, words):
    spoil(folder, how)
    for words_of_command in (('push', folder, 'org/name'), ('verify', folder)):
        told = client.run(command(*words_of_command), cache, HF_TOKEN=TOKEN)
        assert told['value'] in (1, 2) and told['err'].count('\n') == 1, told
        assert all(word in told['err'] for word in words), told['err']
    assert hub.requests == []


@pytest.mark.parametrize('env, private, words', [
    ({}, False, ['no token', 'hf auth login', 'HF_TOKEN']),
    (dict(HF_TOKEN='hf_wrong'), False, ['token is not valid']),
    (dict(HF_TOKEN=TOKEN), True, ['exists and is public'])])
def test_push_is_not_permitted(hub, client, cache, folder, env, private: bool, words):
    if private:
        hub.add('org/name', {'x': b''})
    told = client.run(command('push', folder, 'org/name', *['--private'] * private), cache, **env)
    assert told['value'] == 1 and all(word in told['err'] for word in words), told
    assert 'hf_wrong' not in told['err'] and 'model.safetensors' not in hub.repos.get('org/name', hub).__dict__
    assert read_record(folder).hub.repo_id is None


@pytest.mark.parametrize('repo', ['name', 'org/name/more', 'org/', '../x'])
def test_names_of_repositories(client, hub, cache, folder, repo: str):
    for words in (('push', folder, repo), ('pull', repo, folder.parent / 'new')):
        told = client.run(command(*words), cache, HF_TOKEN=TOKEN)
        assert told['value'] == 2 and repo in told['err'] and 'org/name' in told['err']
    assert hub.requests == []


# which weights `pretrained=True` takes

def test_bundled_without_an_organisation(hub, client, cache, published, expected):
    told = client.run(LOAD, cache)
    assert told['value'] == expected and hub.requests == []


@pytest.mark.parametrize('how', ['environment', 'function', 'function before environment'])
def test_organisation(hub, client, cache, published, expected, how: str):
    env = {} if how == 'function' else dict(VITLINEAR_HUB_ORG='org' if how == 'environment' else 'another')
    call = '' if how == 'environment' else "import vitlinear; vitlinear.set_hub_org('org')\n"
    code = f'''
import timm
{call}model = timm.create_model({NAME!r}, pretrained=True)
result = [digest(model), model.pretrained_cfg['hf_hub_id'], model.pretrained_cfg.get('file'), model.num_classes]'''
    told = client.run(code, cache, **env)
    assert told['value'] == [expected, f'org/{NAME}', None, 10], told
    assert hub.asked('GET', 'model.safetensors') == 1
    told = client.run(f"import vitlinear; vitlinear.set_hub_org(None)\n{LOAD}", cache / 'other', **env)
    assert told['value'] == expected and hub.asked('GET', 'model.safetensors') == 1


@pytest.mark.parametrize('org', ['', 'a/b', 'x y', '-x', 3])
def test_names_of_organisations(org, monkeypatch):
    monkeypatch.setattr(hub_module, '_org', hub_module._UNSET)
    with pytest.raises(ValueError, match='organisation') as e:
        vitlinear.set_hub_org(org)
    assert repr(org) in str(e.value)
    if isinstance(org, str) and org:
        monkeypatch.setenv('VITLINEAR_HUB_ORG', org)
        with pytest.raises(ValueError, match='VITLINEAR_HUB_ORG'):
            timm.create_model(NAME, pretrained=True)


def test_pinned_to_the_commit_of_the_record(hub, client, cache, published, expected):
    """What was pushed after the recorded commit is not seen; a commit in the cache needs no request."""
    hub.add(f'org/{NAME}', {'model.safetensors': b'newer'})
    code = f'''
from dataclasses import replace
from vitlinear.zoo import records
record = records.find_record({NAME!r})
records._RECORDS[{NAME!r}] = replace(record, hub=records.Hub('org/{NAME}', {published!r}))
''' + LOAD
    for _ in range(2):
        assert client.run(code, cache, **ORG)['value'] == expected
    assert hub.asked('GET', f'/resolve/{published}/model.safetensors') == 1
    assert hub.asked('HEAD', '') == 2 and not hub.asked('', '/resolve/main/')


def test_tag_without_record(hub, client, cache, folder):
    """A zoo with tags of its own: its config says what classes and images they are for."""
    model = make_folder(folder, num_classes=4)
    hub.add('org/vvt_nano.untrained', {p.name: p.read_bytes() for p in folder.iterdir()})
    code = '''
import timm
model = timm.create_model('vvt_nano', pretrained=True)
result = [digest(model), model.num_classes, model.in_chans, model.pretrained_cfg['mean']]'''
    told = client.run(code, cache, **ORG)
    assert told['value'] == [digest(model), 4, 1, [.5]], told
    config = json.loads((folder / 'config.json').read_text())
    hub.add('org/vvt_nano.untrained', {'config.json': json.dumps({**config, 'architecture': 'vvt_tiny'}).encode()})
    told = client.run(code, cache, **ORG)
    assert told['error'] == 'HubError' and 'vvt_tiny, not of vvt_nano' in told['message']


def test_a_file_of_the_callers_goes_first(hub, client, cache, made, published):
    file, expected = str(made[0] / 'model.safetensors'), made[1]
    code = (f"result = load({NAME!r}, num_classes=3, pretrained_cfg_overlay=dict(file={file!r}, num_classes=3))")
    assert client.run(code, cache, **ORG)['value'] == expected and hub.requests == []


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


@pytest.mark.parametrize('name', [NAME, 'hf-hub:org/vvt_nano.test'])
def test_flipped_bit(hub, client, cache, published, expected, made, name: str):
    """Also without a record to compare with, thanks to the Hub's own hash; nothing is removed."""
    hub.add('org/vvt_nano.test', {p.name: p.read_bytes() for p in made[0].iterdir()})
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
