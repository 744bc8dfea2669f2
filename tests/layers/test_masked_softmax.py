"""The auxiliary branch of linear-angular attention: its mask, thresholds, pooled keys and memory."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from _golden import castling_cases, castling_tensors
from _linear_angular import CHUNKS, GOLDEN, LAYERS, create, golden_map, golden_module, heads_of, inputs, randn, scalar
from _numerics import assert_close, saved_bytes
from vitlinear.layers.linear_angular import MaskedSoftmax
from vitlinear.ops import masked_softmax
from vitlinear.ops.primitives.few_keys import autograd as few_keys
from vitlinear.ops.primitives.few_keys import pool_keys

WITH_MASK = [name for name in LAYERS if 'mask' in castling_cases()[name]]


@pytest.mark.parametrize('chunk', CHUNKS)
def test_golden_masks(chunk: int | None):
    assert len(WITH_MASK) == 17
    for name in WITH_MASK:
        module, case = golden_module(name, chunk), castling_cases()[name]
        with torch.no_grad():
            stats = module.aux.stats(*heads_of(module, golden_map(name)))
        assert (stats['tokens'], stats['keys']) == (case['L'], case['L'])
        # an entry whose distance from the threshold is below the error of float32 may fall on either side
        entries = 0 if case['mask']['closest_to_threshold'] > 1e-6 else 1.5 / len(golden_map(name)) / case['L'] ** 2
        assert stats['density'] == pytest.approx(case['mask']['density'], rel=0, abs=max(entries, 1e-9)), name
        assert stats['rows_with_entry'] == pytest.approx(case['mask']['rows_with_entry'], rel=0, abs=1e-9), name
        assert stats['mass'] == pytest.approx(case['mask']['mass'], rel=1e-5, abs=2 * entries), name


# the switch

def both(name: str) -> list[torch.Tensor]:
    """With and without the branch."""
    module, x = golden_module(name), golden_map(name)
    out = module(x)
    module.aux.mode = 'off'
    return [out, module(x)]


@pytest.mark.parametrize('grad', [True, False])
def test_an_empty_mask_changes_nothing(grad: bool):
    """Bit by bit; and the golden outputs are equal as well."""
    with torch.set_grad_enabled(grad):
        assert torch.equal(*both('castle_empty_mask_aux'))
        assert torch.equal(*both('aux_threshold_1'))
        assert not torch.equal(*both('aux_threshold_0p5'))
    tensors = castling_tensors()
    assert torch.equal(tensors['castle_empty_mask_aux/output'], tensors['castle_empty_mask_lin/output'])


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('grad', [True, False])
def test_an_empty_mask_in_any_type(grad: bool, dtype: torch.dtype):
    for kwargs in (dict(aux_threshold=1.), dict(aux_threshold=.1, aux_kappa=36.), dict(aux_threshold=0.)):
        module, x = create(8, 2, aux_mode='always', **kwargs).to(dtype), randn(2, 6, 6, 8, dtype=dtype)
        if kwargs['aux_threshold'] == 0.:
            module.aux.ramp.fill_(1.)
        with torch.set_grad_enabled(grad):
            out = module(x)
            module.aux.mode = 'off'
            assert torch.equal(out, module(x))


def test_the_gap_of_a_small_map():
    """49 keys and 0.02: no mask is empty."""
    name = 'castle_nonempty_7x7_aux'
    out, without = both(name)
    recorded = castling_cases()[name]['gap_to_linear_form']
    gap = (out - without).norm() / out.norm()
    assert recorded == pytest.approx(.0529, abs=5e-5) and gap.item() == pytest.approx(recorded, rel=1e-4)
    torch.testing.assert_close(without, golden_map('castle_nonempty_7x7_lin', 'output'), **GOLDEN)


@settings(max_examples=40, deadline=None)
@given(N=st.integers(1, 60), scale=st.sampled_from([0., .01, 1., 100.]), seed=st.integers(0, 99), share=st.floats(
    .01, .99), chunk=st.sampled_from([None, 1, 7]))
def test_few_keys_always_leave_an_entry(N, scale, seed, share, chunk):
    """The largest of N weights is at least 1 / N, so below that each row has one, whatever the logits."""
    q, k = scale * randn(1, 2, 5, 3, seed=seed), randn(1, 2, N, 3, seed=seed + 1)
    aux = MaskedSoftmax('always', threshold=share / N, chunk=chunk)
    stats = aux.stats(q, k, k)
    assert stats['rows_with_entry'] == 1. and stats['density'] >= 1 / N - 1e-9
    assert stats['mass'] > share / N
    aux = MaskedSoftmax('always', threshold=share / N, kappa=N)  # a threshold of 1
    stats = aux.stats(q, k, k)
    assert (stats['rows_with_entry'], stats['density'], stats['mass']) == (0., 0., 0.)


@pytest.mark.parametrize('threshold, kappa', [(.02, 0.), (.02, 2.), (0., 2.), (.5, 2.), (1., 0.), (.02, 200.)])
def test_thresholds(threshold: float, kappa: float):
    """From max(threshold, kappa / N) to 1, in steps that multiply it."""
    aux = MaskedSoftmax(threshold=threshold, kappa=kappa)
    for N in (1, 49, 99, 101, 196):
        first = max(threshold, kappa / N)
        aux.reset_parameters()
        assert aux.threshold_for(N).item() == pytest.approx(first, rel=1e-6)
        values = []
        for ramp in (0., .25, .5, .75, 1.):
            aux.ramp.fill_(ramp)
            assert aux.threshold_for(N).ndim == 0
            values.append(aux.threshold_for(N).item())
            assert values[-1] == pytest.approx(first ** (1 - ramp), rel=1e-5)
        assert values[-1] == 1.  # exactly: then no weight survives
    aux.threshold.fill_(.3)
    aux.ramp.fill_(0.)
    assert aux.threshold_for(10 ** 6).item() == pytest.approx(.3)
    aux.init_non_persistent_buffers()
    assert (aux.threshold.item(), aux.ramp.item(), aux.weight.item()) == (pytest.approx(threshold), 0., 1.)


def test_the_threshold_itself_does_not_count():
    """Four equal weights are 1/4 each, exactly; and a single one is 1, which is the last threshold of a ramp."""
    v = randn(1, 2, 4, 3)
    zeros = torch.zeros(1, 2, 5, 3, dtype=torch.float64)
    for N, first in ((4, .25), (1, 1.)):
        q, k = zeros, zeros[:, :, :N]
        assert not masked_softmax(q, k, v[:, :, :N], scalar(first)).any()
        below = masked_softmax(q, k, v[:, :, :N], scalar(first * .999))
        assert_close(below, v[:, :, :N].mean(dim=2, keepdim=True).expand(-1, -1, 5, -1))
        assert MaskedSoftmax('always', threshold=first).stats(q, k, v)['density'] == 0.


def test_threshold_passes_no_gradient_and_weights_below_it_neither():
    """The mask is a constant: the gradient is that of the softmax with its cotangent cut to the mask."""
    q, k, v, _ = (x.requires_grad_() for x in inputs((4, 4)))
    threshold = scalar(.08).requires_grad_()
    out = masked_softmax(q, k, v, threshold, chunk=5)
    cotangent = randn(*out.shape, seed=9)
    grads = torch.autograd.grad(out, [q, k, v], cotangent, retain_graph=True)
    assert torch.autograd.grad(out, threshold, cotangent, allow_unused=True) == (None,)
    attn = (q @ k.transpose(2, 3) / 2).softmax(dim=-1)
    mask = (attn > .08).double()
    assert 0 < mask.mean() < 1
    by_hand = torch.autograd.grad([attn, v], [q, k, v], [
        mask * (cotangent @ v.transpose(2, 3)), (mask * attn).transpose(2, 3) @ cotangent])
    for a, b in zip(grads, by_hand):
        assert_close(a, b)


@pytest.mark.parametrize('mode, train, on', [
    ('off', True, False), ('off', False, False), ('train', True, True), ('train', False, False),
    ('always', True, True), ('always', False, True)])
def test_modes(mode: str, train: bool, on: bool):
    x, always, off = randn(2, 5, 6, 8, dtype=torch.float32), create(8, 2, aux_mode='always'), create(8, 2)
    expected = (always if on else off)(x)
    assert (always(x) - off(x)).abs().max() > .01
    calls = []
    module = create(8, 2, aux_mode=mode).train(train)
    module.aux.register_forward_hook(lambda *args: calls.append(1))
    assert torch.equal(module(x), expected)
    assert len(calls) == on and module.aux.is_on() == on
    scripted = torch.jit.script(create(8, 2, aux_mode=mode).train(train))
    torch.testing.assert_close(scripted(x), expected, rtol=1e-5, atol=1e-6)


def test_weight_and_dropout():
    """A factor of what the branch adds, and dropout of its weights in training alone."""
    x = randn(2, 5, 6, 8, dtype=torch.float32)
    module = create(8, 2, aux_mode='always', attn_drop=.5)
    q, k, v = heads_of(module, x)
    full = module.aux(q, k, v)
    torch.testing.assert_close(full, masked_softmax(q, k, v, scalar(.02)))
    module.aux.weight.fill_(.25)
    torch.testing.assert_close(module.aux(q, k, v), full / 4)
    module.aux.weight.fill_(0.)
    assert torch.equal(module(x), create(8, 2)(x))
    module.aux.weight.fill_(1.)
    assert torch.equal(module(x), create(8, 2, aux_mode='always')(x))
    module.train()
    torch.manual_seed(0)
    assert not torch.equal(module(x), module(x))
    module.aux.chunk = 7
    mean = torch.stack([module.aux(q, k, v).detach() for _ in range(300)]).mean(dim=0)
    assert (mean - full).abs().max() < .3 * full.abs().max()
    off = create(8, 2, attn_drop=.5).train()
    assert torch.equal(off(x), off(x))


# pooled keys

@pytest.mark.parametrize('grid, max_keys, side', [
    ((14, 14), 196, 1), ((28, 28), 196, 2), ((56, 56), 196, 4), ((15, 14), 196, 2), ((13, 7), 20, 3), ((1, 9), 4, 3),
    ((3, 5), 1, 5), ((4, 4), 15, 2)])
def test_pooled_keys(grid, max_keys: int, side: int):
    """Means over cells; those at the lower and right edge may be smaller, and are means of what they hold."""
    (H, W), P = grid, 2
    x = randn(2, 3, P + H * W, 4)
    out = pool_keys(x, grid, max_keys, P)
    rows, columns = -(-H // side), -(-W // side)
    assert out.shape[2] == P + rows * columns <= P + max_keys
    assert torch.equal(out[:, :, :P], x[:, :, :P])
    maps = x[:, :, P:].unflatten(2, grid)
    for i in range(rows):
        for j in range(columns):
            cell = maps[:, :, i * side:(i + 1) * side, j * side:(j + 1) * side].mean(dim=(2, 3))
            torch.testing.assert_close(out[:, :, P + i * columns + j], cell)
    if side > 1:  # it is the smallest that does
        assert -(-H // (side - 1)) * -(-W // (side - 1)) > max_keys
    assert pool_keys(x, grid, None, P) is x and pool_keys(x, None, max_keys, P) is x


def test_pooled_branch():
    """Explicit averages as keys and values, and a threshold relative to their number."""
    module = MaskedSoftmax('always', threshold=.01, kappa=1.5, max_keys=6, chunk=5)
    q, k, v = (randn(2, 3, 1 + 4 * 6, 4, seed=i) for i in range(3))
    small = [
        torch.cat([x[:, :, :1], x[:, :, 1:].unflatten(2, (2, 2, 3, 2)).mean(dim=(3, 5)).flatten(2, 3)], dim=2)
        for x in (k, v)]
    assert small[0].shape[2] == 7
    expected = (q @ small[0].transpose(2, 3) / 2).softmax(dim=-1)
    expected = torch.where(expected > float(torch.tensor(1.5 / 7)), expected, 0.)
    assert_close(module(q, k, v, (4, 6), 1), expected @ small[1])
    stats = module.stats(q, k, v, (4, 6), 1)
    assert (stats['tokens'], stats['keys']) == (25, 7)
    assert stats['density'] == pytest.approx((expected > 0).double().mean().item())
    assert stats['mass'] == pytest.approx(expected.sum(dim=-1).mean().item(), rel=1e-6)
    module = create(8, 2, aux_mode='always', aux_max_keys=9, aux_threshold=0.)
    keys = []
    module.aux.register_forward_pre_hook(lambda m, args: keys.append(m.stats(*args)['keys']))
    module(randn(1, 12, 9, 8, dtype=torch.float32))
    assert keys == [9]


# memory

def test_memory_of_the_branch(monkeypatch):
    """Neither what is kept for the backward pass nor any step of it holds more than chunk * keys weights per head."""
    B, heads, H, W, d, chunk = 1, 2, 56, 56, 4, 100
    q, k, v = (randn(B, heads, H * W, d, seed=i, dtype=torch.float32).requires_grad_() for i in range(3))
    steps = []
    step = few_keys.attend
    monkeypatch.setattr(few_keys, 'attend', lambda q, k, *args: steps.append(
        (q.shape[2], k.shape[2])) or step(q, k, *args))

    def kept(chunk: int | None, max_keys: int | None, queries: int = H * W) -> int:
        module = MaskedSoftmax('always', threshold=0., max_keys=max_keys, chunk=chunk)
        return saved_bytes(lambda *args: module(*args, (H, W)), q[:, :, :queries], k, v)

    weights = 4 * B * heads * H * W
    assert kept(None, None, 392) >= weights * 392  # of 49 keys and up this is all that counts
    steps.clear()
    size = kept(chunk, 196)
    assert max(n for n, _ in steps) == chunk and {m for _, m in steps} == {196}
    maps = 3 * weights * d
    assert size < 2 * maps < weights * 196 / 8
    assert kept(None, 196) > weights * 196

    steps.clear()
    module = MaskedSoftmax('always', threshold=0., max_keys=196, chunk=chunk)
    module(q, k, v, (H, W)).sum().backward()
    assert len(steps) == 2 * math.ceil(H * W / chunk) and max(n * m for n, m in steps) == chunk * 196
    steps.clear()
    with torch.no_grad():
        module(q, k, v, (H, W))
    assert not steps  # the plain operations, in chunks as well
