"""A parameter is read by the module that owns it, in its own forward: hooks, adapters and torch.func rest on that."""
import copy

import pytest
import timm
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.nn.utils import parametrizations, prune
from torch.utils.flop_counter import FlopCounterMode

import vitlinear  # noqa: F401  registers the models

MODELS = {
    'vvt_nano': 48, 'xvit_pyramid_nano': 48, 'castling_nano': 48, 'qna_vit_nano': 48, 'gkvit_nano': 48,
    'castling_levit_128s': 64, 'castling_mvitv2_tiny': 64, 'castling_deit_tiny_patch16_224': 224, 'xvit_tiny': 48}
EACH = pytest.mark.parametrize('name', MODELS)


def create(name: str, seed: int = 0) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=4)
    return model.eval(), torch.randn(2, 3, MODELS[name], MODELS[name])


def projections(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]


def assert_near(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * max(1., b.abs().max().item()))


@EACH
@pytest.mark.parametrize('mode', ['train', 'eval', 'inference'])
def test_every_module_with_parameters_is_called(name: str, mode: str):
    model, x = create(name)
    owners, called = {k for k, m in model.named_modules() if list(m.parameters(recurse=False))}, set()
    for k in owners:
        model.get_submodule(k).register_forward_hook(lambda *args, k=k: called.add(k))
    model.train(mode == 'train')
    with torch.set_grad_enabled(mode != 'inference'):
        model(x)
    assert called == owners


@EACH
def test_pruned_and_parametrised(name: str):
    """Two steps each, in which every parameter takes part, and the same numbers where nothing is changed."""
    model, x = create(name)
    expected = model(x).detach()
    pruned = copy.deepcopy(model).train()
    prune.global_unstructured([(m, 'weight') for m in projections(pruned)], prune.L1Unstructured, amount=.3)
    for _ in range(2):
        pruned(x).square().sum().backward()
    normed = copy.deepcopy(model)
    for m in projections(normed):
        parametrizations.weight_norm(m)
    assert_near(normed(x), expected)
    with torch.no_grad():
        assert_near(normed(x), expected)
    for module in projections(model):
        parametrizations.spectral_norm(module)
    for changed in (pruned, normed, model.train()):
        changed(x).square().sum().backward()
        assert all(p.grad is not None for p in changed.parameters())


@EACH
def test_replaced_forward_counts(name: str):
    """With gradients and without, whichever module it is."""
    model, x = create(name)
    composed = [m for m in model.modules() if list(m.children()) and not isinstance(m, (nn.ModuleList, nn.Sequential))]
    for m in {type(m): m for m in composed if m is not model}.values():  # the last of each type
        counts, old = [], m.forward
        m.forward = lambda *args, old=old, counts=counts, **kwargs: (counts.append(1), old(*args, **kwargs))[1]
        for enabled in (False, True):
            with torch.set_grad_enabled(enabled):
                model(x[:1])
        del m.forward
        assert len(counts) in (0, 2), type(m)


@EACH
def test_operations_are_counted(name: str):
    """What PyTorch counts without gradients and with them, but for its fused attention, for which it has no formula."""
    model, x = create(name)
    counts = []
    for enabled in (True, False):
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(enabled):
            model(x)
        counts.append(counter.get_total_flops())
    assert counts[1] == pytest.approx(counts[0], rel=.02)


@EACH
def test_torch_func(name: str):
    """Over images, per-image gradients, directional derivatives, and an ensemble: equal to the plain model."""
    model, x = create(name)
    params = {k: p.detach() for k, p in model.named_parameters()}
    buffers = dict(model.named_buffers())
    expected = model(x)
    expected.sum().backward()

    def logits(params, image):
        return functional_call(model, (params, buffers), (image[None],))[0]

    assert_near(vmap(logits, (None, 0))(params, x), expected.detach())
    per_image = vmap(grad(lambda p, image: logits(p, image).sum()), (None, 0))(params, x)
    for k, p in model.named_parameters():
        assert_near(per_image[k].sum(dim=0), p.grad)
    direction = torch.randn_like(x)
    out, slope = jvp(lambda x: functional_call(model, (params, buffers), (x,)), (x,), (direction,))
    assert_near(out, expected.detach())
    assert_near(slope.sum(), (torch.autograd.grad(model(x.requires_grad_()).sum(), x)[0] * direction).sum())
    others = [create(name, seed)[0] for seed in (0, 1)]
    stacked = vmap(lambda p, b: functional_call(model, (p, b), (x,)))(*stack_module_state(others))
    for i, other in enumerate(others):
        assert_near(stacked[i], other(x))


@pytest.mark.parametrize('name', ['castling_nano', 'castling_levit_128s'])
def test_adapter_of_the_convolution_of_values(name: str):
    """As LoRA's are made: two more layers of the type of the one they adapt, added to what it returns."""
    model, x = create(name)
    expected = model(x).detach()
    for module in model.modules():
        if isinstance(conv := getattr(module, 'dconv', None), nn.Conv2d):
            shape = dict(kernel_size=conv.kernel_size, padding=conv.padding, bias=False)
            down, up = type(conv)(conv.in_channels, 4, **shape), type(conv)(4, conv.out_channels, 1, bias=False)
            conv.register_forward_hook(lambda m, args, out, up=up, down=down: out + up(down(args[0])))
    changed = model(x)
    assert changed.shape == expected.shape and (changed - expected).abs().max() > 1e-4
