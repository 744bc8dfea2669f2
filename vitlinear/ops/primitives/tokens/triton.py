"""Sums over tokens by kernels. Backward passes keep arguments alone, and compute numerators and divisors once more."""
import torch

from ..._numerics import sum_dtype
from ..._triton import too_wide
from ..by_kernels import by_kernels
from . import launch
from . import torch as plain
from .launch import empty_map


def _refuses(x, y, *args, **kwargs):
    channels = max(x.shape[-1], y.shape[-1])
    return too_wide(
        x, 'heads', channels, launch.MAX_CHANNELS, launch.SMALL_CHANNELS, launch.LARGE_SHARED_MEMORY)


def _num_factors(locality):
    return {'none': 1, '1d': 2}.get(locality, 4)


def _fake_sums(k, v, locality, grid, with_total, unit, eps):
    shape, dtype = (*k.shape[:2], _num_factors(locality) * k.shape[3]), sum_dtype(k.dtype)
    return k.new_empty(*shape, v.shape[3], dtype=dtype), k.new_empty(shape if with_total else 0, dtype=dtype)


def _fake_sums_backward(k, v, grad, grad_total, *options):
    return empty_map(k, k.shape[3]), empty_map(v, v.shape[3])


def _fake_apply(q, sums, total, base, locality, grid, clamp, unit, eps, dtype):
    return empty_map(q, sums.shape[3], dtype)


def _fake_apply_backward(q, sums, total, base, grad, *options):
    grad_total = sums.new_empty(0 if total is None else total.shape)
    grad_base = grad.new_empty(0) if base is None else torch.empty_like(grad, dtype=base.dtype)
    return empty_map(q, q.shape[3]), sums.new_empty(sums.shape), grad_total, grad_base


def _fake_clamp(x, *args):
    return x.new_empty(x.shape)


_sums = by_kernels(
    'token_sums', plain.token_sums, launch.token_sums, launch.token_sums_backward, _fake_sums, _fake_sums_backward, 2,
    _refuses)

_apply = by_kernels(
    'token_apply', lambda q, sums, total, base, *args: plain.token_apply(q, sums, total, *args[:-1], base, args[-1]),
    launch.token_apply, launch.token_apply_backward, _fake_apply, _fake_apply_backward, 4, _refuses)

_clamp = by_kernels(
    'clamp_magnitude', plain.clamp_magnitude, launch.clamp_magnitude, launch.clamp_magnitude_backward, _fake_clamp,
    _fake_clamp, 1, lambda *args, **kwargs: '')


def clamp_magnitude(x, low=1e-4, high=1e4):
    """As `torch.clamp_magnitude`; keeps x."""
    return _clamp(x, low, high)


def split_heads(x, parts, num_heads):
    """As `torch.split_heads`, without a copy: kernels take heads as they lie."""
    x = x.flatten(1, -2)
    return x.unflatten(2, [parts, num_heads, x.shape[2] // (parts * num_heads)]).permute(2, 0, 3, 1, 4).unbind(0)


def token_sums(k, v, locality='none', grid=(0, 0), with_total=False, unit=False, eps=1e-6):
    """As `torch.token_sums`; keeps k and v alone."""
    sums, total = _sums(k, v, locality, list(grid), with_total, unit, eps)
    return sums, total if with_total else None


def token_moments(q, k, v):
    """As `torch.token_moments`; keeps q, k and v alone."""
    return token_sums(q, q)[0], token_sums(k, k)[0], token_sums(k, v)[0]


def token_apply(
        q, sums, total=None, locality='none', grid=(0, 0), clamp=False, unit=False, eps=1e-6, base=None,
        dtype=None):
    """As `torch.token_apply`; keeps q and the sums."""
    return _apply(q, sums, total, base, locality, list(grid), clamp, unit, eps, dtype)


clamp_magnitude.refuses = split_heads.refuses = _clamp.refuses
token_sums.refuses = token_apply.refuses = token_moments.refuses = _refuses
