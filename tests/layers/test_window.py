"""Windowed attention against the authors' numbers and against padded, masked windows written out."""
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from _golden import qna_cases, qna_part, qna_tensors
from _numerics import TIGHT
from vitlinear.layers import WindowAttention
from vitlinear.layers.window import resize_relative_position_bias_table
from vitlinear.ops.primitives.window_softmax import relative_position_bias

SIZES = [(1, 1), (3, 3), (4, 6), (5, 7), (7, 2), (9, 10)]


def create(*args, seed: int = 0, **kwargs) -> WindowAttention:
    """A module in eval mode whose biases and scores count."""
    torch.manual_seed(seed)
    module = WindowAttention(*args, **kwargs)
    for p in module.parameters():
        nn.init.normal_(p, std=1.5 * p[0].numel() ** -.5)
    nn.init.normal_(module.relative_position_bias_table)
    return module.eval()


def randn(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def sides(n: int, largest: int) -> int:
    """Side of the windows of a map: as few as possible, of one size."""
    return math.ceil(n / math.ceil(n / largest))


def by_pairs(module: WindowAttention, x: torch.Tensor) -> torch.Tensor:
    """Every pair of positions; those in other windows, and the padding that fills the last windows, are masked."""
    _, H, W, _ = x.shape
    heads, d = module.num_heads, module.head_dim
    h, w = sides(H, module.window_size[0]), sides(W, module.window_size[1])
    padded = F.pad(x, (0, 0, 0, -W % w, 0, -H % h))
    rows, columns = padded.shape[1:3]
    y, x_ = (t.flatten() for t in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing='ij'))
    same = (y[:, None] // h == y // h) & (x_[:, None] // w == x_ // w) & (y < H) & (x_ < W)
    # query minus key, in a table of (2 h - 1) by (2 w - 1) for the largest windows
    top, left = module.window_size
    index = (y[:, None] - y + top - 1).clamp(0, 2 * top - 2) * (2 * left - 1) + (
        x_[:, None] - x_ + left - 1).clamp(0, 2 * left - 2)
    bias = module.relative_position_bias_table[index].permute(2, 0, 1)
    q, k, v = module.qkv(padded).flatten(1, 2).unflatten(2, (3, heads, d)).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-2, -1) / math.sqrt(d) + bias
    # padded queries see something as well, or their rows would be nan; they are cut off
    weights = scores.masked_fill(~same & (y < H)[:, None] & (x_ < W)[:, None], -math.inf).softmax(dim=-1)
    out = (weights @ v).transpose(1, 2).flatten(2).unflatten(1, (rows, columns))
    return module.proj(out)[:, :H, :W]


@pytest.mark.parametrize('grad', [True, False])
def test_golden_window(grad: bool):
    """One window of the authors' layer, whose projection holds queries, keys and values head by head."""
    config = qna_cases()['msa_w3']['config']
    params, heads, C = qna_part('params:msa_w3'), config['heads'], config['features']
    module = WindowAttention(C, heads, config['window_size'])
    qkv = params['to_qkv/kernel'].t().reshape(heads, 3, -1, C).transpose(0, 1).reshape(3 * C, C)
    module.load_state_dict({
        'qkv.weight': qkv, 'proj.weight': params['to_out/kernel'].t(),
        'relative_position_bias_table': params['RelativePositionalEmbedding_0/rpe_bias']})
    with torch.set_grad_enabled(grad):
        out = module.eval()(qna_tensors()['msa_w3/input'].unflatten(1, (3, 3)))
    torch.testing.assert_close(out.flatten(1, 2), qna_tensors()['msa_w3/output'], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize('name', ['rpe_resize_13_23', 'rpe_resize_27_47', 'rpe_resize_13_9'])
def test_golden_resizing(name: str):
    old, new = ((qna_cases()[name]['config'][k] + 1) // 2 for k in ('old', 'new'))
    table, expected = (qna_tensors()[f'{name}/{what}'] for what in ('input', 'output'))
    assert len(table) == (2 * old - 1) ** 2
    resized = resize_relative_position_bias_table(table, (old, old), (new, new))
    torch.testing.assert_close(resized, expected, rtol=0, atol=1e-5)
    assert resize_relative_position_bias_table(table, (old, old), (old, old)) is table


def test_resizing_of_one_side():
    """Rows and columns are resized by themselves: either side alone, or both at once."""
    table = randn(5 * 7, 2)
    rows = resize_relative_position_bias_table(table, (3, 4), (6, 4))
    both = resize_relative_position_bias_table(table, (3, 4), (6, 2))
    assert rows.shape == (11 * 7, 2) and both.shape == (11 * 3, 2)
    torch.testing.assert_close(resize_relative_position_bias_table(rows, (6, 4), (6, 2)), both)
    transposed = table.unflatten(0, (5, 7)).transpose(0, 1).flatten(0, 1)
    transposed = resize_relative_position_bias_table(transposed, (4, 3), (4, 6))
    torch.testing.assert_close(transposed.unflatten(0, (7, 11)).transpose(0, 1).flatten(0, 1), rows)
    half = resize_relative_position_bias_table(table.bfloat16(), (3, 4), (6, 4))
    assert half.dtype == torch.bfloat16 and (half.float() - rows).abs().max() < .05


@pytest.mark.parametrize('window, size', [((3, 3), (3, 3)), ((4, 2), (4, 2)), ((4, 5), (2, 3)), ((3, 6), (1, 6))])
def test_bias_of_each_pair(window, size):
    """By brute force: the entry of a query and a key is that of their difference."""
    (h, w), (H, W) = window, size
    table = randn((2 * h - 1) * (2 * w - 1), 2)
    bias = relative_position_bias(table, window, H, W)
    assert bias.shape == (2, H * W, H * W)
    for query in range(H * W):
        for key in range(H * W):
            dy, dx = query // W - key // W, query % W - key % W
            assert torch.equal(bias[:, query, key], table[(dy + h - 1) * (2 * w - 1) + dx + w - 1])


@pytest.mark.parametrize('window', [3, (2, 5), (4, 4)])
@pytest.mark.parametrize('size', SIZES)
def test_pairs(size, window):
    """Values and gradients, for maps that windows divide, those they do not, and those smaller than one."""
    module = create(6, 3, window, qkv_bias=True, proj_bias=True, dtype=torch.float64)
    x = randn(2, *size, 6, dtype=torch.float64).requires_grad_()
    cotangent = randn(2, *size, 6, seed=1, dtype=torch.float64)
    results = []
    for fn in (module, lambda x: by_pairs(module, x)):
        out = fn(x)
        results.append([out, *torch.autograd.grad(out, [x, *module.parameters()], cotangent)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, **TIGHT)
    with torch.no_grad():
        for _ in range(2):  # the second with what the first has kept
            torch.testing.assert_close(module(x), results[1][0].detach(), **TIGHT)


@pytest.mark.parametrize('size', [(3, 3), (5, 7)])
def test_scripted(size):
    module, x = create(6, 3, 3), randn(2, *size, 6)
    torch.testing.assert_close(torch.jit.script(module)(x), module(x))


def test_windows_are_apart():
    """What happens in one window stays there."""
    module, x = create(4, 2, (3, 4)), randn(1, 6, 8, 4)
    expected = module(x)
    x[0, 1, 5] += 1.
    changed = (module(x) - expected).abs().amax(dim=(0, 3)) > 1e-6
    assert changed[:3, 4:].all() and changed.sum() == 12


def test_set_window_size():
    module, x = create(6, 3, (3, 4)), randn(2, 9, 8, 6)
    table = module.relative_position_bias_table.detach().clone()
    with torch.no_grad():
        module(x)
    module.set_window_size((5, 8))
    assert module.window_size == (5, 8) and module.relative_position_bias_table.shape == (9 * 15, 3)
    assert torch.equal(
        module.relative_position_bias_table, resize_relative_position_bias_table(table, (3, 4), (5, 8)))
    assert isinstance(module.relative_position_bias_table, nn.Parameter)
    with torch.no_grad():
        torch.testing.assert_close(module(x), by_pairs(module, x), rtol=1e-4, atol=1e-5)
    module.relative_position_bias_table.requires_grad_(False)
    module.set_window_size(2)
    assert module.window_size == (2, 2) and not module.relative_position_bias_table.requires_grad
    with pytest.raises(ValueError, match=r'window_size=\(0, 3\)'):
        module.set_window_size((0, 3))
    assert module.window_size == (2, 2) and module.relative_position_bias_table.shape == (9, 3)


def test_same_window_size_keeps_the_parameter():
    """An optimizer that holds it goes on training it."""
    module = create(6, 3, (3, 4))
    table = module.relative_position_bias_table
    module.set_window_size((3, 4))
    assert module.relative_position_bias_table is table


def change_in_place(module):
    with torch.no_grad():
        module.relative_position_bias_table.add_(randn(25, 2))


def change_data(module):
    module.relative_position_bias_table.data = randn(25, 2)


def change_parameter(module):
    module.relative_position_bias_table = nn.Parameter(randn(25, 2))


def change_memory(module):
    module.relative_position_bias_table.detach().numpy()[...] += randn(25, 2).numpy()


def load(module):
    module.load_state_dict({**module.state_dict(), 'relative_position_bias_table': randn(25, 2)})


@pytest.mark.parametrize('change', [change_in_place, change_data, change_parameter, change_memory, load])
def test_inference_follows_the_table(change):
    module, x = create(4, 2, 3), randn(2, 3, 6, 4)
    with torch.no_grad():
        before = module(x)
        change(module)
        out = module(x)
        assert (out - before).abs().max() > 1e-2
    torch.testing.assert_close(out, module(x).detach(), rtol=1e-5, atol=1e-6)
    other = copy.deepcopy(module)
    assert list(other.state_dict()) == ['relative_position_bias_table', 'qkv.weight', 'proj.weight']
    with torch.no_grad():
        assert torch.equal(other(x), out)
        torch.testing.assert_close(module.double()(x.double()).float(), out, rtol=1e-5, atol=1e-6)


def test_batch_of_one():
    module, x = create(6, 3, 3), randn(3, 5, 7, 6)
    x[2] *= 50
    together = module(x)
    for i in range(3):
        torch.testing.assert_close(module(x[i:i + 1]), together[i:i + 1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('autocast', [False, True])
@pytest.mark.parametrize('grad', [False, True])
@pytest.mark.parametrize('dtype, tolerance', [(torch.bfloat16, .05), (torch.float16, .01)])
def test_half_precision(dtype: torch.dtype, tolerance: float, grad: bool, autocast: bool):
    module, x = create(32, 4, 7), randn(2, 18, 14, 32)
    expected = module(x).detach()
    with torch.set_grad_enabled(grad), torch.autocast('cpu', dtype=dtype, enabled=autocast):
        out = module(x) if autocast else module.to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    assert (out.float() - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize('kwargs, words', [
    (dict(window_size=0), ['window_size=(0, 0)', 'positive']),
    (dict(window_size=(3, -1)), ['window_size=(3, -1)', 'positive']),
    (dict(num_heads=3), ['dim=8', 'num_heads=3']),
])
def test_bad_arguments(kwargs, words):
    with pytest.raises(ValueError) as e:
        WindowAttention(8, **{'num_heads': 2, **kwargs})
    assert all(word in str(e.value) for word in words), e.value


def test_initialisation():
    torch.manual_seed(0)
    module = WindowAttention(256, 8, qkv_bias=True, proj_bias=True)
    assert module.window_size == (7, 7) and module.relative_position_bias_table.shape == (169, 8)
    assert not module.relative_position_bias_table.any() and not module.qkv.bias.any() and not module.proj.bias.any()
    for layer in (module.qkv, module.proj):
        assert layer.weight.std().item() == pytest.approx(1 / 16, rel=.02)
