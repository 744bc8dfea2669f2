"""`vitlinear quantize`: the command on images of a few pixels, and what stays in floating point."""
import json
import sys
from pathlib import Path

import pytest
import timm
import torch

from _data import image_folder
from vitlinear.tools import cli

onnx = pytest.importorskip('onnx', reason='onnx is not installed (the extra export)')
onnxruntime = pytest.importorskip('onnxruntime', reason='onnxruntime is not installed (the extra export)')
pytest.importorskip('onnxscript', reason='onnxscript is not installed (the extra export)')
from vitlinear.tools import quantize  # noqa: E402

TINY = ['--model', 'test_vit', '--model-kwargs', 'img_size=32', '--img-size', '32', '--num-classes', '3', '-j', '0']


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    return image_folder(tmp_path_factory.mktemp('images'))


@pytest.fixture(scope='module')
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model('test_vit', img_size=32, num_classes=3).eval()


@pytest.fixture(scope='module')
def checkpoint(model, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp('checkpoint') / 'model.pth.tar'
    torch.save({'state_dict': model.state_dict()}, path)
    return str(path)


@pytest.fixture(scope='module')
def made(data, checkpoint, tmp_path_factory) -> Path:
    """The file that the command writes."""
    path = tmp_path_factory.mktemp('output') / 'model.onnx'
    assert cli.main([
        'quantize', *TINY, '--checkpoint', checkpoint, '--data-dir', str(data), '--output', str(path),
        '--calibration-images', '10', '--batch-size', '4', '--rounds', '2', '--threads', '1']) == 0
    return path


def refuses(capsys, *words) -> str:
    assert cli.main(['quantize', *map(str, words)]) == 2
    err = capsys.readouterr().err
    *progress, last = err.splitlines()
    assert last.startswith('vitlinear quantize: error: ') and not any('Traceback' in line for line in progress)
    return last


def test_outputs_are_near(made, model, data):
    """Of any number of images, to within a few steps of the integers."""
    run = quantize.OnnxModel(made, threads=1)
    torch.manual_seed(1)
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        expected = model(images)
    for n in (1, 3):
        error = (run(images[:n]) - expected[:n]).norm() / expected[:n].norm()
        assert 0 < error < .1


def test_what_is_written(made, model, data):
    told = json.loads(made.with_suffix('.json').read_text())
    assert sorted(p.name for p in made.parent.iterdir()) == ['model.json', 'model.onnx']
    assert told['model'] == 'test_vit' and told['images'] == 18 and told['calibration_images'] == 10
    assert told['bytes']['int8'] == made.stat().st_size < told['bytes']['float32']
    assert set(told['ms_per_image']) == {
        'torch float32', 'torch bfloat16', 'onnxruntime float32', 'onnxruntime int8'}
    assert min(told['ms_per_image'].values()) > 0
    blocks = len(model.blocks)
    assert told['quantized'] == {'Conv': 1, 'Gemm': 1, 'MatMul': 4 * blocks}
    run = quantize.OnnxModel(made, threads=1)
    dataset = timm.data.create_dataset('', root=str(data), split='validation')
    dataset.transform = timm.data.create_transform(
        (3, 32, 32), crop_pct=.95, interpolation='bicubic', mean=(.5,) * 3, std=(.5,) * 3)
    right = [run(image[None]).argmax().item() == target for image, target in dataset]
    assert told['accuracy']['int8']['top1'] == pytest.approx(100 * sum(right) / 18, abs=1e-3)


def test_weights_are_integers(made):
    graph = onnx.load(made).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    weights = [node.input[0] for node in graph.node if node.op_type == 'DequantizeLinear' and node.input[0] in types]
    assert {onnx.TensorProto.INT8} <= {types[name] for name in weights} <= {
        onnx.TensorProto.INT8, onnx.TensorProto.INT32}  # the latter are biases
    products = [node for node in graph.node if node.op_type == 'MatMul']
    made_by = {name: node.op_type for node in graph.node for name in node.output}
    quantized = [{made_by.get(name) for name in node.input} == {'DequantizeLinear'} for node in products]
    assert any(quantized) and not all(quantized)  # attention's own products are not


def test_rule():
    """By what a node does, not by its name."""
    from onnx import TensorProto, helper
    nodes = [
        helper.make_node('MatMul', ['x', 'w'], ['a'], 'product'),
        helper.make_node('MatMul', ['x', 'a'], ['b'], 'attention'),
        helper.make_node('MatMul', ['w', 'w'], ['c'], 'constants'),
        helper.make_node('Conv', ['x', 'k', 'bias'], ['d'], 'conv'),
        helper.make_node('Conv', ['x', 'k'], ['e'], 'depthwise', group=4),
        helper.make_node('Gemm', ['x', 'w', 'bias'], ['f'], 'gemm'),
        helper.make_node('LayerNormalization', ['x', 'w'], ['g'], 'norm')]
    constants = [helper.make_tensor(name, TensorProto.FLOAT, [1], [0.]) for name in ('w', 'k', 'bias')]
    graph = helper.make_graph(nodes, 'graph', [], [], constants)
    assert quantize.nodes_to_quantize(graph) == ['product', 'conv', 'gemm']


def test_calibration_images_are_prepared_as_for_evaluation(data):
    dataset = timm.data.create_dataset('', root=str(data), split='train')
    config = dict(
        input_size=(3, 16, 16), interpolation='bilinear', mean=(.5,) * 3, std=(.25,) * 3, crop_pct=1.,
        crop_mode='center')
    batches = quantize.calibration_batches(dataset, config, images=7, batch_size=3, seed=1)
    assert [tuple(batch.shape) for batch in batches] == [(3, 3, 16, 16), (3, 3, 16, 16), (1, 3, 16, 16)]
    again = quantize.calibration_batches(dataset, config, images=7, batch_size=3, seed=1)
    other = quantize.calibration_batches(dataset, config, images=7, batch_size=3, seed=2)
    assert torch.equal(torch.cat(batches), torch.cat(again)) and not torch.equal(torch.cat(batches), torch.cat(other))
    assert len(torch.cat(batches).flatten(1).unique(dim=0)) == 7
    assert sum(map(len, quantize.calibration_batches(dataset, config, images=99, batch_size=8, seed=1))) == 18


def test_mistakes(capsys, data, checkpoint, tmp_path_factory, tmp_path, monkeypatch):
    out = ['--output', tmp_path / 'model.onnx']
    other = tmp_path_factory.mktemp('other') / 'four.pth'
    torch.save(timm.create_model('test_vit', img_size=32, num_classes=4).state_dict(), other)
    known = [*TINY, '--checkpoint', checkpoint, '--data-dir', data]
    assert '--output' in refuses(capsys, *known) and '--model' in refuses(capsys, *out)
    assert 'must end in .onnx' in refuses(capsys, *known, '--output', tmp_path / 'model.pt')
    assert 'there is no folder' in refuses(capsys, *known, '--output', tmp_path / 'none' / 'model.onnx')
    assert 'give --data-dir' in refuses(capsys, *TINY, *out, '--checkpoint', checkpoint)
    assert 'did you mean' in refuses(capsys, '--model', 'vvt_tinny', *out, '--data-dir', data)
    assert 'none.pth does not exist' in refuses(capsys, *TINY, *out, '--checkpoint', 'none.pth')
    assert 'split nowhere' in refuses(capsys, *known, *out, '--calibration-split', 'nowhere')
    four = ['4' if word == '3' else word for word in TINY]
    assert 'give --num-classes 3' in refuses(capsys, *four, *out, '--checkpoint', other, '--data-dir', data)
    assert 'no meaning' in refuses(capsys, *known, *out, '--torchcompile')
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    assert "pip install 'vitlinear[export]'" in refuses(capsys, *known, *out)
    assert not list(tmp_path.iterdir())


def test_disk_full(capsys, data, checkpoint, tmp_path, monkeypatch):
    """What was there before stays as it was."""
    path = tmp_path / 'model.onnx'
    path.write_bytes(b'before')

    def full(*args, **kwargs):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(quantize, 'export_onnx', full)
    assert 'No space left' in refuses(
        capsys, *TINY, '--checkpoint', checkpoint, '--data-dir', data, '--output', path)
    assert path.read_bytes() == b'before' and [p.name for p in tmp_path.iterdir()] == ['model.onnx']
