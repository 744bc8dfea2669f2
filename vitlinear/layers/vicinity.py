"""Vicinity attention as a layer: reduced projections (FRA), the kernel of `ops.vicinity`, the channel gate (FPC)."""
import torch
import torch.nn.functional as F
from torch import nn

from ..ops import clamp_magnitude, split_heads, vicinity_attention
from ..ops._numerics import check_choice
from ..ops.primitives.tokens.positions import LOCALITIES
from ._common import check_heads, merge_heads


class FeaturePreservingConnection(nn.Module):
    """Channel gate from the mean of the unreduced map (squeeze and excitation without biases)."""

    def __init__(self, dim: int, reduction: int = 1, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.fc1 = nn.Linear(dim, dim // reduction, bias=False, **dd)
        self.fc2 = nn.Linear(dim // reduction, dim, bias=False, **dd)

    def forward(self, mean: torch.Tensor) -> torch.Tensor:
        """Means over the map to gates in (0, 1), any shape that ends in C."""
        return self.fc2(F.relu(self.fc1(mean))).sigmoid()


class VicinityAttention(nn.Module):
    """Vicinity attention block: reduced projections, vicinity kernel, feature preserving connection.

    Paper: arXiv 2206.10552; evaluated as in the authors' released code.
    """

    def __init__(
            self,
            dim: int,
            num_heads: int = 1,
            feature_reduction: int = 2,
            fpc_reduction: int = 1,
            locality: str = '2d',
            clamp: bool = True,
            eps: float = 1e-4,
            device=None,
            dtype=None,
    ):
        """
        Args:
            dim: Channels of the map.
            num_heads: Attention heads.
            feature_reduction: Queries, keys and values have `dim / feature_reduction` channels (FRA in the paper).
            fpc_reduction: Hidden reduction of the channel gate (FPC in the paper).
            locality: Positional kernel, see `vicinity_attention`: '2d', '2d_product', '1d' or 'none'.
            clamp: Clamp magnitudes as the released weights were trained, see `vicinity_attention`.
            eps: Added to the denominator.

        Raises:
            ValueError: `dim` does not divide as asked, or `locality` is unknown.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        if feature_reduction < 1 or dim % feature_reduction:
            raise ValueError(f'dim={dim} must be a multiple of feature_reduction={feature_reduction}.')
        if fpc_reduction < 1 or dim // fpc_reduction < 1:
            raise ValueError(f'fpc_reduction={fpc_reduction} must lie between 1 and dim={dim}.')
        check_choice('locality', locality, LOCALITIES)
        self.reduced_dim = dim // feature_reduction
        check_heads(self.reduced_dim, num_heads, f'dim / feature_reduction = {dim} / {feature_reduction}')
        self.num_heads = num_heads
        self.locality = locality
        self.clamp = clamp
        self.eps = eps

        self.qkv = nn.Linear(dim, 3 * self.reduced_dim, **dd)
        self.proj = nn.Linear(self.reduced_dim, dim, **dd)
        self.fpc = FeaturePreservingConnection(dim, fpc_reduction, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        size = [x.shape[1], x.shape[2]]
        q, k, v = split_heads(self.qkv(x), 3, self.num_heads)
        q, k, v = F.relu(q).unflatten(2, size), F.relu(k).unflatten(2, size), v.unflatten(2, size)
        y = vicinity_attention(q, k, v, self.locality, self.clamp, self.eps)
        y = self.proj(merge_heads(y.flatten(2, 3)).unflatten(1, size))
        gate = 1 + self.fpc(x.mean(dim=(1, 2), keepdim=True))
        # after the gate only the upper bound can be met: |y| >= 1e-4 or y = 0 before, and the gate exceeds 1
        return (clamp_magnitude(y) * gate).clamp(-1e4, 1e4) if self.clamp else y * gate
