"""Kernels beyond the table of ops: whole models, compilers, odd arguments, and what they take of a device."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from _table import OPS
from test_ops import assert_near, value_and_grads

import vitlinear  # noqa: F401
from vitlinear import ops
from vitlinear.ops import _triton

NANOS = ['vvt_nano', 'qna_vit_nano', 'castling_nano', 'xvit_pyramid_nano', 'gkvit_nano']
OPERATORS = [
    'token_sums', 'token_apply', 'clamp_magnitude', 'depthwise', 'walk_series', 'window_attention']
# ops whose evaluation by kernels makes one graph
GRAPHS = [name for name in OPS if name not in ('walk', 'qna-large', 'vicinity-1d', 'vicinity-none', 'xnorm-value')]


@pytest.mark.parametrize('name', NANOS)
def test_models(name: str):
    """Logits and gradients of a model whose primitives are all kernels are those of plain operations."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3).eval()
    x = torch.randn(1, 3, 16, 24)

    def run(implementation: str) -> list[torch.Tensor]:
        model.zero_grad()
        with ops.use(implementation):
            out = model(x)
            out.square().sum().backward()
        return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    assert_near(run('triton'), run('torch'), 2e-4)


@pytest.mark.parametrize('trains', [False, True])
@pytest.mark.parametrize('name', GRAPHS)
def test_compiled(name: str, trains: bool):
    """One graph with operators in it for each size, and no graph for a size after the second."""
    op, graphs = OPS[name], []
    torch._dynamo.reset()

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return torch._dynamo.lookup_backend('aot_eager')(graph, inputs)

    compiled = torch.compile(op.function, fullgraph=True, backend=backend)
    for grid in ((3, 5), (4, 6), (5, 7), (7, 4)):
        inputs = [x.float() for x in op.inputs(*grid)]
        with ops.use('compiled' if name == 'window_softmax' else 'triton'), torch.set_grad_enabled(trains):
            actual = value_and_grads(compiled, inputs) if trains else [compiled(*inputs)]
        expected = value_and_grads(op.reference, inputs)
        assert_near(actual, expected if trains else expected[:1], 1e-4)
    assert len(graphs) <= 2
    assert all(any('vitlinear' in target for target in graph) for graph in graphs)


def _arguments(name: str) -> list[tuple]:
    """Of an operator, as its primitive passes them."""
    seen = []
    made = {
        'token_sums': 'vicinity-2d', 'token_apply': 'vicinity-2d', 'depthwise': 'depthwise-gelu',
        'walk_series': 'spectral', 'window_attention': 'qna'}
    if name == 'clamp_magnitude':
        return [(torch.randn(3, 5, requires_grad=True), 1e-4, 1e4)]
    torch._dynamo.reset()

    def backend(graph, inputs):
        def run(*args):
            class Record(torch.fx.Interpreter):
                def call_function(self, target, args, kwargs):
                    if name == str(target).split('.')[1 if '.' in str(target) else 0]:
                        seen.append(args)
                    return super().call_function(target, args, kwargs)
            return Record(graph).run(*args)
        return run

    op = OPS[made[name]]
    with ops.use('triton'):
        torch.compile(op.function, backend=backend, dynamic=False)(*[x.float() for x in op.inputs(3, 5)])
    return seen


@pytest.mark.parametrize('name', OPERATORS)
def test_opcheck(name: str):
    """Schema, shapes without values, gradients and dynamic shapes of an operator agree with what it does."""
    calls = _arguments(name)
    assert calls
    for args in calls:
        args = [x.detach().requires_grad_() if isinstance(x, torch.Tensor) else x for x in args]
        torch.library.opcheck(getattr(torch.ops.vitlinear, name).default, tuple(args))


def test_expanded_gradient_and_empty_batch():
    """A gradient of one number for all positions, and maps of no image."""
    q, k, v = (x.float().requires_grad_() for x in OPS['vicinity-2d'].inputs(3, 5))
    grads = []
    for implementation in ('triton', 'torch'):
        with ops.use(implementation):
            grads.append(torch.autograd.grad(ops.vicinity_attention(q, k, v).sum(), (q, k, v)))
    assert_near(*grads, 1e-4)
    with ops.use('triton'):
        out = ops.vicinity_attention(q[:0], k[:0], v[:0])
        assert out.shape == v[:0].shape
        out.sum().backward()


def test_nan_is_not_hidden():
    """A clamp keeps what is no number: training has to see it."""
    q, k, v = (x.float() for x in OPS['vicinity-2d'].inputs(3, 5))
    v[0, 0, 1, 1] = torch.nan
    with ops.use('triton'):
        out = ops.vicinity_attention(q, k, v)
        assert out[0, 0, ..., 1].isnan().all() and out[1].isfinite().all()
        assert ops.clamp_magnitude(torch.tensor([torch.nan, 0., 1e9])).tolist()[1:] == [0., 1e4]
        assert ops.clamp_magnitude(torch.tensor([torch.nan])).isnan().all()


def test_refusals():
    """What kernels cannot take goes the plain way, with a reason."""
    wide = torch.ones(1, 1, 2, 160)
    with ops.use('triton'):
        assert "'triton'" in ops.explain(ops.token_sums, wide[..., :128], wide[..., :128])
        assert "heads have 160 channels" in ops.explain(ops.token_sums, wide, wide)
        torch.testing.assert_close(ops.token_sums(wide, wide)[0], torch.full((1, 1, 160, 160), 2.))
        kernel = torch.ones(1, 1, 9, 9)
        assert '81 taps are more than the 49' in ops.explain(ops.depthwise, torch.ones(1, 9, 9, 1), kernel)
    image = torch.ones(1).expand(1, 2 ** 16, 2 ** 15, 1)
    refuses = ops.depthwise.implementations['triton'].refuses
    assert 'an image has 2147483648 entries' in refuses(image, kernel[..., :3, :3])
    assert 'kernels need a CUDA device' in ops.explain(ops.token_sums, wide, wide)


def test_turned_off(monkeypatch):
    monkeypatch.setenv('VITLINEAR_TRITON', '0')
    assert _triton._missing() == 'VITLINEAR_TRITON=0'
    monkeypatch.setenv('VITLINEAR_TRITON', '1')
    monkeypatch.setattr(_triton, 'version', lambda name: '2.1.0')
    assert _triton._missing() == 'Triton 2.1.0 is older than 3.4'
    monkeypatch.setattr(_triton.importlib.util, 'find_spec', lambda name: None)
    assert _triton._missing() == 'Triton is not installed'


def test_compiles_for_devices():
    """Every kernel fits into 48 KiB of shared memory and, but for some bytes, into registers."""
    found = subprocess.run(
        [sys.executable, Path(__file__).with_name('_compile_kernels.py'), '86'], capture_output=True, text=True,
        env={k: v for k, v in os.environ.items() if k != 'TRITON_INTERPRET'})
    assert found.returncode == 0, found.stderr
    used = json.loads(found.stdout)
    assert len(used) > 60
    for name, kernel in used.items():
        assert kernel['shared'] <= 48 * 1024 and kernel['stack'] <= 512, (name, kernel)


def test_autocast_of_convolutions():
    """A float32 map goes into the kernel as autocast has it, and comes out so, as PyTorch's convolutions do."""
    x, weight, bias = (x.float() for x in OPS['depthwise-gelu'].inputs(3, 5))
    outputs = []
    for implementation in ('triton', 'torch'):
        with ops.use(implementation), torch.autocast('cpu', torch.bfloat16):
            outputs.append(ops.depthwise_gelu(x, weight, bias))
    assert outputs[0].dtype == outputs[1].dtype == torch.bfloat16
    assert_near([outputs[0].float()], [outputs[1].float()], 2e-2)
