"""Every mechanism once more, in its textbook form: what the fast ones are tested against.

All form their weights in full, N x N or by window, and are meant for float64 and small maps. Unless they say otherwise
they take (B, heads, N, d) tensors.
"""
import math

import torch


def softmax_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """`softmax(q k^T / sqrt(d)) v`."""
    return (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1) @ v


def linear_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Kernel attention with phi(u) = elu(u) + 1, arXiv 2006.16236."""
    weights = (torch.nn.functional.elu(q) + 1) @ (torch.nn.functional.elu(k) + 1).transpose(-2, -1)
    return weights @ v / (weights.sum(dim=-1, keepdim=True) + eps)


def vicinity_kernel(H: int, W: int, locality: str = '2d', dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """(H W, H W) positional part of the vicinity weights, row-major positions."""
    def difference(n):
        angle = torch.arange(n, dtype=dtype) * (math.pi / 2 / n)
        return (angle[:, None] - angle[None, :]).cos()

    if locality == 'none':
        return torch.ones(H * W, H * W, dtype=dtype)
    if locality == '1d':
        return difference(H * W)
    rows = difference(H).repeat_interleave(W, 0).repeat_interleave(W, 1)
    columns = difference(W).repeat(H, H)
    return rows * columns if locality == '2d_product' else rows + columns


def vicinity_attention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        H: int,
        W: int,
        locality: str = '2d',
        eps: float = 1e-4,
) -> torch.Tensor:
    """Vicinity attention without the clamps, arXiv 2206.10552."""
    weights = (q @ k.transpose(-2, -1)) * vicinity_kernel(H, W, locality, q.dtype).to(q.device)
    return weights @ v / (weights.sum(dim=-1, keepdim=True) + eps)


def qna_attention(
        score: torch.Tensor,
        v: torch.Tensor,
        rel_pos_bias: torch.Tensor,
        attn_scale: torch.Tensor | None = None,
        stride: int = 1,
) -> torch.Tensor:
    """Learned-query attention over unfolded windows, arXiv 2112.11435; arguments as for `qna.qna_attention`."""
    _B, _H, W, L, heads = score.shape
    d, k = v.shape[3], rel_pos_bias.shape[-1]

    def unfold(x):  # (B, H, W, C) to (B, C, k * k, outputs)
        x = torch.nn.functional.unfold(x.permute(0, 3, 1, 2), k, padding=k // 2, stride=stride)
        return x.unflatten(1, (-1, k * k))

    inside = unfold(torch.ones_like(v[:1, :, :, 0, :1]))[0, 0]  # (k * k, outputs)
    scores = unfold(score.flatten(3)).unflatten(1, (L, heads)) + rel_pos_bias.reshape(L, heads, k * k, 1)
    weights = scores.masked_fill(inside == 0, -math.inf).softmax(dim=3)
    if attn_scale is not None:
        weights = weights * attn_scale.reshape(L, heads, k * k, 1)
    out = torch.einsum('blato,bdato->boda', weights, unfold(v.flatten(3)).unflatten(1, (d, heads)))
    return out.unflatten(1, (-1, (W - 1) // stride + 1))


def random_walk_features(
        x: torch.Tensor,
        temperature: torch.Tensor | None = None,
        eps: float = 1e-6,
) -> torch.Tensor:
    """Anchors of `random_walk.py`: `softmax(t x / rms(x))` with a temperature (heads,), elu + 1 without."""
    if temperature is None:
        return torch.nn.functional.elu(x) + 1
    rms = (x.square().mean(dim=-1, keepdim=True) + eps).sqrt()
    return (temperature.reshape(-1, 1, 1) * x / rms).softmax(dim=-1)


def random_walk_attention(p_q: torch.Tensor, p_k: torch.Tensor, v: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """Stationary walks on the graph of queries and keys, from features, with an M x M solve. Ours."""
    edges, beta = p_q @ p_k.transpose(-2, -1), beta.reshape(-1, 1, 1)
    to_key = edges / edges.sum(dim=-1, keepdim=True)
    to_query = edges.transpose(-2, -1) / edges.sum(dim=-2).unsqueeze(-1)
    there_and_back = beta * (to_query @ to_key)
    identity = torch.eye(v.shape[-2], dtype=v.dtype)
    return (1 - beta) * to_key @ torch.linalg.solve(identity - there_and_back, v)


def random_walk_graph(
        to_key: torch.Tensor,
        to_query: torch.Tensor,
        v: torch.Tensor,
        beta: torch.Tensor,
) -> torch.Tensor:
    """The graph kernel by its definition: all powers of sqrt(beta) A for the graph of all N + M nodes, by its inverse.

    Args:
        to_key: Edges or transition probabilities from queries to keys, (B, heads, N, M).
        to_query: The same from keys to queries, (B, heads, M, N).
        v: Values of the keys (B, heads, M, e).
        beta: Weight (heads,) of two steps.
    """
    (N, M), weight = to_key.shape[-2:], beta.reshape(-1, 1, 1).sqrt()
    graph = torch.zeros(*to_key.shape[:2], N + M, N + M, dtype=v.dtype)
    graph[..., :N, N:], graph[..., N:, :N] = to_key, to_query
    kernel = torch.linalg.inv(torch.eye(N + M, dtype=v.dtype) - weight * graph)
    return kernel[..., :N, N:] / weight @ v


def random_walk_solve(p_q: torch.Tensor, p_k: torch.Tensor, v: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """As `random_walk_attention`, through an r x r solve: what the series of `random_walk.py` stands for."""
    degree_q = p_q @ p_k.mean(dim=-2).unsqueeze(-1)
    degree_k = p_k @ p_q.mean(dim=-2).unsqueeze(-1)
    h_q = p_q.transpose(-2, -1) @ (p_q / degree_q) / p_q.shape[-2]
    h_k = p_k.transpose(-2, -1) @ (p_k / degree_k) / p_k.shape[-2]
    beta = beta.reshape(-1, 1, 1)
    core = torch.eye(p_q.shape[-1], dtype=v.dtype) - beta * h_k @ h_q
    sums = p_k.transpose(-2, -1) @ v / v.shape[-2]
    return (1 - beta) * (p_q / degree_q) @ torch.linalg.solve(core, sums)


def spectral_walk_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """The kernel of signed edges S = q k^T over a bound of its norm, with an M x M solve. Ours."""
    def norm_bound(x):  # Schatten norm of order 8
        return torch.linalg.svdvals(x).pow(16).sum(dim=-1).pow(1 / 16)[..., None, None]

    edges = (q / norm_bound(q)) @ (k / norm_bound(k)).transpose(-2, -1)
    core = torch.eye(v.shape[-2], dtype=v.dtype) - beta.reshape(-1, 1, 1) * edges.transpose(-2, -1) @ edges
    return edges @ torch.linalg.solve(core, v)


def xnorm_attention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        gamma_q: torch.Tensor,
        gamma_kv: torch.Tensor,
        kv_axis: str = 'key',
) -> torch.Tensor:
    """XNorm attention, arXiv 2205.13805, queries and keys first; the norms of K^T V from Gram matrices of positions.

    Scales are (heads,), and no vector is zero.
    """
    gamma = (gamma_q * gamma_kv).reshape(-1, 1, 1)
    q = q / q.square().sum(dim=-1, keepdim=True).sqrt()
    if kv_axis == 'key':  # |K^T v_j|^2 = v_j^T (K K^T) v_j
        norm = (v * (k @ k.transpose(-2, -1) @ v)).sum(dim=-2, keepdim=True).sqrt()
        return gamma * (q @ k.transpose(-2, -1)) @ v / norm
    norm = (k * (v @ v.transpose(-2, -1) @ k)).sum(dim=-2, keepdim=True).sqrt()
    return gamma * ((q / norm) @ k.transpose(-2, -1)) @ v


def _depthwise_matrix(weight: torch.Tensor, coordinates: torch.Tensor) -> torch.Tensor:
    """A convolution (heads, 1, k, l) with zeros outside as matrices (heads, N, N) between positions (N, 2)."""
    size = torch.tensor(weight.shape[2:])
    tap = coordinates[None, :] - coordinates[:, None] + size // 2
    inside = ((tap >= 0) & (tap < size)).all(dim=-1)
    tap = tap.clamp(min=torch.zeros_like(size), max=size - 1)
    return weight[:, 0, tap[..., 0], tap[..., 1]] * inside


def linear_angular_attention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        weight: torch.Tensor,
        grid: tuple[int, int] | None = None,
        num_prefix_tokens: int = 0,
        stride: int = 1,
        kv_scale: float = 1.,
        threshold: float = 1.,
) -> torch.Tensor:
    """Linear-angular attention with its masked softmax and its convolution as matrices of all pairs, arXiv 2211.10526.

    Arguments are those of `linear_angular.linear_angular_attention`, and the `threshold` below which a softmax weight
    does not count. No vector is zero.
    """
    M, P = k.shape[-2], num_prefix_tokens
    queries = torch.arange(M)
    if stride > 1:
        queries = torch.cat([queries[:P], queries[P:].reshape(grid)[::stride, ::stride].flatten()])
    cos = (q / q.norm(dim=-1, keepdim=True)) @ (k / k.norm(dim=-1, keepdim=True)).transpose(-2, -1)
    softmax = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1)
    identity = torch.eye(M, dtype=v.dtype)[queries]
    y = (identity / 2 + kv_scale * cos / math.pi + softmax * (softmax > threshold)) @ v
    if weight.shape[-1] == 1:
        local = _depthwise_matrix(weight, torch.stack([torch.arange(M), torch.zeros(M).long()], dim=1))
    else:
        local = _depthwise_matrix(weight, torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])))
        local = torch.nn.functional.pad(local, (P, 0, P, 0))
    return y / y.norm(dim=-1, keepdim=True) + local[:, queries] @ v
