"""Attention by random walks between queries and keys, of any number of steps.

The idea is that of 'Improving Vision Attention with Random Walk Graph Kernel', https://openreview.net/forum?id=LTvSyvRaJO
(ICLR 2023 submission, withdrawn). Documented are its abstract and summary: linear attention from the random walk graph
kernel; queries and keys are the nodes of a bipartite graph; ordinary attention is one step; all numbers of steps
together are the inverse of a matrix, which the bipartite graph makes easy. Neither code nor formulas are public:
feature maps, normalisation, the weight of long walks and everything else below are ours.

With features P_q (N, r) and P_k (M, r), positive, edges weigh S = P_q P_k^T and nodes d_q = S 1, d_k = S^T 1. A walk
goes from a query to a key and returns to a query with probability beta. The weight of a key is that of stopping there:

    O = (1 - beta) sum_j beta^j (D_q^-1 S D_k^-1 S^T)^j D_q^-1 S V
      = (1 - beta) D_q^-1 P_q (I - beta H_k H_q)^-1 (P_k^T V),    H_q = P_q^T D_q^-1 P_q,    H_k = P_k^T D_k^-1 P_k.

Only r x r is inverted. The eigenvalues of H_k H_q lie in [0, 1], so the inverse exists for every input if beta < 1, and
rows of the kernel sum to 1. With beta = 0 this is normalised linear attention (arXiv 2006.16236).

The features have to be peaked, P = softmax(t x / rms(x)) over the r channels, which makes these r anchors that a step
passes through. With elu + 1 S has nearly rank one: a second step leads to the mean of all values, whatever the query.

The layer's default is the other construction, 'spectral': signed weights S = q k^T, over no degrees but scaled to a
norm of at most 1, O = sum_j beta^j (S S^T)^j S V. In our trainings on Fashion-MNIST it learned faster than the walk
proper and ended ahead of it, and it takes fewer passes. That steps after the first help was not seen with either.

The inverse is the series of its powers, by doubling: (I + B^64) ... (I + B^2)(I + B), which needs no solver, so it
exports. Divided by 1 - beta^128 it keeps rows that sum to 1. `reference` has the solve, and the graphs in full. Where
there are no more nodes than anchors, eager mode takes the N x N matrices of the edges themselves instead.
"""
from functools import partial
from typing import Optional, Tuple

import torch
import torch.nn.functional as F

from ._common import differentiate, is_eager

# Features that each mode takes, its own first.
FEATURES = {'walk': ('softmax', 'elu'), 'spectral': ('signed',)}
MAX_BETA = 0.9
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.5, 16.
DOUBLINGS = 7
EPS = 1e-6
MIN_DEGREE = 1e-6

# Positions from which inference takes one image at a time and in bands of rows; elements of queries, keys and values in
# a band. Measured on one core: a 128 x 128 map of 64 channels takes 16 ms in such bands, 30 ms at once (float32).
BANDS_FROM = 512
BAND = 2 ** 18
# How many elements the features of a map have at most if they are kept for the second pass; more are computed twice.
KEPT = 2 ** 23


def _at_least_float32(x: torch.Tensor) -> torch.Tensor:
    x = x.contiguous()
    return x if x.dtype == torch.float64 else x.float()


def _softmax_features(x: torch.Tensor, temperature: torch.Tensor, eps: float = EPS) -> torch.Tensor:
    """softmax(t x / rms(x)) over the last axis: how peaked it is does not depend on the size of x."""
    return (x * ((x * x).mean(dim=-1, keepdim=True).add(eps).rsqrt() * temperature)).softmax(dim=-1)


def _features(x: torch.Tensor, temperature: Optional[torch.Tensor]) -> torch.Tensor:
    """Positive features; elu(x) + 1 without a temperature."""
    if temperature is None:
        return F.elu(x) + 1
    return _softmax_features(x, temperature)


def _features_backward(
        grad: torch.Tensor,
        x: torch.Tensor,
        features: torch.Tensor,
        temperature: Optional[torch.Tensor],
) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
    """Gradients of x and of the temperature."""
    if temperature is None:
        return grad * features.clamp(max=1), None  # exp(x) where x is negative
    inverse = (x * x).mean(dim=-1, keepdim=True).add(EPS).rsqrt()
    unit = x * inverse
    grad = features * (grad - (features * grad).sum(dim=-1, keepdim=True))
    along = (grad * unit).sum(dim=-1, keepdim=True)
    return (grad - unit * (along / x.shape[-1])) * (inverse * temperature), along.sum(dim=(0, 2), keepdim=True)[0]


def _inverse_degrees(features: torch.Tensor, mean: torch.Tensor, least: float = MIN_DEGREE) -> torch.Tensor:
    """(B, heads, N, 1) inverse sums of edges over the nodes of the other side, whose features have this mean."""
    return (features @ mean.transpose(-2, -1)).clamp_min(least).reciprocal()


def walk_series(step: torch.Tensor, start: torch.Tensor, doublings: int = DOUBLINGS) -> torch.Tensor:
    """`sum_j step^j start` over j < 2^doublings, close to `(I - step)^-1 start` for a spectral radius below 1.

    Args:
        step: (n, r, r).
        start: (n, r, e).
        doublings: The first term left out is `step^(2^doublings)`.

    Returns:
        (n, r, e).
    """
    for i in range(doublings):
        start = torch.baddbmm(start, step, start)
        if i + 1 < doublings:
            step = step @ step
    return start


def _enough_doublings(beta: torch.Tensor, left_out: float = 2 ** -24) -> int:
    """The fewest doublings whose first term left out is one that float32 does not see beside 1; at most the default."""
    largest = beta.detach().max().item()
    return next((p for p in range(1, DOUBLINGS) if largest ** 2 ** p <= left_out), DOUBLINGS)


def _walks(step: torch.Tensor, start: torch.Tensor, beta: torch.Tensor, doublings: int) -> torch.Tensor:
    """The series (B, heads, r, e) times what lets its rows sum to 1 although it ends."""
    series = walk_series(step.flatten(0, 1), start.flatten(0, 1), doublings).view_as(start)
    return series * ((1 - beta) / (1 - beta.pow(2 ** doublings)))


def _walk(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        temperature: Optional[torch.Tensor],
        beta: Optional[torch.Tensor],
        doublings: int,
) -> torch.Tensor:
    """The kernel in plain operations, for TorchScript; (B, heads, N, d) tensors and (heads, 1, 1) parameters."""
    p_q, p_k = _features(q, temperature), _features(k, temperature)
    M = k.shape[2]
    inverse_q = _inverse_degrees(p_q, p_k.mean(dim=2, keepdim=True))
    y = p_k.transpose(-2, -1) @ v / M
    if beta is not None:
        inverse_k = _inverse_degrees(p_k, p_q.mean(dim=2, keepdim=True))
        h_q = p_q.transpose(-2, -1) @ (p_q * inverse_q) / q.shape[2]
        h_k = p_k.transpose(-2, -1) @ (p_k * inverse_k) / M
        y = _walks((beta * h_k) @ h_q, y, beta, doublings)
    return (p_q @ y) * inverse_q


def _walk_of_few(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        temperature: Optional[torch.Tensor],
        beta: Optional[torch.Tensor],
        doublings: int,
        least: float = MIN_DEGREE,
) -> torch.Tensor:
    """The same where there are no more nodes on a side than anchors: S itself, and the series of N x N matrices."""
    edges = _features(q, temperature) @ _features(k, temperature).transpose(-2, -1)
    to_keys = edges / edges.sum(dim=-1, keepdim=True).clamp_min(least * k.shape[2])
    out = to_keys @ v
    if beta is not None:
        to_queries = edges / edges.sum(dim=-2, keepdim=True).clamp_min(least * q.shape[2])
        out = _walks(beta * (to_keys @ to_queries.transpose(-2, -1)), out, beta, doublings)
    return out


def _walk_in_dtype(q, k, v, temperature, beta, doublings: int) -> torch.Tensor:
    """`_walk` of tensors of any dtype, in that of the values."""
    wide = [_at_least_float32(x) for x in (q, k, v)]
    with torch.autocast(device_type=v.device.type, enabled=False):
        return _walk(*wide, temperature, beta, doublings).to(v.dtype)


class _Walk(torch.autograd.Function):
    """`_walk` whose backward pass keeps q, k, v and the sums, and takes the features again.

    The plain operations keep three times as much or more: scaled queries and keys, features, and these over degrees.
    Gradients are those of the inverse that the series stands for: one more series, and no power of the first is kept.
    """

    @staticmethod
    def forward(ctx, q, k, v, temperature, beta, doublings: int):
        inputs = q, k, v
        q, k, v = (_at_least_float32(x) for x in inputs)
        p_q, p_k = _features(q, temperature), _features(k, temperature)
        N, M = q.shape[2], k.shape[2]
        s_q, s_k = p_q.mean(dim=2, keepdim=True), p_k.mean(dim=2, keepdim=True)
        weighted = p_q * _inverse_degrees(p_q, s_k)
        y = p_k.transpose(-2, -1) @ v / M
        h_q = h_k = None
        if beta is not None:
            h_q = p_q.transpose(-2, -1) @ weighted / N
            h_k = p_k.transpose(-2, -1) @ (p_k * _inverse_degrees(p_k, s_q)) / M
            y = _walks((beta * h_k) @ h_q, y, beta, doublings)
        ctx.doublings = doublings
        ctx.save_for_backward(*inputs, temperature, beta, s_q, s_k, h_q, h_k, y)
        return (weighted @ y).to(inputs[2].dtype)

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            inputs = ctx.saved_tensors[:5]
            return (*differentiate(partial(_walk_in_dtype, doublings=ctx.doublings), inputs, grad), None)
        with torch.autocast(device_type=grad.device.type, enabled=False):
            return (*_Walk._backward(grad, *ctx.saved_tensors, ctx.doublings), None)

    @staticmethod
    def _backward(grad, q, k, v, temperature, beta, s_q, s_k, h_q, h_k, y, doublings: int):
        dtypes = q.dtype, k.dtype, v.dtype
        q, k, v, grad = (_at_least_float32(x) for x in (q, k, v, grad))
        p_q, p_k = _features(q, temperature), _features(k, temperature)
        N, M = q.shape[2], k.shape[2]
        inverse_q = _inverse_degrees(p_q, s_k)

        # the output y, (1 - beta) times an inverse times the sums of values
        grad_y = (p_q * inverse_q).transpose(-2, -1) @ grad
        grad_z, grad_beta = grad_y, None
        if beta is not None:
            product = h_k @ h_q
            grad_z = _walks((beta * product).transpose(-2, -1), grad_y, beta, doublings)
            inverse_z = y / (1 - beta)
            grad_step = grad_z @ inverse_z.transpose(-2, -1)
            grad_beta = ((grad_step * product).sum(dim=(2, 3)) - (grad_y * inverse_z).sum(dim=(2, 3))).sum(dim=0)
            grad_beta = grad_beta.view_as(beta)
            grad_step = grad_step * beta

        # queries: p_q stands in each product with h_q twice, and in its degrees
        grad_pq = grad @ y.transpose(-2, -1)
        grad_inverse = (p_q * grad_pq).sum(dim=-1, keepdim=True)
        if beta is not None:
            grad_h = h_k.transpose(-2, -1) @ grad_step
            again = p_q @ ((grad_h + grad_h.transpose(-2, -1)) / N)
            grad_inverse = grad_inverse + (p_q * again).sum(dim=-1, keepdim=True) / 2
            grad_pq = grad_pq + again
        grad_degree = -inverse_q.square() * grad_inverse * (inverse_q < 1 / MIN_DEGREE)
        grad_pq = grad_pq * inverse_q + grad_degree * s_k
        grad_pk = v @ (grad_z.transpose(-2, -1) / M) + grad_degree.transpose(-2, -1) @ p_q / M
        grad_v = p_k @ (grad_z / M)

        # keys
        if beta is not None:
            grad_h = grad_step @ h_q.transpose(-2, -1)
            inverse_k = _inverse_degrees(p_k, s_q)
            again = p_k @ ((grad_h + grad_h.transpose(-2, -1)) / M)
            grad_inverse = (p_k * again).sum(dim=-1, keepdim=True) / 2
            grad_degree = -inverse_k.square() * grad_inverse * (inverse_k < 1 / MIN_DEGREE)
            grad_pk = grad_pk + again * inverse_k + grad_degree * s_q
            grad_pq = grad_pq + grad_degree.transpose(-2, -1) @ p_k / N

        grad_q, grad_tq = _features_backward(grad_pq, q, p_q, temperature)
        grad_k, grad_tk = _features_backward(grad_pk, k, p_k, temperature)
        grad_temperature = None if temperature is None else grad_tq + grad_tk
        grads = (g.to(dtype) for g, dtype in zip((grad_q, grad_k, grad_v), dtypes))
        return (*grads, grad_temperature, grad_beta)


def _norm_bound(gram: torch.Tensor, least: float = 1e-30) -> torch.Tensor:
    """(..., 1, 1) upper bound of the largest eigenvalue of Gram matrices, its Schatten norm of order 8.

    At most r^(1/8) times that eigenvalue. Scaled by the trace first, so that the powers stay in range.
    """
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1).clamp_min(least).unsqueeze(-1).unsqueeze(-1)
    gram = gram / trace
    gram = gram @ gram
    gram = gram @ gram
    return trace * gram.square().sum(dim=(-2, -1), keepdim=True).clamp_min(least).pow(0.125)


def _signed_series(
        g_q: torch.Tensor,
        g_k: torch.Tensor,
        y: torch.Tensor,
        beta: Optional[torch.Tensor],
        nodes: int,
        doublings: int,
) -> torch.Tensor:
    """What queries meet (..., r, e), from Gram matrices (..., r, r) of means, sums of values, and `nodes` = N M."""
    c_q, c_k = _norm_bound(g_q), _norm_bound(g_k)
    y = y * (c_q.rsqrt() * c_k.rsqrt() * nodes ** -0.5)  # their product would leave the range of float32
    if beta is not None:
        step = (beta.reshape(-1, 1, 1) * (g_k / c_k)) @ (g_q / c_q)
        y = walk_series(step.flatten(0, -3), y.flatten(0, -3), doublings).view_as(y)
    return y


def _signed_products(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Means over queries and over keys of their Gram matrices, and the sum of values."""
    q_t, k_t = q.transpose(-2, -1), k.transpose(-2, -1)
    return q_t @ q / q.shape[2], k_t @ k / k.shape[2], k_t @ v


def _spectral(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        beta: Optional[torch.Tensor],
        doublings: int,
) -> torch.Tensor:
    g_q, g_k, y = _signed_products(q, k, v)
    return q @ _signed_series(g_q, g_k, y, beta, q.shape[2] * k.shape[2], doublings)


def _spectral_in_dtype(q, k, v, beta, doublings: int) -> torch.Tensor:
    """`_spectral` of tensors of any dtype, in that of the values."""
    wide = [_at_least_float32(x) for x in (q, k, v)]
    with torch.autocast(device_type=v.device.type, enabled=False):
        return _spectral(*wide, beta, doublings).to(v.dtype)


class _Spectral(torch.autograd.Function):
    """`_spectral` whose backward pass keeps q, k, v as they came and r x r sums, no copies of q, k, v in float32."""

    @staticmethod
    def forward(ctx, q, k, v, beta, doublings: int):
        inputs = q, k, v
        q, k, v = (_at_least_float32(x) for x in inputs)
        sums = _signed_products(q, k, v)
        ctx.doublings = doublings
        ctx.save_for_backward(*inputs, beta, *sums)
        return (q @ _signed_series(*sums, beta, q.shape[2] * k.shape[2], doublings)).to(inputs[2].dtype)

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            inputs = ctx.saved_tensors[:4]
            return (*differentiate(partial(_spectral_in_dtype, doublings=ctx.doublings), inputs, grad), None)
        with torch.autocast(device_type=grad.device.type, enabled=False):
            return (*_Spectral._backward(grad, *ctx.saved_tensors, ctx.doublings), None)

    @staticmethod
    def _backward(grad, q, k, v, beta, g_q, g_k, z, doublings: int):
        dtypes = q.dtype, k.dtype, v.dtype
        q, k, v, grad = (_at_least_float32(x) for x in (q, k, v, grad))
        N, M = q.shape[2], k.shape[2]
        with torch.enable_grad():  # what lies between the sums and the queries is small
            sums = [x.detach().requires_grad_() for x in (g_q, g_k, z, beta) if x is not None]
            y = _signed_series(*sums[:3], None if beta is None else sums[3], N * M, doublings)
            grad_gq, grad_gk, grad_z, *grad_beta = torch.autograd.grad(y, sums, q.transpose(-2, -1) @ grad)
        grad_q = grad @ y.detach().transpose(-2, -1) + q @ ((grad_gq + grad_gq.transpose(-2, -1)) / N)
        grad_k = v @ grad_z.transpose(-2, -1) + k @ ((grad_gk + grad_gk.transpose(-2, -1)) / M)
        grads = (g.to(dtype) for g, dtype in zip((grad_q, grad_k, k @ grad_z), dtypes))
        return (*grads, *(grad_beta or [None]))


def _spectral_of_few(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        beta: Optional[torch.Tensor],
        doublings: int,
) -> torch.Tensor:
    """The same from N x N matrices, those of queries having the eigenvalues of their Gram matrix; as `_walk_of_few`."""
    N, M = q.shape[2], k.shape[2]
    c_q, c_k = _norm_bound(q @ q.transpose(-2, -1) / N), _norm_bound(k @ k.transpose(-2, -1) / M)
    edges = (q @ k.transpose(-2, -1)) * (c_q.rsqrt() * c_k.rsqrt() * (N * M) ** -0.5)
    out = edges @ v
    if beta is not None:
        step = beta * (edges @ edges.transpose(-2, -1))
        out = walk_series(step.flatten(0, 1), out.flatten(0, 1), doublings).view_as(out)
    return out


def _random_walk_attention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        temperature: Optional[torch.Tensor],
        beta: Optional[torch.Tensor],
        mode: str,
        features: str,
        doublings: int,
) -> torch.Tensor:
    if beta is not None:
        beta = (beta if v.dtype == torch.float64 else beta.float()).reshape(-1, 1, 1)
    if features == 'softmax' and temperature is not None:
        temperature = (temperature if v.dtype == torch.float64 else temperature.float()).reshape(-1, 1, 1)
    else:
        temperature = None
    few = False
    if not torch.jit.is_scripting():
        # compilers and exporters, whose sizes are symbols, get one form for all
        few = is_eager() and q.shape[3] >= max(q.shape[2], k.shape[2])
        if mode == 'walk' and not few:
            return _Walk.apply(q, k, v, temperature, beta, doublings)
        if is_eager() and not few:  # compilers cannot look into a backward pass that differentiates
            return _Spectral.apply(q, k, v, beta, doublings)
    dtype = v.dtype
    q, k, v = _at_least_float32(q), _at_least_float32(k), _at_least_float32(v)
    if mode == 'spectral':
        out = _spectral_of_few(q, k, v, beta, doublings) if few else _spectral(q, k, v, beta, doublings)
    elif few:
        out = _walk_of_few(q, k, v, temperature, beta, doublings)
    else:
        out = _walk(q, k, v, temperature, beta, doublings)
    return out.to(dtype)


def _check_options(mode: str, features: str, doublings: int) -> None:
    if mode not in FEATURES:
        raise ValueError(f"Unknown mode '{mode}', expected one of {', '.join(FEATURES)}.")
    if features not in FEATURES[mode]:
        raise ValueError(
            f"Unknown features '{features}' for mode='{mode}', expected one of {', '.join(FEATURES[mode])}.")
    if doublings < 1:
        raise ValueError(f'doublings={doublings} must be positive.')


def random_walk_attention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        beta: Optional[torch.Tensor] = None,
        temperature: Optional[torch.Tensor] = None,
        mode: str = 'walk',
        features: str = 'softmax',
        doublings: int = DOUBLINGS,
) -> torch.Tensor:
    """Attention by random walks of any number of steps, linear in N and M.

    Ours, see the top of this file.

    Sums run in float32 (float64 for float64 input), with autocast off.

    Args:
        q: Queries (B, heads, N, r).
        k: Keys (B, heads, M, r).
        v: Values (B, heads, M, e).
        beta: Probability (heads,) to return from a key to a query, below 1; None for one step.
        temperature: How peaked softmax features are (heads,); 'softmax' needs it.
        mode: 'walk', or 'spectral': signed weights and no degrees, `sum_j beta^j (S S^T)^j S v` of an S = q k^T that is
            scaled to a norm of at most 1.
        features: 'softmax' or 'elu' (elu + 1) of a walk, 'signed' (q and k themselves) of 'spectral'.
        doublings: Terms of the series are 2^doublings: 7 leave out 1e-6 of its sum at beta = 0.9. Gradients are those
            of the inverse, which differs where that share is large.

    Returns:
        (B, heads, N, e) in the dtype of `v`.

    Raises:
        ValueError: An option is unknown, does not go with another one, or is missing.
    """
    if not torch.jit.is_scripting():
        _check_options(mode, features, doublings)
        if features == 'softmax' and temperature is None:
            raise ValueError("temperature=None, but features='softmax' need a (heads,) tensor.")
    if not torch.jit.is_scripting() and q.device.type != 'meta':
        with torch.autocast(device_type=q.device.type, enabled=False):
            return _random_walk_attention(q, k, v, temperature, beta, mode, features, doublings)
    return _random_walk_attention(q, k, v, temperature, beta, mode, features, doublings)
