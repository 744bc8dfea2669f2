"""Every implementation of every op against its textbook form: outputs, gradients, second derivatives, types, sizes."""
import contextlib

import pytest
import torch
from _table import CASES, GRIDS, IMPLEMENTATIONS, OPS, SAME_IN_GRAPHS, is_interpreted, maps_of, sides

from vitlinear import ops
from vitlinear.ops.local import local_attention

pytestmark = pytest.mark.usefixtures('nan_memory')

each_op = pytest.mark.parametrize('name', OPS)
same_in_graphs = pytest.mark.parametrize('name', SAME_IN_GRAPHS)
each_implementation = pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
each_case = pytest.mark.parametrize('name, implementation', CASES)
HALF = {torch.bfloat16: 2.5e-2, torch.float16: 4e-3}
# gradients that are sums of large numbers which nearly cancel
LOOSE = dict.fromkeys(['qna-large', 'walk', 'depthwise', 'depthwise-gelu'], 1e-4)


def value_and_grads(function, inputs, cotangent=None):
    inputs = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]
    out = function(*inputs)
    if cotangent is None:
        cotangent = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape)
    return out.detach(), *torch.autograd.grad(out, inputs, cotangent.to(out))


def assert_near(actual, expected, tolerance: float) -> None:
    """Errors relative to the largest entry of each tensor, or to a thousandth of that of all."""
    largest = max(float(b.abs().max()) for b in expected)
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert a.isfinite().all(), i
        error = float((a.double() - b.double()).abs().max()) / (float(b.abs().max()) + 1e-3 * largest + 1e-300)
        assert error <= tolerance, (i, error)


@each_case
@pytest.mark.parametrize('grid', GRIDS)
def test_outputs_and_gradients(name: str, implementation: str, grid, device: str):
    op = OPS[name]
    inputs = [x.to(device) for x in op.inputs(*sides(grid, implementation, device))]
    with ops.use(implementation):
        actual = value_and_grads(op.function, inputs)
    assert_near(actual, value_and_grads(op.reference, inputs), 1e-9)


@each_case
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(name: str, implementation: str, dtype: torch.dtype, device: str):
    """Sums are float32: errors are those of the inputs' own rounding, on many positions as well."""
    op = OPS[name]
    if name == 'qna-large' and dtype != torch.float32:
        pytest.skip('scores of 100 have no half precision neighbours')
    grid = (7, 11) if is_interpreted(implementation, device) else (20, 19)
    inputs = [x.to(device, dtype) for x in op.inputs(*grid)]
    with ops.use(implementation):
        actual = value_and_grads(op.function, inputs)
    assert all(a.dtype == dtype for a in actual)
    expected = value_and_grads(op.reference, [x.double() for x in inputs])
    assert_near(actual, expected, HALF.get(dtype, LOOSE.get(name, 1e-5)))


@each_case
def test_second_derivatives(name: str, implementation: str):
    """Backward passes written by hand may keep what a second derivative depends on."""
    if is_interpreted(implementation):
        pytest.skip('kernels are asked for one Hessian-vector product, below')
    op = OPS[name]
    inputs = [x.contiguous().requires_grad_() for x in op.inputs(2, 3)]
    with ops.use(implementation):
        assert torch.autograd.gradgradcheck(op.function, inputs)


@each_case
def test_hessian_vector_product(name: str, implementation: str):
    """Sums through rows and columns, or edges in place of channels, have second derivatives as well."""
    op, grid = OPS[name], (2, 3) if is_interpreted(implementation) else (16, 17)
    inputs = [x.detach().clone().requires_grad_() for x in op.inputs(*grid)]
    directions = [torch.linspace(-1, 1, x.numel(), dtype=torch.float64).reshape(x.shape) for x in inputs]

    def product(function):
        grads = torch.autograd.grad(function(*inputs).sin().sum(), inputs, create_graph=True)
        return torch.autograd.grad([(g * d).sum() for g, d in zip(grads, directions, strict=True)], inputs)

    with ops.use(implementation):
        actual = product(op.function)
    assert_near(actual, product(op.reference), 1e-8)


@pytest.mark.parametrize('name', [name for name in SAME_IN_GRAPHS if name != 'window_softmax'])
def test_function_transforms(name: str):
    """Per-sample gradients, Hessians and forward mode go through the plain operations.

    PyTorch's own softmax attention has no forward mode.
    """
    op = OPS[name]
    inputs = op.inputs(2, 3)
    first, rest = inputs[0], inputs[1:]

    def loss(x):
        return op.function(x, *rest).square().sum()

    expected, = torch.autograd.grad(loss(x := first.detach().requires_grad_()), x)
    torch.testing.assert_close(torch.func.grad(loss)(first), expected)
    per_sample = torch.func.vmap(torch.func.grad(loss))(torch.stack([first, 2 * first]))
    torch.testing.assert_close(per_sample[0], expected)
    tangent = torch.ones_like(first)
    _, derivative = torch.func.jvp(loss, (first,), (tangent,))
    torch.testing.assert_close(derivative, expected.sum())
    hessian = torch.func.hessian(loss)(first).flatten(first.ndim).flatten(0, first.ndim - 1)
    torch.testing.assert_close(hessian, hessian.t(), rtol=1e-6, atol=1e-8)


@each_case
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_finite(name: str, implementation: str, dtype: torch.dtype, device: str):
    """Constant maps of any finite value have finite outputs, and finite gradients where the type holds these."""
    if 'depthwise' in name and dtype == torch.float16 and implementation == 'torch':
        pytest.skip('PyTorch sums gradients of kernels of one row in float16')
    slow = is_interpreted(implementation, device)
    if slow and dtype == torch.bfloat16:
        pytest.skip('the interpreter computes bfloat16 as float32')
    op = OPS[name]
    for grid in ((2, 2),) if slow else ((1, 1), (2, 2), (16, 17)):
        made = op.inputs(*grid)
        for value in (0., 1e4) if slow else (0., 1e-30, 1e-5, 1., 1e4):
            inputs = [x.to(device, dtype) for x in made]
            for i in maps_of(made):
                inputs[i] = torch.full_like(inputs[i], value)
            with ops.use(implementation):
                out, *grads = value_and_grads(op.function, inputs)
                # float16 ends at 65504, which gradients of parameters that all positions share may pass
                wide = value_and_grads(op.function, [x.float() for x in inputs])[1:]
            assert out.isfinite().all(), (grid, value)
            for i, (grad, exact) in enumerate(zip(grads, wide, strict=True)):
                assert exact.isfinite().all(), (grid, value, i)
                assert grad.isfinite().all() or exact.abs().max() > .9 * torch.finfo(dtype).max, (grid, value, i)


@each_op
@pytest.mark.parametrize('one', [0, 1])
def test_images_do_not_meet(name: str, one: int):
    """A zero image beside another one changes nothing there, forward and backward."""
    op = OPS[name]
    made = op.inputs(3, 5)
    maps = maps_of(made)
    alone = [x[one:one + 1] if i in maps else x for i, x in enumerate(made)]
    beside = [x.clone() for x in made]
    for i in maps:
        beside[i][1 - one] = 0.
    actual = value_and_grads(op.function, beside, torch.ones_like(op.function(*beside)))
    expected = value_and_grads(op.function, alone, torch.ones_like(op.function(*alone)))
    assert_near([actual[0][one:one + 1], *[actual[1 + i][one:one + 1] for i in maps]],
                [expected[0], *[expected[1 + i] for i in maps]], 1e-9)
    assert all(a.isfinite().all() for a in actual)


@pytest.mark.parametrize('name', [name for name in OPS if 'depthwise' not in name and name != 'window_softmax'])
def test_autocast(name: str):
    """Autocast changes nothing within an op; it casts PyTorch's own convolutions and softmax attention."""
    op = OPS[name]
    inputs = [x.float() for x in op.inputs(4, 5)]
    expected = value_and_grads(op.function, inputs)

    def under_autocast(*inputs):
        with torch.autocast('cpu', torch.bfloat16):
            return op.function(*inputs)

    actual = value_and_grads(under_autocast, inputs)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@same_in_graphs
@pytest.mark.parametrize('trains', [False, True])
@pytest.mark.parametrize('grid', [(3, 5), (16, 17)])
def test_compiled_without_gaps(name: str, trains: bool, grid):
    op = OPS[name]
    torch._dynamo.reset()
    compiled = torch.compile(op.function, fullgraph=True, backend='aot_eager')
    inputs = [x.float() for x in op.inputs(*grid)]
    if trains:
        assert_near(value_and_grads(compiled, inputs), value_and_grads(op.function, inputs), 1e-4)
    else:
        with torch.no_grad():
            assert_near([compiled(*inputs)], [op.function(*inputs)], 1e-5)


def test_compiled_vicinity_takes_rows_and_columns():
    """Half the operations, by the shapes of the products in the graph."""
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    q, k, v = (x.float() for x in OPS['vicinity-2d'].inputs(32, 32))
    with torch.no_grad():
        compiled = torch.compile(ops.vicinity_attention, backend=backend, fullgraph=True)(q, k, v)
    torch.testing.assert_close(compiled, ops.vicinity_attention(q, k, v))
    assert sum('matmul' in target for target in seen) >= 6


@same_in_graphs
def test_exported(name: str):
    """Graphs hold plain operations and take maps of other sizes.

    Those of window attention take a minute to be made for sizes that are free, see tests/models/test_qna_vit.py.
    """
    op = OPS[name]

    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return op.function(*inputs)

    inputs = [x.float() for x in op.inputs(4, 6)]
    free = [] if name == 'window_softmax' else maps_of(inputs)
    dynamic = [
        {d: torch.export.Dim.AUTO for d, n in enumerate(x.shape) if n in (4, 6, 24)} if i in free else None
        for i, x in enumerate(inputs)]
    program = torch.export.export(Module(), tuple(inputs), dynamic_shapes={'inputs': tuple(dynamic)}, strict=False)
    assert not [n for n in program.graph.nodes if 'vitlinear' in str(n.target) or 'higher_order' in str(n.target)]
    torch.testing.assert_close(program.module()(*inputs), op.function(*inputs), rtol=1e-4, atol=1e-5)


class Scripted(torch.nn.Module):
    """Every op that a layer calls, in one module, which TorchScript has to compile and save."""

    def forward(self, q, k, v, weight, score, windows, bias):
        grid = (2, 3)
        maps = ops.vicinity_attention(q.abs().unflatten(2, grid), k.abs().unflatten(2, grid), v.unflatten(2, grid))
        return (ops.linear_attention(q, k, v) + ops.xnorm_attention(q, k, v) + ops.random_walk_attention(q, k, v)
                + ops.linear_angular_attention(q, k, v, local_attention(v, weight)) + maps.flatten(2, 3),
                ops.qna_attention(score, windows, bias))


def test_scripted(tmp_path):
    path = str(tmp_path / 'ops.pt')
    inputs = [x.float() for x in (*OPS['linear_angular'].inputs(2, 3), *OPS['qna'].inputs(2, 3)[:3])]
    torch.jit.script(Scripted()).save(path)
    for actual, expected in zip(torch.jit.load(path)(*inputs), Scripted()(*inputs), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def kept_bytes(function, *inputs) -> int:
    storages = {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        assert function(*inputs).requires_grad
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize(('name', 'maps'), [
    ('linear', 14), ('vicinity-2d', 10), ('xnorm-key', 5), ('spectral', 5), ('linear_angular', 14)])
def test_what_the_backward_pass_keeps(name: str, maps: int):
    """In bfloat16, maps of the size of the values, the arguments included; the plain operations keep more."""
    made = OPS[name].inputs(32, 32, d=32, e=32)
    inputs = [x.bfloat16().requires_grad_() for x in made]
    with ops.use('autograd'):
        lean = kept_bytes(OPS[name].function, *inputs)
    with ops.use('torch'):
        plain = kept_bytes(OPS[name].function, *inputs)
    assert lean < plain
    assert lean <= maps * inputs[2].numel() * 2


def test_clamps_of_the_released_vvt():
    """The clamp: zero stays zero, both signs, both bounds, and a gradient of zero from the bounds on."""
    x = torch.tensor([0., 1e-6, -1e-6, .5, -.5, 1e6, -1e6], dtype=torch.float64, requires_grad=True)
    y = ops.clamp_magnitude(x)
    torch.testing.assert_close(y, torch.tensor([0., 1e-4, -1e-4, .5, -.5, 1e4, -1e4], dtype=torch.float64))
    torch.testing.assert_close(
        torch.autograd.grad(y.sum(), x)[0], torch.tensor([0., 0, 0, 1, 1, 0, 0], dtype=torch.float64))


@each_implementation
@pytest.mark.parametrize('size', [1e-5, 1., 1e3])
@pytest.mark.parametrize('grid', [(3, 5), (16, 17)])
def test_clamped_vicinity(implementation: str, size: float, grid):
    """Sums, numerators, reciprocals and outputs meet their bounds, written out once more."""
    grid = sides(grid, implementation)
    q, k, v = OPS['vicinity-2d'].inputs(*grid)
    q, k, v = q * size, k * size, v * size
    kernel = torch.stack([c.reshape(-1) for c in _factors(*grid)])

    def clamped(q, k, v):
        q, k, v = (x.flatten(2, 3) for x in (q, k, v))
        clamp = ops.clamp_magnitude
        sums = clamp(torch.einsum('fn,bhnd,bhne->bhfde', kernel, k, v))
        total = torch.einsum('fn,bhnd->bhfd', kernel, k)
        numerator = clamp(torch.einsum('fn,bhnd,bhfde->bhne', kernel, q, sums))
        reciprocal = clamp(1 / (torch.einsum('fn,bhnd,bhfd->bhn', kernel, q, total) + 1e-4))
        return clamp(numerator * reciprocal.unsqueeze(-1)).unflatten(2, grid)

    with ops.use(implementation):
        actual = value_and_grads(ops.vicinity_attention, (q, k, v))
    assert_near(actual, value_and_grads(clamped, (q, k, v)), 1e-9)


def _factors(H: int, W: int):
    angles = [torch.arange(n, dtype=torch.float64) * torch.pi / 2 / n for n in (H, W)]
    rows, columns = torch.meshgrid(*angles, indexing='ij')
    return rows.cos(), rows.sin(), columns.cos(), columns.sin()


# the rule

def test_explain():
    q = torch.ones(1, 1, 2, 2)
    assert "'torch', since no gradients are wanted" in ops.explain(ops.token_sums, q, q)
    assert "'autograd', since gradients are wanted" in ops.explain(ops.token_sums, q.requires_grad_(), q)
    with ops.use('torch'):
        assert "ops.use('torch')" in ops.explain(ops.token_sums, q, q)
    with torch.no_grad():
        assert "'torch'" in ops.explain(ops.token_sums, q, q)
    assert 'Masked' in ops.explain(ops.token_sums, torch.masked.masked_tensor(torch.ones(2), torch.ones(2).bool()))


def test_override_is_undone_and_checked():
    with pytest.raises(ValueError, match="Unknown implementation 'cuda', expected one of torch, autograd, triton, c"):
        with ops.use('cuda'):
            pass
    with contextlib.suppress(KeyError), ops.use('torch'):
        raise KeyError
    assert "'autograd'" in ops.explain(ops.token_moments, *[torch.ones(1, 1, 2, 2, requires_grad=True)] * 3)


@pytest.mark.parametrize(('call', 'message'), [
    (lambda x: ops.vicinity_attention(*[x[:, :, None]] * 3, locality='3d'), "Unknown locality '3d', expected one of 2"),
    (lambda x: ops.xnorm_attention(x, x, x, kv_axis='query'), "Unknown kv_axis 'query', expected one of key, value"),
    (lambda x: ops.random_walk_attention(x, x, x, mode='run'), "Unknown mode 'run', expected one of spectral, walk"),
    (lambda x: ops.random_walk_attention(x, x, x, mode='walk'), "temperature=None, but mode='walk' needs"),
    (lambda x: ops.qna_attention(x[..., None], x[..., None], torch.ones(2, 1, 2, 2)), 'side 2, which must be odd'),
    (lambda x: ops.qna_attention(x[..., None], x[..., None], torch.ones(2, 1, 3, 3), stride=0), 'stride=0 must be'),
])
def test_bad_arguments(call, message: str):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(1, 2, 4, 2))
