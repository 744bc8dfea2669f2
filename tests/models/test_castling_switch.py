"""The auxiliary branch of Castling models: what is measured of it, how it is removed, and the schedules between."""
import copy
import pickle
import re
from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from _golden import castling_cases, castling_part, castling_tensors
from _models import CASTLING, CLOSE, FORMS, build, create, images
from vitlinear.layers import LinearAngularAttention
from vitlinear.layers.linear_angular import LinearAngular
from vitlinear.models import CastlingSchedule
from vitlinear.models._castling import Castling

DISTILLED = ['levit_distilled', 'deit_distilled']
X = images(3, 3, 32, 32)


def layers(model: nn.Module) -> list[LinearAngular]:
    return list(model.castling_layers().values())


def modes(model: nn.Module) -> set[str]:
    return {layer.aux.mode for layer in layers(model)}


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Of the weights alone, without the count of a schedule."""
    return {k: v.clone() for k, v in model.state_dict().items() if k != 'castling_step'}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


# what is measured

class OneLayer(Castling, nn.Module):
    def __init__(self, name: str):
        super().__init__()
        case = castling_cases()[name]
        config = case['constructor']
        self.attn = LinearAngularAttention(
            config['in_channels'], config['num_heads'], qkv_bias=config['qkv_bias'],
            aux_threshold=case['threshold'], aux_max_keys=None)
        self.attn.load_state_dict(castling_part('params:' + case['params']))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn(x.unsqueeze(1))


@pytest.mark.parametrize('name', ['castle_nonempty_7x7_aux', 'castle_empty_mask_aux', 'aux_8x10_nonsquare_grad'])
def test_stats_of_golden_masks(name: str):
    model, case, x = OneLayer(name), castling_cases()[name], castling_tensors()[f'{name}/input']
    stats = model.castling_stats(x)['attn']
    expected = dict(case['mask'], tokens=case['L'], keys=case['L'])
    if 'castle' in name:
        other = castling_tensors()[name.replace('_aux', '_lin') + '/output']
        output = castling_tensors()[f'{name}/output']
        expected['gap'] = ((output - other).norm() / output.norm()).item()
        assert expected['gap'] == pytest.approx(case.get('gap_to_linear_form', 0.), rel=1e-4)
    for key, value in stats.items():
        tolerance = dict(rel=1e-3) if key == 'gap' else dict(rel=1e-5) if key == 'mass' else dict(rel=0, abs=1e-9)
        if key in expected:
            assert value == pytest.approx(expected[key], **tolerance), key
    assert stats.keys() == {'tokens', 'keys', 'density', 'rows_with_entry', 'mass', 'gap'}
    # means over batches, those of a loader too
    parts = [model.castling_stats(part)['attn'] for part in (x[:1], x[1:])]
    assert model.castling_stats([x[:1], (x[1:], torch.zeros(1))])['attn'] == pytest.approx(
        {k: (parts[0][k] + parts[1][k]) / 2 for k in stats})


def test_stats_are_those_of_training():
    """Whatever the mode, the branch is on in the layers before; its weight counts in the gap."""
    model = create('deit', attn_kwargs=dict(aux_threshold=.1, aux_kappa=0.))
    stats = []
    for mode, weight in (('off', 1.), ('train', 1.), ('always', 1.), ('always', .5)):
        model.set_castling(mode=mode, weight=weight)
        stats.append(model.castling_stats(X))
        assert list(stats[-1]) == ['blocks.0.attn', 'blocks.1.attn'] and modes(model) == {mode}
    assert stats[0] == stats[1] == stats[2] and stats[3]['blocks.0.attn']['gap'] < stats[0]['blocks.0.attn']['gap']
    assert stats[3]['blocks.1.attn']['density'] != stats[0]['blocks.1.attn']['density']  # of another input


@pytest.mark.parametrize('form', CASTLING)
def test_stats_leave_no_trace(form: str):
    """Neither in modes nor in batch norms nor in the count of a schedule; the keys of all layers are counted."""
    model = create(form, castling_steps=10).train()
    before = copy.deepcopy(model.state_dict())
    stats = model.castling_stats(X)
    assert list(stats) == list(model.castling_layers())
    keys = dict(
        nano=[64, 64], levit=[64, 64, 16], levit_distilled=[64, 64, 16], mvitv2=[64, 16], pvt_v2=[64],
        deit=[17, 17], deit_distilled=[18, 18])[form]
    assert [s['keys'] for s in stats.values()] == keys and same(model.state_dict(), before)
    assert all(not layer.aux._forward_pre_hooks and not layer._forward_hooks for layer in layers(model))
    with pytest.raises((ValueError, RuntimeError), match='channels'):
        model.castling_stats(images(2, 7, 32, 32))
    assert model.training and modes(model) == {'train'}
    with pytest.raises(ValueError, match='at least one batch'):
        model.castling_stats([])


def test_set_castling():
    model = create('nano')
    buffers = [(layer.aux.threshold, layer.aux.weight, layer.aux.ramp) for layer in layers(model)]
    model.set_castling(threshold=.1)
    model.set_castling(mode='always', weight=.5)
    model.set_castling(ramp=.25)
    for layer, kept in zip(layers(model), buffers, strict=True):
        assert [b.item() for b in kept] == pytest.approx([.1, .5, .25])
        assert layer.aux.threshold is kept[0] and layer.aux.ramp is kept[2]  # a compiled model goes on with them
    for kwargs, words in (
            (dict(mode='on', weight=9.), "mode 'on'"), (dict(threshold=1.1, weight=9.), 'threshold=1.1'),
            (dict(ramp=-.1, weight=9.), 'ramp=-0.1')):
        with pytest.raises(ValueError, match=re.escape(words)):
            model.set_castling(**kwargs)
    assert {layer.aux.weight.item() for layer in layers(model)} == {.5} and modes(model) == {'always'}


# the switch

@pytest.mark.parametrize('how', [dict(ramp=1.), dict(threshold=1.), dict(weight=0.)])
@pytest.mark.parametrize('form', CASTLING)
def test_switch_with_empty_masks(form: str, how: dict):
    """Bit by bit the same outputs, the same parameters under the same names."""
    model = create(form, attn_kwargs=dict(aux_mode='train'))
    keys = list(model.state_dict())
    assert keys == list(create(form).state_dict()) and not any('aux' in k for k in keys)
    model.set_castling(mode='always', **how)
    with_branch = model(X)
    model.set_castling(mode='train')
    assert model.switch_to_inference(X) is model
    assert torch.equal(model(X), with_branch) and list(model.state_dict()) == keys and modes(model) == {'off'}
    if form not in DISTILLED:
        assert torch.equal(create(form)(X), with_branch)


@pytest.mark.parametrize('mode', ['train', 'always'])
@pytest.mark.parametrize('form', CASTLING)
def test_switch_with_masks_that_are_not_empty(form: str, mode: str):
    """An error with the measured gap and a tolerance that would do; the model is left as it was."""
    model = create(form, castling_steps=20).train()
    model.set_castling(mode=mode, weight=.75)
    before = copy.deepcopy(model)
    reference = copy.deepcopy(model).eval()
    outs = []
    for m in ('always', 'off'):
        reference.set_castling(mode=m)
        outs.append(reference(X))
    gap = (outs[0] - outs[1]).abs().max().item()
    with pytest.raises(ValueError, match=r'changes by ([0-9.e+-]+), more than tol=0.0') as e:
        model.switch_to_inference(X)
    assert float(re.search('changes by (\\S+),', str(e.value))[1]) == pytest.approx(gap, rel=.01)
    assert model.training and modes(model) == {mode} and same(model.state_dict(), before.state_dict())
    with pytest.raises(ValueError, match='more than tol'):
        model.switch_to_inference(X, tol=gap * .9)
    tol = float(re.search('tol=(\\S+)\\.$', str(e.value))[1])
    assert gap <= tol < 5 * gap
    model.switch_to_inference(X, tol=tol)
    assert torch.equal(model.eval()(X), outs[1]) and 'castling_step' not in model.state_dict()
    assert torch.equal(before.switch_to_inference().eval()(X), outs[1])  # without a sample nothing is compared


def test_switch_looks_at_broken_outputs():
    model = create('deit', attn_kwargs=dict(aux_mode='always'))
    with torch.no_grad():
        model.head.bias[0] = float('nan')
    with pytest.raises(ValueError, match='changes by nan'):
        model.switch_to_inference(X, tol=1e9)


def test_switch_of_some_layers():
    """A layer that is off already takes no part in the comparison."""
    model = create('deit', attn_kwargs=dict(aux_mode='always'))
    first, second = layers(model)
    first.aux.mode = 'off'
    second.aux.threshold.fill_(1.)
    out = model(X)
    assert torch.equal(model.switch_to_inference(X)(X), out)


def test_modes_of_modules_are_kept():
    """Those of frozen norms in a model in training, for example."""
    model = create('levit', attn_kwargs=dict(aux_mode='train')).train()
    model.stem.conv1.bn.eval()
    model.stages[1].blocks.eval()
    before = [m.training for m in model.modules()]
    model.castling_stats(X)
    for images_, words in ((X, 'more than tol'), (images(2, 4, 32, 32), 'channels')):
        with pytest.raises((ValueError, RuntimeError), match=words):
            model.switch_to_inference(images_)
    model.switch_to_inference(X, tol=1e9)
    assert [m.training for m in model.modules()] == before and 0 < sum(before) < len(before)


@pytest.mark.parametrize('form', ['nano', 'levit', 'deit'])
def test_nothing_of_the_branch_is_exported(form: str):
    """Nor scripted; with the branch on, its softmax and threshold are in the graph."""
    def operators(model: nn.Module) -> set[str]:
        program = torch.export.export(model, (X,))
        graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
        return {str(node.target) for graph in graphs for node in graph.nodes if node.op == 'call_function'}

    model = create(form, castling_steps=5)
    model.set_castling(mode='always')
    found = operators(model)
    assert any('softmax' in op for op in found) and any('.pow.' in op for op in found)
    model.switch_to_inference()
    assert not [op for op in operators(model) if 'softmax' in op or '.pow.' in op]
    torch.testing.assert_close(torch.jit.script(model)(X), model(X), **CLOSE)


@pytest.mark.slow
def test_onnx(tmp_path):
    """For any batch and size, without a softmax."""
    onnx, runtime = pytest.importorskip('onnx'), pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    model, path = create('nano').switch_to_inference(), tmp_path / 'model.onnx'
    dynamic = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    torch.onnx.export(
        model, (images(2, 3, 64, 96),), path, dynamo=True, dynamic_shapes=(dynamic,), verbose=False)
    assert 'Softmax' not in {node.op_type for node in onnx.load(path).graph.node}
    session = runtime.InferenceSession(path, providers=['CPUExecutionProvider'])
    for shape in ((2, 3, 64, 96), (1, 3, 32, 64)):
        out = session.run(None, {session.get_inputs()[0].name: images(*shape).numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(out), model(images(*shape)).detach(), rtol=1e-3, atol=1e-4)


# schedules

def thresholds(model: nn.Module) -> list[float]:
    stats = model.castling_stats(images(1, 3, 32, 32)).values()
    return [layer.aux.threshold_for(s['keys']).item() for layer, s in zip(layers(model), stats, strict=True)]


def ramp_at(step: float, total: int, ramp=(.1, .7)) -> float:
    return min(max((step / total - ramp[0]) / (ramp[1] - ramp[0]), 0.), 1.)


def test_schedule():
    """Each layer from its own threshold to 1 on a logarithmic scale, then off.

    It begins at 0.02 at least, and above 1 / keys, so that a mask of few keys can be empty.
    """
    assert thresholds(create('mvitv2')) == pytest.approx([2 / 64, 2 / 16])
    assert thresholds(create('nano', attn_kwargs=dict(aux_kappa=0.))) == pytest.approx([.02, .02])
    model = create('nano')
    first = [2 / 64, 2 / 64]
    schedule = CastlingSchedule(model, 20)
    for step in range(20):
        t = ramp_at(step, 20)
        assert thresholds(model) == pytest.approx([x ** (1 - t) for x in first], rel=1e-5), step
        assert modes(model) == {'off' if step >= 14 else 'train'}
        schedule.step()
    schedule.step(8)  # as a resumed training does
    assert thresholds(model) == pytest.approx([x ** .5 for x in first], rel=1e-5) and modes(model) == {'train'}
    schedule.step()
    assert schedule.steps == 9

    model = create('nano')
    schedule = CastlingSchedule(model, 7, ramp=(0., .5), kappa=6.4)
    for step in range(7):
        assert thresholds(model)[0] == pytest.approx(.1 ** (1 - ramp_at(step, 7, (0., .5))), rel=1e-5)
        schedule.step()
    model.switch_to_inference(X)


@pytest.mark.parametrize(('make', 'words'), [
    (lambda: CastlingSchedule(timm.create_model('vvt_nano'), 10), 'VicinityVisionTransformer has no layers'),
    (lambda: CastlingSchedule(build('deit', softmax_below=99), 10), 'has no layers'),
    (lambda: CastlingSchedule(build('deit'), 0), 'total_steps=0'),
    (lambda: CastlingSchedule(build('deit'), 10, kappa=-1.), 'kappa=-1.0'),
    (lambda: CastlingSchedule(build('deit'), 10, ramp=(.5, .5)), 'ramp=(0.5, 0.5)'),
    (lambda: CastlingSchedule(build('deit', castling_steps=5), 10), 'by itself already'),
    (lambda: build('deit').schedule_castling(0), 'castling_steps=0'),
    (lambda: build('levit', castling_steps=-1), 'castling_steps=-1'),
    (lambda: build('mvitv2', castling_steps=10, castling_ramp=(.9, 1.1)), 'ramp=(0.9, 1.1)'),
    (lambda: build('nano', castling_ramp=(.7, .1)), 'ramp=(0.7, 0.1)'),
])
def test_bad_schedules(make: Callable, words: str):
    with pytest.raises(ValueError, match=re.escape(words)):
        make()


def train(model: nn.Module, steps: range) -> list[float]:
    """Steps of gradient descent on images of their own, and the ramp in each."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=.05)
    ramps = []
    for step in steps:
        loss = model(images(2, 3, 32, 32, seed=step)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ramps.append(layers(model)[0].aux.ramp.item())
    return ramps


@pytest.mark.parametrize('form', CASTLING)
def test_counted_forwards(form: str):
    """The model follows the ramp of a CastlingSchedule by itself, in training mode alone."""
    for total in (10, 7):  # with 7, the ramp ends between two steps
        model = create(form, castling_steps=total)
        kept = [layer.aux.ramp for layer in layers(model)]
        for step in range(9):
            model.train()
            assert model.castling_step == step
            model(X)
            assert [ramp.item() for ramp in kept] == pytest.approx([ramp_at(step, total)] * len(kept))
            # 'off' is the forward pass in which the ramp is over, no earlier: there the branch adds exactly nothing
            assert modes(model) == {'train' if kept[0] < 1. else 'off'}
            model.eval()
            model(X)
        assert kept[0] == 1. and all(layer.aux.ramp is ramp for layer, ramp in zip(layers(model), kept, strict=True))


def test_both_schedules_agree():
    counting, stepping, plain = create('nano', castling_steps=10), create('nano'), create('nano')
    schedule = CastlingSchedule(stepping, 10)
    ramps = []
    for step in range(10):
        ramps.append(layers(stepping)[0].aux.ramp.item())
        train(stepping, range(step, step + 1))
        schedule.step()
    train(plain, range(10))
    assert train(counting, range(10)) == pytest.approx(ramps)
    assert same(state(counting), state(stepping)) and not same(state(plain), state(stepping))


@pytest.mark.parametrize('form', ['nano', 'levit', 'deit'])
def test_exact_resume(form: str):
    """Saved at a step and loaded into a new model: the same parameters and the same ramp."""
    model = create(form, castling_steps=10)
    train(model, range(3))
    saved = copy.deepcopy(model.state_dict())
    assert saved['castling_step'] == 3
    ramps = train(model, range(3, 9))
    other = create(form, seed=5, castling_steps=10)
    other.load_state_dict(saved)
    assert train(other, range(3, 9)) == ramps and ramps[0] > 0
    assert same(other.state_dict(), model.state_dict())


def test_loading_into_the_other_form():
    """Strictly, and either way."""
    training, inference = create('nano', castling_steps=10), create('nano', seed=1)
    train(training, range(4))
    saved = training.state_dict()
    inference.load_state_dict(saved, strict=True)
    assert 'castling_step' in saved  # and that dict is left alone
    training.switch_to_inference(tol=float('inf'))
    assert same(training.state_dict(), inference.state_dict())
    assert torch.equal(training.eval()(X), inference.eval()(X))
    again = create('nano', seed=2, castling_steps=10)
    train(again, range(2))
    again.load_state_dict(inference.state_dict(), strict=True)
    assert again.castling_step == 0  # weights to start from
    wrapper, fresh = nn.ModuleDict(dict(model=again)), nn.ModuleDict(dict(model=create('nano')))
    fresh.load_state_dict(wrapper.state_dict(), strict=True)
    wrapper.load_state_dict(fresh.state_dict(), strict=True)


@pytest.mark.parametrize('steps', [0, 10])
def test_pretrained_weights_begin_a_schedule(tmp_path, steps: int):
    """Through create_model, where a checkpoint has a count or has none."""
    trained = create('nano', castling_steps=steps)
    train(trained, range(3))
    torch.save(trained.state_dict(), tmp_path / 'a.pth')
    name, small = FORMS['nano']
    overlay = dict(file=str(tmp_path / 'a.pth'), num_classes=5)
    for castling_steps in (0, 10):
        model = timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay=overlay, castling_steps=castling_steps, **small)
        assert model.state_dict().get('castling_step', 0) == 0 and same(state(model), state(trained))


@pytest.mark.parametrize('copier', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_count_for_themselves(copier: Callable):
    model = create('deit', castling_steps=10)
    train(model, range(3))
    other = copier(model)
    assert train(other, range(3, 8)) == train(copier(model), range(3, 8))
    assert (other.castling_step, model.castling_step) == (8, 3)
    third = copier(model).switch_to_inference()
    third.train()(X)
    assert not hasattr(third, 'castling_step')
    model(X)
    assert model.castling_step == 4  # ending the copy's schedule left this one


def test_a_new_schedule_replaces_the_old():
    model = create('nano', castling_steps=4)
    train(model, range(4))
    model.schedule_castling(20, ramp=(0., 1.))
    assert train(model, range(5)) == pytest.approx([i / 20 for i in range(5)])


def test_gradient_checkpointing_counts_once():
    model = create('deit', castling_steps=10)
    other = copy.deepcopy(model)
    other.set_grad_checkpointing(True)
    assert train(model, range(6)) == train(other, range(6))
    for (k, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, **CLOSE, msg=k)


@pytest.mark.parametrize(('form', 'backend'), [('deit', 'aot_eager'), ('levit', 'eager')])
def test_compiled_training(form: str, backend: str):
    """Two graphs, of the ramp and of the rest, with the results of the model as written; none is compiled again."""
    torch._dynamo.reset()
    model = create(form, castling_steps=10, attn_kwargs=dict(aux_chunk=9))
    expected = copy.deepcopy(model)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model.train(), backend=counter, fullgraph=True)
    for step in range(9):
        for m in (compiled, expected.train()):
            m.zero_grad()
            m(images(2, 3, 32, 32, seed=step)).square().mean().backward()
        assert layers(model)[0].aux.ramp == layers(expected)[0].aux.ramp, step
        assert counter.frame_count == 2, step
        for a, b in zip(model.parameters(), expected.parameters(), strict=True):
            # gradients before a batch norm are zero but for rounding, which differs between machines
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4 * b.grad.abs().max().item() + 5e-6)
    assert model.castling_step == expected.castling_step == 9 and layers(model)[0].aux.ramp == 1.
