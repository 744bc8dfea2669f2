"""Training runs made into folders for the Hub, which timm and transformers load."""
import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import yaml

from vitlinear.tools import cli
from vitlinear.tools._folders import folder_problems
from vitlinear.tools.export import export_model
from vitlinear.zoo.records import find_record, read_record

PUBLISHED = find_record('vvt_nano.fashion_mnist')


@pytest.fixture(scope='module')
def weights() -> dict:
    states = []
    for seed in range(4):
        torch.manual_seed(seed)
        states.append(timm.create_model('vvt_nano', num_classes=10, in_chans=1).state_dict())
    return dict(zip([('last', False), ('last', True), ('model_best', False), ('model_best', True)], states))


@pytest.fixture
def run_dir(weights, tmp_path) -> Path:
    """What `vitlinear train` leaves: three epochs, of which the second was the best."""
    folder = tmp_path / 'output'
    folder.mkdir()
    settings = yaml.safe_load((PUBLISHED.folder / 'args.yaml').read_text())
    (folder / 'args.yaml').write_text(yaml.safe_dump({**settings, 'seed': 7}))
    with (folder / 'summary.csv').open('w', newline='') as f:
        rows = csv.writer(f)
        rows.writerow(['epoch', 'train_loss', 'eval_loss', 'eval_top1', 'eval_top5', 'lr'])
        rows.writerows([[0, 1., 1., 80., 99., .1], [1, 1., 1., 92.25, 99., .1], [2, 1., 1., 91.5, 99., .1]])
    for name, epoch in (('last', 2), ('model_best', 1)):
        torch.save(dict(
            epoch=epoch, arch='vvt_nano', optimizer={}, version=2, state_dict=weights[name, False],
            state_dict_ema=weights[name, True]), folder / f'{name}.pth.tar')
    return folder


def export(capsys, run_dir: Path, folder: Path, *words) -> torch.nn.Module:
    code = cli.main(['export', str(run_dir), str(folder), *map(str, words)])
    told = capsys.readouterr()
    assert code == 0, told.err
    assert folder_problems(folder) == [] and str(folder) in told.out
    return timm.create_model(f'local-dir:{folder}', pretrained=True).eval()


def refuses(capsys, run_dir: Path, folder: Path, *words) -> str:
    assert cli.main(['export', str(run_dir), str(folder), *map(str, words)]) == 2
    err = capsys.readouterr().err
    assert err.startswith('vitlinear export: error: ') and err.count('\n') == 1
    return err


def same(model: torch.nn.Module, state_dict: dict) -> bool:
    own = model.state_dict()
    return own.keys() == state_dict.keys() and all(torch.equal(own[k], v) for k, v in state_dict.items())


@pytest.mark.parametrize('words, key, top1, epochs, told', [
    ([], ('last', True), 91.5, 3, 'moving average after the last epoch'),
    (['--no-ema'], ('last', False), None, 3, 'weights after the last epoch'),
    (['--best'], ('model_best', True), 92.25, 2, 'best epoch, 1, chosen by top1')])
def test_which_weights(capsys, run_dir, weights, tmp_path, words, key, top1, epochs: int, told: str):
    """The accuracy in the record is that of these weights, or there is none: the run evaluated its moving average."""
    folder = tmp_path / 'vvt_nano.mine'
    assert same(export(capsys, run_dir, folder, *words), weights[key])
    record = read_record(folder)
    assert [m.value for m in record.metrics] == ([top1] if top1 else [])
    assert record.training.epochs == epochs and told in record.training.weights and record.training.seeds == (7,)
    if top1:
        metric = record.metrics[0]
        assert (metric.dtype, metric.images, metric.seed) == ('bfloat16 autocast', 10000, 7)
        assert str(top1) in (folder / 'README.md').read_text()


def test_facts_of_the_run(capsys, run_dir, tmp_path):
    folder = tmp_path / 'vvt_nano.mine'
    facts = dict(
        training=dict(hardware='a machine', software=dict(torch='2.0')),
        limits='Few.',
        provenance=dict(trained_by='us'),
    )
    (tmp_path / 'facts.yaml').write_text(yaml.safe_dump(facts))
    model = export(capsys, run_dir, folder, '--facts', tmp_path / 'facts.yaml')
    record = read_record(folder)
    assert record.name == 'vvt_nano.mine' and record.cfg == PUBLISHED.cfg and record.dataset == PUBLISHED.dataset
    assert (record.parameters, record.macs) == (PUBLISHED.parameters, PUBLISHED.macs)
    assert record.training.hardware == 'a machine' and record.training.epochs == 3 and record.limits == 'Few.'
    assert record.provenance.trained_by == 'us' and record.provenance.mechanism
    assert {p.name for p in folder.iterdir()} == {
        'README.md', 'args.yaml', 'config.json', 'model.safetensors', 'record.json', 'summary.csv'}
    assert all(p.stat().st_mode & 0o777 == 0o644 for p in folder.iterdir())
    config = json.loads((folder / 'config.json').read_text())
    assert config['model_args'] == dict(in_chans=1) and config['label_names'] == list(PUBLISHED.cfg.label_names)
    assert model.num_classes == 10 and model.in_chans == 1


def test_options_of_the_model(capsys, run_dir, tmp_path):
    settings = yaml.safe_load((run_dir / 'args.yaml').read_text())
    settings.update(num_classes=4, dataset='', model_kwargs=dict(patch_stride=1), drop_path=.3)
    (run_dir / 'args.yaml').write_text(yaml.safe_dump(settings))
    made = timm.create_model('vvt_nano', num_classes=4, in_chans=1, patch_stride=1).eval()
    torch.save(dict(epoch=2, arch='vvt_nano', state_dict=made.state_dict(), optimizer={}), run_dir / 'last.pth.tar')
    model = export(capsys, run_dir, tmp_path / 'new', '--tag', 'fine', '--labels', *'abcd')
    images = torch.randn(1, 1, 32, 32)
    assert torch.equal(model(images), made(images))
    config = json.loads((tmp_path / 'new' / 'config.json').read_text())
    assert config['model_args'] == dict(patch_stride=1, in_chans=1) and config['label_names'] == [*'abcd']
    assert 'no moving average' in refuses(capsys, run_dir, tmp_path / 'new', '--tag', 'fine', '--ema')
    assert '3 names for 4 classes' in refuses(
        capsys, run_dir, tmp_path / 'new', '--tag', 'fine', '--labels', *'abc')


def test_again(capsys, run_dir, tmp_path):
    """A folder that holds a checkpoint is replaced whole; what else it holds is kept."""
    folder = tmp_path / 'vvt_nano.mine'
    export(capsys, run_dir, folder)
    (folder / 'train.log').write_text('epoch 0')
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    (tmp_path / 'facts.yaml').write_text('training: {epoch: 3}')
    assert "'epochs' is" in refuses(capsys, run_dir, folder, '--best', '--facts', tmp_path / 'facts.yaml')
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ['facts.yaml', 'output', 'vvt_nano.mine']
    export(capsys, run_dir, folder, '--best')
    assert (folder / 'train.log').read_text() == 'epoch 0' and read_record(folder).training.log == 'train.log'
    assert (folder / 'model.safetensors').read_bytes() != before['model.safetensors']


def test_mistakes(capsys, run_dir, tmp_path):
    folder = tmp_path / 'vvt_nano.mine'
    assert 'vvt_nano.TAG' in refuses(capsys, run_dir, tmp_path / 'new')
    assert 'args.yaml' in refuses(capsys, tmp_path, folder)
    photos = tmp_path / 'photos'
    photos.mkdir()
    (photos / 'a.jpg').write_bytes(b'x')
    assert 'other things' in refuses(capsys, run_dir, photos, '--tag', 'mine')
    assert 'is a file' in refuses(capsys, run_dir, photos / 'a.jpg', '--tag', 'mine')
    assert 'facts.yaml' in refuses(capsys, run_dir, folder, '--facts', tmp_path / 'facts.yaml')
    (run_dir / 'model_best.pth.tar').write_bytes((run_dir / 'last.pth.tar').read_bytes()[:100_000])
    assert 'model_best.pth.tar' in refuses(capsys, run_dir, folder, '--best')
    settings = yaml.safe_load((run_dir / 'args.yaml').read_text())
    (run_dir / 'args.yaml').write_text(yaml.safe_dump({**settings, 'num_classes': 3}))
    assert 'does not fit vvt_nano' in refuses(capsys, run_dir, folder)
    assert not folder.exists() and not [p for p in tmp_path.iterdir() if p.name.startswith('.')]


def test_disk_full(capsys, run_dir, tmp_path, monkeypatch):
    """The write that fails leaves neither half a folder nor a changed one."""
    folder = tmp_path / 'vvt_nano.mine'
    export(capsys, run_dir, folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(shutil, 'copy', full)
    assert 'No space left' in refuses(capsys, run_dir, folder, '--best')
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ['output', 'vvt_nano.mine']


# transformers

def transformers_scores(answers: list) -> torch.Tensor:
    scores = {answer['label']: answer['score'] for answer in answers}
    return torch.tensor([scores[name] for name in PUBLISHED.cfg.label_names])


def test_transformers():
    """The published folder as it stands: logits, labels and the preparation of images."""
    transformers = pytest.importorskip('transformers')
    from PIL import Image
    ours = timm.create_model(PUBLISHED.name, pretrained=True).eval()
    model = transformers.AutoModelForImageClassification.from_pretrained(PUBLISHED.folder).eval()
    images = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(images).logits, ours(images))
    assert [model.config.id2label[i] for i in range(10)] == list(PUBLISHED.cfg.label_names)
    image = Image.effect_noise((28, 28), 50)
    prepared = transformers.AutoImageProcessor.from_pretrained(PUBLISHED.folder)(image, return_tensors='pt')
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=ours))
    torch.testing.assert_close(prepared['pixel_values'], transform(image)[None])


def test_transformers_pipeline(tmp_path):
    """With three channels, into which the pipeline makes every image: models of grey images are not for it."""
    transformers = pytest.importorskip('transformers')
    from PIL import Image
    torch.manual_seed(0)
    ours = timm.create_model('vvt_nano', num_classes=10).eval()
    cfg = replace(PUBLISHED.cfg, input_size=(3, 32, 32), mean=(.4,) * 3, std=(.3,) * 3)
    folder = tmp_path / 'vvt_nano.rgb'
    export_model(ours, folder, 'rgb', cfg, dict(provenance=dict(
        trained_by='nobody', mechanism='as published', configuration='of a test')))
    image = Image.merge('RGB', [Image.effect_noise((40, 32), 50) for _ in range(3)])
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=ours))
    with torch.no_grad():
        expected = ours(transform(image)[None]).softmax(-1)[0]
    answers = transformers.pipeline('image-classification', model=str(folder))(image, top_k=10)
    torch.testing.assert_close(transformers_scores(answers), expected, rtol=1e-4, atol=1e-5)


def test_transformers_backbone():
    transformers = pytest.importorskip('transformers')
    backbone = transformers.TimmBackbone.from_pretrained(
        f'local-dir:{PUBLISHED.folder}', num_channels=1, out_indices=(1, 2)).eval()
    images = torch.randn(1, 1, 32, 32)
    ours = timm.create_model(PUBLISHED.name, pretrained=True, features_only=True, out_indices=(1, 2)).eval()
    with torch.no_grad():
        maps, expected = backbone(images).feature_maps, ours(images)
    assert len(maps) == 2 and all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))
