"""Learned-query local attention as a layer, and its folded form for inference."""
import torch
import torch.nn.functional as F
from torch import nn

from ..ops import qna_attention
from ..ops._dispatch import is_plain_tensor
from ..ops._numerics import check_choice
from ..ops.primitives.windows import window_kernel
from ..ops.qna import fold_queries, key_scores, unit_query
from ._common import check_heads, init_lecun_


class KeyProjection(nn.Linear):
    """Projection to keys; given queries, it gives their products with the keys, which are then never formed."""

    def __init__(self, dim: int, attn_dim: int, bias: bool = False, device=None, dtype=None):
        super().__init__(dim, attn_dim, bias, device, dtype)
        self.gives_scores = True

    def forward(self, x: torch.Tensor, query: torch.Tensor | None = None) -> torch.Tensor:
        """(B, H, W, dim), and queries (L, heads, d) from `unit_query`, to scores (B, H, W, L, heads), or to keys."""
        if query is None:
            return F.linear(x, self.weight, self.bias)
        if not is_plain_tensor(self.weight):  # quantised, for which linear layers alone exist
            return key_scores(F.linear(x, self.weight, self.bias), query)
        weight, bias = fold_queries(query, self.weight, self.bias)
        return F.linear(x, weight, bias).unflatten(3, [query.shape[0], query.shape[1]])


class QnAAttention(nn.Module):
    """Learned-query local attention: queries shared by all positions, softmax over k x k windows.

    Linear in H W, and its memory does not depend on k. Paper: arXiv 2112.11435.
    """

    def __init__(
            self,
            dim: int,
            num_heads: int = 8,
            kernel_size: int = 3,
            stride: int = 1,
            num_queries: int = 2,
            attn_dim: int | None = None,
            out_dim: int | None = None,
            qkv_bias: bool = False,
            proj_bias: bool = False,
            normalize_query: bool = True,
            attn_scale: str = 'learned',
            attn_scale_std: float = 0.02,
            device=None,
            dtype=None,
    ):
        """
        Args:
            dim: Channels of the map.
            num_heads: Attention heads.
            kernel_size: Side k of the windows, odd.
            stride: Of the windows: the output has ceil(H / stride) rows.
            num_queries: Learned queries L of each head, whose results are added.
            attn_dim: Channels of keys and values, `dim` by default.
            out_dim: Channels of the output, `attn_dim` by default.
            qkv_bias: Bias of the key and value projections.
            proj_bias: Bias of the output projection.
            normalize_query: Give the queries unit length.
            attn_scale: Scale of the taps after the softmax: 'learned', 'none' (1) or 'avg' (1 / L).
            attn_scale_std: Standard deviation of a new learned scale. The authors' value makes a new layer nearly
                silent; with 1 it starts like a convolution of random kernels.

        Raises:
            ValueError: `attn_dim` is not divisible by `num_heads`, or another argument is out of range.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        attn_dim = dim if attn_dim is None else attn_dim
        out_dim = attn_dim if out_dim is None else out_dim
        for name, value in (('dim', dim), ('stride', stride), ('num_queries', num_queries), ('out_dim', out_dim)):
            if value < 1:
                raise ValueError(f'{name}={value} must be positive.')
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f'kernel_size={kernel_size} must be odd and positive.')
        check_choice('attn_scale', attn_scale, ('learned', 'none', 'avg'))
        self.num_heads = num_heads
        self.head_dim = check_heads(attn_dim, num_heads, 'dim' if attn_dim == dim else 'attn_dim')
        self.kernel_size = kernel_size
        self.stride = stride
        self.num_queries = num_queries
        self.normalize_query = normalize_query
        self.attn_scale_std = attn_scale_std
        self.scale = 1. / num_queries if attn_scale == 'avg' else 1.
        self.query = nn.Parameter(torch.empty(num_queries, attn_dim, **dd))
        self.k = KeyProjection(dim, attn_dim, bias=qkv_bias, **dd)
        self.v = nn.Linear(dim, attn_dim, bias=qkv_bias, **dd)
        taps = (num_queries * num_heads, 1, kernel_size, kernel_size)
        self.rel_pos_bias = nn.Parameter(torch.empty(taps, **dd))
        self.attn_scale = nn.Parameter(torch.empty(taps, **dd)) if attn_scale == 'learned' else None
        self.proj = nn.Linear(attn_dim, out_dim, bias=proj_bias, **dd)
        self.reset_parameters()
        for layer in (self.k, self.v, self.proj):
            init_lecun_(layer)

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Initialise queries, biases and scales as the authors do, the scales with the layer's standard deviation."""
        nn.init.trunc_normal_(self.query, std=1., a=-2., b=2.)
        with torch.no_grad():
            self.query.mul_(self.head_dim ** -0.5)
        nn.init.zeros_(self.rel_pos_bias)
        if self.attn_scale is not None:
            nn.init.normal_(self.attn_scale, std=self.attn_scale_std)

    def fold(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The weights of one projection to values, ones and scores, its bias, the window kernel, and the output's."""
        heads, d = self.num_heads, self.head_dim
        query = unit_query(self.query, heads, self.normalize_query)
        k, k_bias = fold_queries(query, self.k.weight.to(query.dtype), self.k.bias)
        v = self.v.weight.to(query.dtype).unflatten(0, [heads, d]).transpose(0, 1)  # (d, heads, dim)
        k = k.unflatten(0, [self.num_queries, heads])
        weight = torch.cat([v, v.new_zeros(1, *v.shape[1:]), k]).flatten(0, 1)

        v_bias, score_bias = query.new_zeros(d, heads), query.new_zeros(self.num_queries, heads)
        if self.v.bias is not None and k_bias is not None:
            v_bias = self.v.bias.to(query.dtype).unflatten(0, [heads, d]).t()
            score_bias = k_bias.unflatten(0, [self.num_queries, heads])
        bias = torch.cat([v_bias, query.new_ones(1, heads), score_bias]).flatten()

        kernel = window_kernel(self.rel_pos_bias, self.attn_scale, self.num_queries, d, self.scale)
        proj = self.proj.weight.reshape(-1, heads, d).transpose(1, 2).flatten(1)
        if dtype != torch.float16:
            kernel = kernel.to(dtype)  # a float16 one would lose the taps that matter where others lie outside the map
        return weight.to(dtype), bias.to(dtype), kernel, proj.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, dim) to (B, ceil(H / stride), ceil(W / stride), out_dim)."""
        v = self.v(x).unflatten(3, [self.num_heads, self.head_dim]).transpose(3, 4)
        query = unit_query(self.query, self.num_heads, self.normalize_query)
        # an adapter in the place of the projection gives keys
        score = self.k(x, query) if hasattr(self.k, 'gives_scores') else key_scores(self.k(x), query)
        y = qna_attention(score, v, self.rel_pos_bias, self.attn_scale, self.stride, self.scale)
        return self.proj(y.transpose(3, 4).flatten(3))

    @torch.jit.ignore
    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """The layer with its queries folded into the projection for good, for inference: `FoldedQnAAttention`.

        Layers that are not plain linear ones, such as adapters, cannot be folded: the layer itself is returned then.
        """
        plain = type(self.k) is KeyProjection and type(self.v) is type(self.proj) is nn.Linear
        return FoldedQnAAttention(self) if plain else self


class FoldedQnAAttention(nn.Module):
    """What `QnAAttention.fuse` makes of a layer: the same function, one projection to values, ones and scores.

    Its weights are those of the folded form, so that nothing is computed from them in a call. The form of
    `QnAAttention` cannot be had back from them.
    """

    def __init__(self, attn: QnAAttention):
        super().__init__()
        self.num_heads = attn.num_heads
        self.kernel_size = attn.kernel_size
        self.stride = attn.stride
        self.num_queries = attn.num_queries
        self.scale = attn.scale
        weight, bias, kernel, proj = attn.fold(attn.proj.weight.dtype)
        self.joint = _linear(weight, bias)
        self.proj = _linear(proj, attn.proj.bias)
        self.register_buffer('kernel', kernel)
        self.register_buffer('rel_pos_bias', attn.rel_pos_bias.detach())
        self.register_buffer('attn_scale', None if attn.attn_scale is None else attn.attn_scale.detach())
        self.train(attn.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, dim) to (B, ceil(H / stride), ceil(W / stride), out_dim)."""
        joint = self.joint(x)
        joint = joint.unflatten(3, [joint.shape[3] // self.num_heads, self.num_heads])
        v, score = joint[:, :, :, :-1 - self.num_queries], joint[:, :, :, -self.num_queries:]
        y = qna_attention(score, v, self.rel_pos_bias, self.attn_scale, self.stride, self.scale, self.kernel)
        return self.proj(y.flatten(3))


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device='meta')
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach())
    return layer
