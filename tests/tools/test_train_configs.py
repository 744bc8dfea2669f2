"""What `vitlinear train` is told: its configs, the packaged recipes, and mistakes."""

import pytest
import timm
import torch
import yaml
from _runs import COMMON, REPO, TINY, rows, weights

from _data import cifar100, fashion_mnist, image_folder
from vitlinear.tools import _errors, _flags, train
from vitlinear.tools._train_args import UNSUPPORTED
from vitlinear.tools.train import build_parser, main

CONFIGS = sorted((REPO / 'configs').glob('*.yaml'))


# the keys of the recipes that timm's script has to itself
DISTILLATION = {'kd_model_name', 'kd_distill_type', 'kd_token_distill_type', 'task_loss_weight'}


# configs


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_packaged_configs_parse_and_name_existing_models(path, tmp_path):
    assert _flags.find_config(path.stem).resolve() == path
    config = yaml.safe_load(path.read_text())
    if 'kd_model_name' in config:
        with pytest.raises(_errors.UsageError, match=r'kd_model_name .*python -m vitlinear run train.py'):
            build_parser().parse(['--config', str(path)])
        path = tmp_path / path.name
        path.write_text(yaml.safe_dump({k: v for k, v in config.items() if k not in DISTILLATION}))
    args = build_parser().parse(['--config', str(path)])
    assert timm.is_model(args.model.partition('.')[0])
    assert args.device_modules == ['vitlinear']
    if args.model.startswith('castling'):  # the branch goes, by our schedule or, in timm's script, by the model's
        assert (args.castling_ramp == [.1, .7]) != bool(args.model_kwargs.get('castling_steps'))


@pytest.mark.parametrize('name', ['qna_vit_base_in1k', 'qna_vit_base_in1k_384', 'qna_vit_tiny_cifar100_32px'])
def test_qna_vit_configs_train(name, data, tmp_path, monkeypatch):
    """With a small model, on small data of the same form; the others hold the same keys."""
    argv = ['--config', name, '--model', 'qna_vit_nano', '--img-size', '32', '--device', 'cpu', '-j', '0']
    argv += ['--amp-dtype', 'bfloat16', '--epochs', '1', '--warmup-epochs', '0', '--output', str(tmp_path)]
    argv += ['--experiment', name]
    if 'cifar' in name:
        argv += ['--data-dir', str(cifar100(tmp_path, monkeypatch, 20, 100)), '-b', '10']
    else:
        argv += ['--data-dir', data, '--num-classes', '3', '-b', '4']
    if name.endswith('384'):  # from weights for other windows and classes
        torch.save(timm.create_model('qna_vit_nano', num_classes=7).state_dict(), tmp_path / 'start.pth')
        argv += ['--pretrained-path', str(tmp_path / 'start.pth'), '--img-size', '48', '--model-kwargs', 'img_size=48']
    assert main(argv) == 0
    assert len(rows(tmp_path / name)) == 1
    if name.endswith('384'):
        assert float(rows(tmp_path / name)[0]['lr']) == pytest.approx(1e-5 * 4 * 2 / 256)
        assert weights(tmp_path / name)['stages.2.blocks.0.attn.relative_position_bias_table'].shape == (11 ** 2, 4)


@pytest.mark.parametrize('name, drop_path, warmup', [
    ('qna_vit_tiny', .05, 5), ('qna_vit_tiny_7x7', .05, 5), ('qna_vit_small', .2, 5), ('qna_vit_base', .5, 20)])
def test_qna_vit_recipe(name, drop_path, warmup):
    """A learning rate of 0.002 for the authors' batch of 1024."""
    args = build_parser().parse(['--config', f'{name}_in1k'])
    assert (args.model, args.drop_path, args.warmup_epochs) == (name, drop_path, warmup)
    assert args.lr_base * args.batch_size * 8 / args.lr_base_size == pytest.approx(2e-3) and args.lr is None
    assert (args.epochs, args.opt, args.weight_decay, args.min_lr, args.clip_grad) == (300, 'adamw', .05, 0, None)


@pytest.mark.parametrize('name', [
    'castling_levit_384_in1k', 'castling_mvitv2_base_in1k', 'castling_nano_cifar100_32px'])
def test_castling_configs_train(name, data, tmp_path, monkeypatch):
    """With a small model, on small data of the same form; the others hold the same keys."""
    argv = ['--config', name, '--model', 'castling_nano', '--img-size', '32', '--device', 'cpu', '-j', '0']
    argv += ['--model-kwargs', 'embed_dims=(8,8,16,16)', 'depths=(1,1,1,1)', 'num_heads=(1,1,2,2)', 'mlp_ratios=1.']
    argv += ['--amp-dtype', 'bfloat16', '--epochs', '1', '--warmup-epochs', '0', '--output', str(tmp_path)]
    argv += ['--experiment', name, '--aug-repeats', '0']
    if 'cifar' in name:
        argv += ['--data-dir', str(cifar100(tmp_path, monkeypatch, 20, 100)), '-b', '10']
    else:
        argv += ['--data-dir', data, '--num-classes', '3', '-b', '4']
    assert main(argv) == 0
    assert float(rows(tmp_path / name)[0]['train_castling_density']) == 0


@pytest.mark.parametrize('name, batch, epochs, drop_path, lr, others', [
    ('levit_128', 1024, 1000, 0, 1e-3, dict(weight_decay=.025, clip_grad=.01, clip_mode='agc', min_lr=1e-5)),
    ('levit_384', 1024, 1000, .1, 1e-3, dict(weight_decay=.025, clip_grad=.01, clip_mode='agc', min_lr=1e-5)),
    ('mvitv2_small', 2048, 300, .1, 2e-3, dict(weight_decay=.05, clip_grad=1, warmup_epochs=70, min_lr=1e-6)),
    ('mvitv2_base', 2048, 300, .3, 2e-3, dict(weight_decay=.05, clip_grad=1, aa='rand-m9-n6-mstd0.5-inc1')),
    ('deit_base_patch16_224', 1024, 300, .1, 1e-3, dict(weight_decay=.05, clip_grad=None, aug_repeats=3)),
    ('pvt_v2_b2', 1024, 300, .1, 1e-3, dict(weight_decay=.05, clip_grad=1)),
])
def test_castling_recipe(name, batch, epochs, drop_path, lr, others):
    args = build_parser().parse(['--config', f'castling_{name}_in1k'])
    args.world_size = 8
    train.set_lr(args)
    assert (args.model, args.batch_size * 8, args.epochs, args.opt) == (f'castling_{name}', batch, epochs, 'adamw')
    assert args.lr == pytest.approx(lr) and args.drop_path == drop_path
    assert {k: getattr(args, k) for k in others} == others
    assert (args.mixup, args.cutmix, args.smoothing, args.reprob) == (.8, 1, .1, .25)


def test_castling_steps_of_the_recipes_with_a_teacher():
    """1,281,167 images in 8 processes, whole batches alone; and nothing else than without a teacher."""
    for path in (p for p in CONFIGS if 'kd_model_name' in p.read_text()):
        config = yaml.safe_load(path.read_text())
        batches = 1281167 // 8 // config['batch_size']
        assert config.pop('model_kwargs') == {'castling_steps': batches * config['epochs']}, path
        name = path.name.replace('_distilled', '').replace('_distill', '')
        plain = yaml.safe_load(path.with_name(name).read_text())
        assert plain.pop('castling_ramp') == [.1, .7]
        assert DISTILLATION < config.keys()
        config = {k: v for k, v in config.items() if k not in DISTILLATION}
        assert {**config, 'model': plain['model']} == plain


def test_command_line_beats_yaml(tmp_path):
    path = tmp_path / 'c.yaml'
    path.write_text(
        'model: vvt_nano\nlr: 1e-3\nepochs: 7\nscale: [0.5, 1]\nmodel_kwargs: {patch_stride: 2}\namp: true\n')
    args = build_parser().parse(['-c', str(path), '--epochs', '9'])
    assert (args.model, args.lr, args.epochs, args.scale, args.amp) == ('vvt_nano', 1e-3, 9, [0.5, 1.0], True)
    assert args.model_kwargs == {'patch_stride': 2} and args.batch_size == 128


def test_packaged_config_is_found_by_name(tmp_path, monkeypatch):
    (tmp_path / 'vvt_x.yaml').write_text('epochs: 3\n')
    monkeypatch.setattr(_flags, 'config_folder', lambda: tmp_path)
    assert build_parser().parse(['--config', 'vvt_x']).epochs == 3
    with pytest.raises(_errors.UsageError, match='did you mean vvt_x'):
        _flags.find_config('vvt_y')


@pytest.mark.parametrize('text, answer', [
    ('modle: vvt_nano', 'unknown key modle, did you mean model'),
    ('epochs: two', 'epochs: expected an integer'),
    ('epochs: 2.5', 'epochs: expected an integer'),
    ('epochs: 0', 'epochs: must be 1 or more'),
    ('epochs: null', 'epochs: expected a number'),
    ('amp: 1', 'amp: expected true or false'),
    ('lr: [1]', 'lr: expected a number'),
    ('model: 3', 'model: expected a string'),
    ('scale: 0.5', 'scale: expected a list'),
    ('input_size: [3, 32]', 'input_size: expected a list of 3'),
    ('amp_dtype: half', 'amp_dtype: '),
    ('model_kwargs: a=1', 'model_kwargs: expected a mapping'),
    ('kd_model_name: resnet50', "key kd_model_name belongs to timm's train.py"),
    ('a: [1\nb', 'cannot be read as YAML'),
    ('- a\n- b', 'must hold'),
])
def test_bad_configs_get_one_line(tmp_path, capsys, text, answer):
    (tmp_path / 'c.yaml').write_text(text + '\n')
    assert main(['--config', str(tmp_path / 'c.yaml')]) == 2
    err = capsys.readouterr().err
    assert answer in err and len(err.splitlines()) == 1


def test_unsupported_keys_at_their_defaults_are_no_obstacle(tmp_path):
    (tmp_path / 'c.yaml').write_text(yaml.safe_dump({**UNSUPPORTED, 'epochs': 3}))
    assert build_parser().parse(['--config', str(tmp_path / 'c.yaml')]).epochs == 3


# mistakes


@pytest.mark.parametrize('extra, answer', [
    (['--data-dir', 'nowhere'], 'data folder nowhere does not exist'),
    (['--data-dir', ''], 'give --data-dir'),
    (['--train-split', 'foo'], 'no folder for split foo'),
    (['--val-split', 'foo'], 'no folder for split foo'),
    (['--model', 'vvt_nanoo'], 'unknown model vvt_nanoo, did you mean vvt_nano'),
    (['--dataset', 'cifar100'], 'unknown dataset cifar100, did you mean torch/cifar100'),
    (['--dataset', 'torch/cifar1000'], 'unknown dataset torch/cifar1000, did you mean torch/cifar100'),
    (['--dataset', 'torch/cifar100'], '--dataset-download'),
    (['--dataset', 'wds/x'], 'is a stream'),
    (['--config', 'nowhere.yaml'], 'neither a file nor a packaged config'),
    (['--resume', 'nowhere.pth.tar'], 'no such file'),
    (['--resume', __file__], 'damaged, or not a checkpoint'),
    (['-b', '0'], 'must be 1 or more'),
    (['-b', '19'], '18 training images are fewer than one batch of 19'),
    (['--epochs', '0'], 'must be 1 or more'),
    (['--epochs', 'x'], 'expected an integer'),
    (['--img-size', '0'], 'must be 1 or more'),
    (['--img-size', '3'], 'does not take images of 3x3x3'),
    (['--lr', 'nan'], '--lr: nan'),
    (['--device', 'cuda:99'], '--device cpu'),
    (['--device', 'nonsense'], '--device nonsense'),
    (['--num-classes', '5'], 'split train has 3 classes and the head of the model 5'),
    (['--opt', 'nonsense'], 'optimizer nonsense'),
    (['--sched', 'nonsense'], 'schedule nonsense'),
    (['--aa', 'nonsense'], 'augmentation'),
    (['--mixup', '1', '-b', '3'], 'even --batch-size'),
    (['--aug-repeats', '3'], 'torchrun'),
    (['--mean', '1', '2'], '--mean'),
    (['--initial-checkpoint', 'nowhere'], 'checkpoint nowhere does not exist'),
    (['--initial-checkpoint', __file__], '--initial-checkpoint'),
    (['--model-kwargs', 'nonsense=1'], 'nonsense'),
    (['--device-modules', 'no_such_module'], 'no_such_module'),
    (['--castling-ramp', '.1', '.7'], '--castling-ramp 0.1 0.7: VisionTransformer has no layers with an auxiliary'),
    (['--castling-ramp', '.1'], 'expected 2 arguments'),
    (['--kd-model-name', 'resnet50'], "--kd-model-name belongs to timm's train.py"),
    (['--naflex-loader'], 'python -m vitlinear run train.py'),
    (['--mixupp', '1'], 'unknown flag --mixupp, did you mean --mixup'),
])
def test_mistakes_get_one_line(data, tmp_path, capsys, extra, answer):
    argv = [*TINY, *COMMON, '--data-dir', data, '--output', str(tmp_path), *extra]
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert answer in err and len(err.splitlines()) == 1 and err.startswith('vitlinear train: error: ')
    assert not list(tmp_path.glob('*/last.pth.tar'))


def test_number_of_classes_must_be_told(data, tmp_path, capsys):
    argv = ['--model', 'test_vit', '--model-kwargs', 'img_size=32', '--img-size', '32', *COMMON, '--data-dir', data]
    assert main(argv) == 2
    assert '3 classes and the head of the model 1000: give --num-classes 3' in capsys.readouterr().err


def test_gpu_that_is_absent(data, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert main([*TINY, '--data-dir', data]) == 2
    assert '--device cpu' in capsys.readouterr().err


def test_channels_of_the_data(tmp_path, capsys):
    argv = [*TINY, *COMMON, '--num-classes', '10', '--dataset', 'torch/fashion_mnist']
    assert main([*argv, '--data-dir', str(fashion_mnist(tmp_path))]) == 2
    assert 'give --in-chans 1' in capsys.readouterr().err


def test_empty_class_folder_and_different_classes(tmp_path, capsys):
    root = image_folder(tmp_path / 'images')
    argv = [*TINY, *COMMON, '--data-dir', str(root), '--output', str(tmp_path)]
    (root / 'train' / 'empty').mkdir()
    assert main(argv) == 2
    assert f'class folder {root / "train" / "empty"} holds no images' in capsys.readouterr().err
    (root / 'train' / 'empty').rmdir()
    (root / 'validation' / 'class1').rename(root / 'validation' / 'other')
    assert main(argv) == 2
    assert 'do not have the same classes' in capsys.readouterr().err


def test_checkpoints_that_cannot_be_resumed(fit, tmp_path, capsys):
    folder = fit('a')
    last = folder / 'last.pth.tar'
    (tmp_path / 'cut.pth.tar').write_bytes(last.read_bytes()[:20000])
    torch.save(weights(folder), tmp_path / 'weights.pth')
    capsys.readouterr()
    for extra, answer in (
        (['--resume', str(tmp_path / 'cut.pth.tar')], 'damaged'),
        (['--resume', str(tmp_path / 'weights.pth')], '--initial-checkpoint'),
        (['--resume', str(last), '--model', 'test_vit2'], 'a checkpoint of test_vit, not of test_vit2'),
        (['--resume', str(last), '--sched', 'plateau'], 'plateau'),
        ([], f'holds a run: continue it with --resume {last}'),
    ):
        fit('a', *extra, expect=2)
        err = capsys.readouterr().err
        assert answer in err and len(err.splitlines()) == 1
