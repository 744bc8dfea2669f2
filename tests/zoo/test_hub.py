"""Weights to the Hub and back, through the real client and a Hub on the loopback interface, in order and out of it."""
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load, load_file, save

import vitlinear
from _hub import LOAD, NAME, ORG, command, make_folder
from _hub_client import digest
from _hub_server import TOKEN
from vitlinear.zoo import hub as hub_module
from vitlinear.zoo.hub import IntegrityError
from vitlinear.zoo.records import read_record

# the smallest model of each family
NANOS = [n for n in timm.list_models('*_nano') if timm.models.model_entrypoint(n).__module__.startswith('vitlinear.')]


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


# a record covers one file

def altered(path: Path) -> bytes:
    """The weights with one number changed."""
    weights = load_file(path)
    weights[min(weights)] = weights[min(weights)] + 1
    return save(weights, metadata=dict(format='pt'))


@pytest.mark.parametrize('how', ['renamed', 'other weights', 'other type', 'other name', 'none'])
def test_folder_loads_what_its_record_covers(made, folder, how: str):
    weights, record = folder / 'model.safetensors', folder / 'record.json'
    other = altered(weights)
    if how == 'renamed':  # the record names another file, beside which lies what timm would load
        shutil.copy(weights, folder / 'weights.safetensors')
        record.write_text(json.dumps({**json.loads(record.read_text()), 'file': 'weights.safetensors'}))
        weights.write_bytes(other)
    elif how == 'other weights':
        weights.write_bytes(other)
    elif how != 'none':
        torch.save(load(other), folder / 'pytorch_model.bin')
        (folder / 'x.safetensors').write_bytes(other)
        weights.unlink()
        if how == 'other name':
            (folder / 'pytorch_model.bin').unlink()
    if how in ('renamed', 'none'):
        assert digest(timm.create_model(f'local-dir:{folder}', pretrained=True)) == made[1]
    else:
        with pytest.raises(IntegrityError, match='is missing, which|is damaged or another file'):
            timm.create_model(f'local-dir:{folder}', pretrained=True)


@pytest.mark.parametrize('door', ["'hf-hub:org/mine'", "'vvt_nano.untrained'"])
def test_repository_loads_what_its_record_covers(hub, client, cache, made, folder, door: str):
    """Its own record is asked for, whether the caller names the repository or an organisation."""
    repo = 'org/mine' if 'mine' in door else 'org/vvt_nano.untrained'
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    record = json.loads(files['record.json'])
    code = f'import timm, vitlinear\nresult = digest(timm.create_model({door}, pretrained=True))'
    hub.add(repo, files)
    assert client.run(code, cache, **ORG)['value'] == made[1]

    hub.add(repo, {'model.safetensors': altered(folder / 'model.safetensors')})
    told = client.run(code, cache, **ORG)
    assert told['error'] == 'IntegrityError' and record['sha256'] in told['message'], told

    renamed = {'record.json': json.dumps({**record, 'file': 'weights.safetensors'}).encode(),
               'weights.safetensors': files['model.safetensors']}
    hub.add(repo, renamed)
    assert client.run(code, cache, **ORG)['value'] == made[1]


def test_repository_without_a_record(hub, client, cache, made, folder):
    files = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != 'record.json'}
    hub.add('org/plain', files)
    code = "import timm, vitlinear\nresult = digest(timm.create_model('hf-hub:org/plain', pretrained=True))"
    assert client.run(code, cache)['value'] == made[1]
    assert client.run(code, cache, HF_HUB_OFFLINE='1')['value'] == made[1]
