"""Sums over tokens in plain operations. Tensors of heads are (B, heads, N, d) views of any strides."""
import torch
import torch.nn.functional as F

from ..._numerics import as_operand, inverse_norm, product
from .positions import apply, sums, sums_alone

CLAMP_MIN, CLAMP_MAX = 1e-4, 1e4


def clamp_magnitude(x: torch.Tensor, low: float = 1e-4, high: float = 1e4) -> torch.Tensor:
    """`sign(x) * clamp(|x|, low, high)`: zero stays zero, and the gradient is 0 from the bounds on.

    The bounds are those of VVT's released code, with which its weights were trained.
    """
    return x.abs().clamp(low, high) * x.sign()


def split_heads(x: torch.Tensor, parts: int, num_heads: int) -> list[torch.Tensor]:
    """(B, ..., parts * heads * d) to (B, heads, N, d), a list of `parts`; several heads come apart in one pass."""
    x = x.flatten(1, -2)
    x = x.unflatten(2, [parts, num_heads, x.shape[2] // (parts * num_heads)]).permute(2, 0, 3, 1, 4)
    return (x.contiguous() if num_heads > 1 else x).unbind(0)


def token_sums(
        k: torch.Tensor,
        v: torch.Tensor,
        locality: str = 'none',
        grid: tuple[int, int] = (0, 0),
        with_total: bool = False,
        unit: bool = False,
        eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Sums over keys: `S_f = sum_j phi_f(j) k_j v_j^T` and, if asked for, `Z_f = sum_j phi_f(j) k_j`.

    Costs `2 F N d e` operations, half of that for '2d' on large grids; keeps k and v for the backward pass.

    Args:
        k: Features of keys (B, heads, N, d).
        v: Values (B, heads, N, e).
        locality: Positional factors phi_f: '2d' (4: cosine and sine of row and column), '2d_product' (4), '1d' (2) or
            'none' (1), see `positions.py`.
        grid: Rows and columns of the N keys, for all but 'none'.
        with_total: Return Z as well, None otherwise.
        unit: Divide each key by its length; shorter ones than `eps` count as zero.
        eps: See `unit`.

    Returns:
        (B, heads, F d, e) and (B, heads, F d), in float32 at least.
    """
    x, y, heads = as_operand(k), as_operand(v), [k.shape[0], k.shape[1]]
    if unit:
        x = x * inverse_norm(x, -1, eps).to(x.dtype)
    total: torch.Tensor | None = None
    if with_total:
        total = sums_alone(x, locality, grid).unflatten(0, heads)
    return sums(x, y, locality, grid).unflatten(0, heads), total


def token_moments(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`sum_i q_i q_i^T`, `sum_j k_j k_j^T` and `sum_j k_j v_j^T`.

    Costs 2 N (d^2) + 2 M (d^2 + d e) operations a head; keeps q, k and v for the backward pass.

    Args:
        q: (B, heads, N, d).
        k: (B, heads, M, d).
        v: (B, heads, M, e).

    Returns:
        (B, heads, d, d) twice and (B, heads, d, e), in float32 at least.
    """
    heads = [q.shape[0], q.shape[1]]
    q, k, v = as_operand(q), as_operand(k), as_operand(v)
    pairs = (product(q.transpose(1, 2), q), product(k.transpose(1, 2), k), product(k.transpose(1, 2), v))
    return pairs[0].unflatten(0, heads), pairs[1].unflatten(0, heads), pairs[2].unflatten(0, heads)


def in_order(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(B, heads, N, e) in another dtype, whose copy has the heads of a position beside each other in memory."""
    if x.dtype == dtype:
        return x
    return x.transpose(1, 2).to(dtype, memory_format=torch.contiguous_format).transpose(1, 2)


def with_total(sums: torch.Tensor, total: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(B heads, F d, e + 1) sums with and without values, so that one product gives numerators and denominators.

    For half precision the columns are filled up to a multiple of 8, without which tensor cores go unused.
    """
    out = torch.cat([sums, total.unsqueeze(3)], dim=3).flatten(0, 1)
    return F.pad(out, [0, -out.shape[2] % 8]) if like.element_size() == 2 else out


def token_apply(
        q: torch.Tensor,
        sums: torch.Tensor,
        total: torch.Tensor | None = None,
        locality: str = 'none',
        grid: tuple[int, int] = (0, 0),
        clamp: bool = False,
        unit: bool = False,
        eps: float = 1e-6,
        base: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """What queries make of the sums: `o_i = sum_f phi_f(i) q_i S_f`, over the sum of weights or the query's length.

    Costs `2 F N d e` operations, half of that for '2d' on large grids.

    Args:
        q: Features of queries (B, heads, N, d).
        sums: S (B, heads, F d, e), as `token_sums` returns it.
        total: Z (B, heads, F d): divide by `sum_f phi_f(i) q_i . Z_f + eps`; None for no division.
        locality: As for `token_sums`.
        grid: As for `token_sums`.
        clamp: With `total`: clamp magnitudes of numerators, reciprocals and quotients into [1e-4, 1e4].
        unit: Divide each query by its length; shorter ones than `eps` count as zero.
        eps: See `total` and `unit`.
        base: Added to the result (B, heads, N, e).
        dtype: Of the result, that of q by default.

    Returns:
        (B, heads, N, e).
    """
    x, e = as_operand(q), sums.shape[3]
    out = apply(x, sums.flatten(0, 1) if total is None else with_total(sums, total, x), locality, grid)
    if unit:
        out = out * inverse_norm(x, -1, eps)
    if total is not None:
        out, weight = out[:, :, :e], out[:, :, e:e + 1] + eps
        if clamp:
            # the authors clamp the reciprocal; as the sum of weights is >= 0, capping it is the same
            magnitude = out.abs().clamp(1e-4, 1e4) / weight.clamp(max=1e4)
            out = magnitude.clamp(1e-4, 1e4) * out.sign()
        else:
            out = out / weight
    out = out.unflatten(0, [q.shape[0], q.shape[1]])
    if base is not None:
        out = out + base
    return in_order(out, q.dtype if dtype is None else dtype)
