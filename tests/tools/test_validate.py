import csv
import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
import yaml
from PIL import Image

from _data import cifar100, fashion_mnist, image_folder
from _golden import to_authors
from vitlinear.tools.validate import UNSUPPORTED, build_parser, main, validate

COMMON = ['--device', 'cpu', '-j', '0', '-b', '8']
TINY = ['--model', 'test_vit', '--model-kwargs', 'img_size=32', '--img-size', '32']


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    return image_folder(tmp_path_factory.mktemp('images'))


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory) -> str:
    torch.manual_seed(0)
    model = timm.create_model('test_vit', img_size=32, num_classes=3)
    ema = {k: torch.zeros_like(v) for k, v in model.state_dict().items()}
    path = tmp_path_factory.mktemp('checkpoint') / 'model.pth.tar'
    torch.save({'state_dict': model.state_dict(), 'state_dict_ema': ema}, path)
    return str(path)


def by_hand(checkpoint: str, data: Path) -> float:
    model = timm.create_model('test_vit', img_size=32, num_classes=3).eval()
    model.load_state_dict(torch.load(checkpoint)['state_dict'])
    transform = timm.data.create_transform(
        (3, 32, 32), crop_pct=0.95, interpolation='bicubic', mean=(.5,) * 3, std=(.5,) * 3)
    files = sorted((data / 'validation').rglob('*.png'))
    right = [
        model(transform(Image.open(f).convert('RGB'))[None]).argmax().item() == int(f.parent.name[-1]) for f in files]
    return 100 * sum(right) / len(right)


@pytest.mark.parametrize('extra', [[], ['--no-prefetcher'], ['--channels-last'], ['-b', '5', '-j', '2']])
def test_accuracy_equals_that_of_a_plain_loop(data, checkpoint, capsys, extra):
    argv = [*TINY, *COMMON, '--num-classes', '3', '--checkpoint', checkpoint, '--data-dir', str(data), *extra]
    assert main(argv) == 0
    top1 = by_hand(checkpoint, data)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f'top-1 {top1:.2f} % (err {100 - top1:.2f} %), top-5 100.00 %, 18 images, ')
    assert last.endswith(' images/s')


def test_results_files_hold_timms_columns(data, checkpoint, tmp_path):
    argv = [*TINY, *COMMON, '--num-classes', '3', '--checkpoint', checkpoint, str(data / 'validation')]
    assert main([*argv, '--results-file', str(tmp_path / 'r.csv')]) == 0
    assert main([*argv, '--results-file', str(tmp_path / 'r.json'), '--results-format', 'json']) == 0
    with open(tmp_path / 'r.csv', newline='') as f:
        row = next(csv.DictReader(f))
    columns = 'model top1 top1_err top5 top5_err param_count img_size crop_pct interpolation'.split()
    assert list(row) == columns == list(json.loads((tmp_path / 'r.json').read_text()))
    assert row['model'] == 'test_vit' and row['img_size'] == '32' and row['crop_pct'] == '0.95'


def test_ema_weights_are_used_on_request(data, checkpoint):
    argv = [*TINY, *COMMON, '--num-classes', '3', '--checkpoint', checkpoint, '--data-dir', str(data)]
    zeros = validate(build_parser().parse([*argv, '--use-ema']))
    assert zeros['top1'] == pytest.approx(100 / 3, abs=1e-3)  # all logits equal: always class 0


def test_local_dir(data, checkpoint, tmp_path):
    model = timm.create_model('test_vit', img_size=32, num_classes=3)
    model.load_state_dict(torch.load(checkpoint)['state_dict'])
    timm.models.save_for_hf(model, str(tmp_path), model_args={'img_size': 32}, safe_serialization=True)
    args = ['--model', f'local-dir:{tmp_path}', '--img-size', '32', *COMMON, '--data-dir', str(data)]
    assert validate(build_parser().parse(args))['top1'] == pytest.approx(by_hand(checkpoint, data), abs=1e-3)


@pytest.mark.parametrize('amp', [[], ['--amp', '--amp-dtype', 'bfloat16']])
def test_fashion_mnist_format(tmp_path, amp, capsys):
    model = timm.create_model('vvt_nano', in_chans=1, num_classes=10)
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    argv = ['--model', 'vvt_nano', '--in-chans', '1', '--num-classes', '10', '--img-size', '28', *COMMON, *amp]
    argv += ['--dataset', 'torch/fashion_mnist', '--data-dir', str(fashion_mnist(tmp_path))]
    assert main([*argv, '--checkpoint', str(tmp_path / 'weights.pth')]) == 0
    assert ', 20 images, ' in capsys.readouterr().out


def test_authors_checkpoint_and_a_head_that_does_not_fit(data, tmp_path, capsys):
    model = timm.create_model('vvt_nano', num_classes=3)
    torch.save({'model': to_authors(model.state_dict())}, tmp_path / 'authors.pth')
    torch.save(model.state_dict(), tmp_path / 'ours.pth')
    argv = ['--model', 'vvt_nano', '--img-size', '32', *COMMON, '--data-dir', str(data)]
    results = [
        validate(build_parser().parse([*argv, '--num-classes', '3', '--checkpoint', str(tmp_path / name)]))
        for name in ('authors.pth', 'ours.pth')]
    assert results[0] == results[1]
    assert main([*argv, '--num-classes', '4', '--checkpoint', str(tmp_path / 'ours.pth')]) == 2
    assert 'a head for other than 4 classes: give --num-classes' in capsys.readouterr().err


def test_channels_follow_the_weights(tmp_path):
    model = timm.create_model('vvt_nano', in_chans=1, num_classes=10)
    model.pretrained_cfg.update(input_size=(1, 32, 32), mean=(.3,), std=(.35,), num_classes=10)
    timm.models.save_for_hf(model, str(tmp_path / 'folder'), safe_serialization=True)
    argv = ['--model', f'local-dir:{tmp_path / "folder"}', '--pretrained', *COMMON]
    argv += ['--dataset', 'torch/fashion_mnist', '--data-dir', str(fashion_mnist(tmp_path))]
    assert main(argv) == 0


def test_cifar100_format(tmp_path, monkeypatch, capsys):
    torch.save(timm.create_model('test_vit', img_size=32, num_classes=100).state_dict(), tmp_path / 'weights.pth')
    argv = [*TINY, *COMMON, '--num-classes', '100', '--dataset', 'torch/cifar100']
    argv += ['--data-dir', str(cifar100(tmp_path, monkeypatch)), '--checkpoint', str(tmp_path / 'weights.pth')]
    assert main(argv) == 0
    assert ', 100 images, ' in capsys.readouterr().out


def test_compiled_model_gives_the_same(data, checkpoint):
    argv = [*TINY, *COMMON, '--num-classes', '3', '--checkpoint', checkpoint, '--data-dir', str(data)]
    plain, compiled = (validate(build_parser().parse([*argv, *extra])) for extra in ([], ['--torchcompile', 'eager']))
    assert plain == compiled


@pytest.mark.parametrize('extra, answer', [
    (['--checkpoint', 'missing.pth'], 'checkpoint missing.pth does not exist'),
    (['--checkpoint', __file__], f'checkpoint {__file__}'),
    (['--model', 'vvt_nanoo', '--checkpoint', __file__], 'did you mean vvt_nano'),
    (['--num-classes', '4', '--checkpoint', 'GOOD'], 'checkpoint'),
    (['--split', 'test', '--checkpoint', 'GOOD'], 'no folder for split test'),
    (['--metrics-avg', 'micro'], "--metrics-avg belongs to timm's validate.py"),
    (['--use-emma'], 'unknown flag --use-emma, did you mean --use-ema'),
    (['--in-chans', '0'], 'must be 1 or more'),
])
def test_mistakes_get_one_line(data, checkpoint, capsys, extra, answer):
    extra = [checkpoint if word == 'GOOD' else word for word in extra]
    assert main([*TINY, *COMMON, '--num-classes', '3', '--data-dir', str(data), *extra]) == 2
    err = capsys.readouterr().err
    assert answer in err and len(err.splitlines()) == 1 and err.startswith('vitlinear validate: error: ')


def test_wrong_number_of_classes(data, tmp_path, capsys):
    torch.save(timm.create_model('test_vit', img_size=32, num_classes=4).state_dict(), tmp_path / 'weights.pth')
    argv = [*TINY, *COMMON, '--num-classes', '4', '--checkpoint', str(tmp_path / 'weights.pth')]
    assert main([*argv, '--data-dir', str(data)]) == 2
    err = capsys.readouterr().err
    assert '3 classes' in err and 'head of the model 4' in err


def test_no_flag_is_both_supported_and_refused():
    dests = {a.dest for a in build_parser()._actions}
    assert not dests & set(UNSUPPORTED)


def test_settings_of_the_run_beside_the_checkpoint(data, checkpoint, tmp_path, capsys):
    """Classes and sizes need not be said again; what is said, counts; a run of another model says nothing."""
    for model, code in (('test_vit', 0), ('test_convnext', 2)):
        path = tmp_path / model / 'last.pth.tar'
        path.parent.mkdir()
        shutil.copy(checkpoint, path)
        (path.parent / 'args.yaml').write_text(yaml.safe_dump(dict(
            model=model, num_classes=3, img_size=32, model_kwargs=dict(img_size=32), epochs=9, mean=None)))
        argv = ['--model', 'test_vit', *COMMON, '--checkpoint', str(path), '--data-dir', str(data)]
        assert main(argv) == code
        assert ('num_classes 3, img_size 32' in capsys.readouterr().err) == (code == 0)
        assert main([*argv, '--num-classes', '4']) == 2
    (tmp_path / 'test_vit' / 'args.yaml').write_text('model: test_vit\nnum_classes: many\n')
    path = tmp_path / 'test_vit' / 'last.pth.tar'
    assert main(['--model', 'test_vit', *COMMON, '--checkpoint', str(path), '--data-dir', str(data)]) == 2
    assert "num_classes: expected an integer, not 'many'" in capsys.readouterr().err
