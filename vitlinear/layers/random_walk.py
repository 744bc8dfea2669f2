"""Attention by random walks as a layer."""
import math

import torch
from torch import nn

from ..ops import random_walk_attention, split_heads
from ..ops._numerics import at_least_float32, check_choice
from ..ops.random_walk import MODES
from ._common import check_heads, merge_heads

MAX_BETA = 0.9
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.5, 16.


class RandomWalkAttention(nn.Module):
    """Multi-head attention by random walks over all positions of a map, linear in H W.

    Added here, after the abstract of https://openreview.net/forum?id=LTvSyvRaJO: see `ops/random_walk.py`.
    """

    def __init__(
            self,
            dim: int,
            num_heads: int = 8,
            mode: str = 'spectral',
            init_temperature: float = 4.,
            init_beta: float = 0.107,
            qkv_bias: bool = True,
            device=None,
            dtype=None,
    ):
        """
        Args:
            dim: Channels of the map.
            num_heads: Attention heads.
            mode: 'spectral' or 'walk', see `random_walk_attention`.
            init_temperature: Where the temperature of the features of 'walk' starts, learned for each head within 0.5
                to 16.
            init_beta: Where beta starts, learned for each head between 0 and 0.9; at 0 it stays there, and attention is
                one step.
            qkv_bias: Bias of the query, key and value projections.

        Raises:
            ValueError: `dim` is not divisible by `num_heads`, or another argument is unknown or out of range.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        check_choice('mode', mode, MODES)
        if not MIN_TEMPERATURE <= init_temperature <= MAX_TEMPERATURE:
            raise ValueError(
                f'init_temperature={init_temperature} must lie between {MIN_TEMPERATURE} and {MAX_TEMPERATURE}.')
        if not 0 <= init_beta < MAX_BETA:
            raise ValueError(f'init_beta={init_beta} must be 0, or lie between 0 and {MAX_BETA}.')
        self.num_heads = num_heads
        self.head_dim = check_heads(dim, num_heads)
        self.mode = mode
        self.init_temperature = init_temperature
        self.init_beta = init_beta
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.log_temperature = nn.Parameter(torch.empty(num_heads, **dd)) if mode == 'walk' else None
        self.theta = nn.Parameter(torch.empty(num_heads, **dd)) if init_beta > 0 else None
        self.register_buffer('fixed_beta', None)
        self.register_buffer('fixed_temperature', None)
        self.proj = nn.Linear(dim, dim, **dd)
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Initialise temperatures and betas."""
        if self.log_temperature is not None:
            nn.init.constant_(self.log_temperature, math.log(self.init_temperature))
        if self.theta is not None:
            nn.init.constant_(self.theta, math.log(self.init_beta / (MAX_BETA - self.init_beta)))

    def beta(self) -> torch.Tensor | None:
        """Probability (num_heads,) to return, below 0.9, in float32 at least; None where it is 0 for good."""
        theta = self.theta
        return self.fixed_beta if theta is None else at_least_float32(theta).sigmoid() * 0.9

    def temperature(self) -> torch.Tensor | None:
        """Temperature (num_heads,) of the features of 'walk', 0.5 to 16, in float32 at least; None for 'spectral'."""
        log_temperature = self.log_temperature
        if log_temperature is None:
            return self.fixed_temperature
        return at_least_float32(log_temperature).clamp(math.log(0.5), math.log(16.)).exp()

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Put the probabilities and temperatures in the place of what they are computed from, for inference.

        The state dict is another then.
        """
        beta, temperature = self.beta(), self.temperature()
        self.fixed_beta = None if beta is None else beta.detach()
        self.fixed_temperature = None if temperature is None else temperature.detach()
        self.theta = self.log_temperature = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        q, k, v = split_heads(self.qkv(x), 3, self.num_heads)
        y = random_walk_attention(q, k, v, self.beta(), self.temperature(), self.mode)
        return self.proj(merge_heads(y).view(x.shape))
