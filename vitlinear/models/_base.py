"""timm's contract, once: what every model of ours does besides its layers, for flat models and pyramids alike."""
import math
from functools import partial

import torch
from timm.layers import get_device_dtype, to_2tuple
from torch import nn

from ..ops._dispatch import scripts_as
from ._timm import feature_take_indices, register_notrace_function

__all__ = ['ImageModel', 'check_input', 'check_positive', 'init_module']


def _check_batch(x: torch.Tensor, in_chans: int) -> None:
    if x.ndim != 4:
        raise ValueError(f'Expected a (B, {in_chans}, H, W) batch of images, got {x.ndim} dimensions.')
    if x.shape[1] != in_chans:
        raise ValueError(
            f'Expected {in_chans} input channels (in_chans), got {x.shape[1]} in a batch of shape {list(x.shape)}.')
    if x.shape[0] == 0 or x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f'Expected a batch of at least one image and one pixel, got shape {list(x.shape)}.')


@register_notrace_function
@scripts_as(_check_batch)
def check_input(x: torch.Tensor, in_chans: int) -> None:
    """Raise ValueError unless `x` is a non-empty (B, in_chans, H, W) batch; while a model is traced, never."""
    if not torch.jit.is_tracing():  # sizes are tensors then, and what was checked would not be part of the graph
        _check_batch(x, in_chans)


def check_positive(**values: float) -> None:
    """Raise ValueError, with the argument's name, unless all values are positive."""
    for name, value in values.items():
        if value <= 0:
            raise ValueError(f'{name}={value} must be positive.')


def check_drop_path(rate: float) -> None:
    """Raise ValueError unless `rate` is a probability below 1."""
    if not 0 <= rate < 1:
        raise ValueError(f'drop_path_rate={rate} must lie in [0, 1).')


def check_img_size(img_size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width of the images of a side, or of a height and width; ValueError unless both are positive."""
    H, W = to_2tuple(img_size)
    if H < 1 or W < 1:
        raise ValueError(f'img_size={img_size} must be positive.')
    return H, W


def check_num_classes(num_classes: int) -> None:
    """Raise ValueError where `num_classes` is negative."""
    if num_classes < 0:
        raise ValueError(f'num_classes={num_classes} must not be negative.')


def _quoted(names: tuple[str, ...]) -> str:
    return ' or '.join([', '.join(f"'{name}'" for name in names[:-1]), f"'{names[-1]}'"])


def init_module(m: nn.Module, needs_reset: bool = True) -> None:
    """Initialise the weights that a module holds itself, as PVTv2 does (arXiv 2106.13797).

    Args:
        m: Linear layer, convolution or any other module.
        needs_reset: Call `reset_parameters()` of the others that have it.
    """
    if isinstance(m, nn.Linear):
        nn.init.trunc_normal_(m.weight, std=.02)  # timm's gives weights of 2 in half precision
        if m.bias is not None:
            nn.init.zeros_(m.bias)
    elif isinstance(m, nn.Conv2d):
        fan_out = m.kernel_size[0] * m.kernel_size[1] * m.out_channels // m.groups
        nn.init.normal_(m.weight, std=math.sqrt(2. / fan_out))
        if m.bias is not None:
            nn.init.zeros_(m.bias)
    elif needs_reset and hasattr(m, 'reset_parameters'):
        m.reset_parameters()


class ImageModel(nn.Module):
    """A classifier of images with timm's contract: head, pooling, intermediate maps, initialisation, checkpointing.

    The layers are the derived class's: `patch_embed`; the modules whose outputs are the intermediate maps, in an
    `nn.Sequential` of the name `parts`; `norm`; `feature_info`; and `forward_features`, `forward_head`, `forward`. Its
    constructor calls this one first, and `_add_head` and `init_weights(needs_reset=False)` last.
    """
    parts = 'stages'
    # Whether all parts have the channels of the head, so that its norm and classifier fit behind each of them.
    one_width = False
    global_pools: tuple[str, ...] = ('avg', '')
    output_fmts: tuple[str, ...] = ('NCHW', 'NHWC')

    def __init__(self, in_chans: int, num_classes: int, global_pool: str, num_features: int):
        """
        Args:
            in_chans: Channels of the input images.
            num_classes: Classes of the head, 0 for none.
            global_pool: One of `global_pools`, '' to leave the last map unpooled.
            num_features: Channels of the last map.

        Raises:
            ValueError: A value is out of range.
        """
        super().__init__()
        self._check_global_pool(global_pool)
        check_positive(in_chans=in_chans)
        check_num_classes(num_classes)
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.num_features = self.head_hidden_size = num_features

    def _check_global_pool(self, global_pool: str) -> None:
        if global_pool not in self.global_pools:
            raise ValueError(
                f"Unsupported global_pool '{global_pool}', expected {_quoted(self.global_pools)} (no pooling).")

    def _add_head(self, drop_rate: float, device=None, dtype=None) -> None:
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._make_classifier(device, dtype)

    def _make_classifier(self, device=None, dtype=None) -> nn.Module:
        if self.num_classes == 0:
            return nn.Identity()
        return nn.Linear(self.num_features, self.num_classes, device=device, dtype=dtype)

    # weights

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise all weights.

        Args:
            needs_reset: Also call `reset_parameters()` of modules that initialise themselves when constructed, as is
                needed after `to_empty()`.
        """
        self.apply(partial(self._init_weights, needs_reset=needs_reset))

    def _init_weights(self, m: nn.Module, needs_reset: bool = True) -> None:
        init_module(m, needs_reset)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters to exempt from weight decay, besides the biases, norms and scales that timm exempts."""
        return set()

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations.

        Batch norms see each batch twice then, so that their running statistics move faster.
        """
        for m in self.modules():
            if hasattr(m, 'grad_checkpointing'):
                m.grad_checkpointing = enable

    # the classifier

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier: a linear layer, or an identity without classes."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier.

        Args:
            num_classes: Classes of the new one, 0 for none.
            global_pool: One of `global_pools`, None to keep the present pooling.

        Raises:
            ValueError: `num_classes` is negative or `global_pool` unsupported; the model is left as it was.
        """
        check_num_classes(num_classes)
        dd = get_device_dtype(self)
        if global_pool is not None:
            self._check_global_pool(global_pool)
            self._set_global_pool(global_pool, **dd)
        self.num_classes = num_classes
        self.head = self._make_classifier(**dd)
        self._init_weights(self.head)
        self.head.train(self.training)

    def _set_global_pool(self, global_pool: str, device=None, dtype=None) -> None:
        self.global_pool = global_pool

    # maps

    def _embed(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, in_chans, H, W) to the input of the first part."""
        check_input(x, self.in_chans)
        return self.patch_embed(x)

    def _run_part(self, part: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return part(x)

    def _to_map(self, x: torch.Tensor, norm: bool) -> torch.Tensor:
        """What a part returned, as a (B, C, H, W) map, with the model's norm if `norm`."""
        raise NotImplementedError

    def _to_features(self, x: torch.Tensor) -> torch.Tensor:
        """What the last part returned to what `forward_features` returns."""
        raise NotImplementedError

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: int | list[int] | None = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Forward pass that returns the maps of the parts: stages, or the blocks of a flat model.

        Args:
            x: Images (B, in_chans, H, W).
            indices: Parts whose maps to return: the last n if int, all if None, else these.
            norm: Apply the model's norm to the maps that it fits: that of the last stage, or those of all blocks.
            stop_early: Do not run the parts after the last one asked for.
            output_fmt: One of `output_fmts`.
            intermediates_only: Return the list of maps alone.

        Returns:
            The last map as (B, C, H, W) and the list of maps, or that list.

        Raises:
            ValueError: `output_fmt` is unsupported, or `x` no batch of images.
        """
        if output_fmt not in self.output_fmts:
            raise ValueError(f"Unsupported output_fmt '{output_fmt}', expected {_quoted(self.output_fmts)}.")
        parts = getattr(self, self.parts)
        take_indices, max_index = feature_take_indices(len(parts), indices)
        last = len(parts) - 1
        intermediates = []
        x = self._embed(x)
        for i, part in enumerate(parts[:max_index + 1] if stop_early else parts):
            x = self._run_part(part, x)
            if i in take_indices:
                y = self._to_map(x, norm and (self.one_width or i == last))
                if output_fmt != 'NCHW':
                    y = y.permute(0, 2, 3, 1)
                intermediates.append(y.flatten(1, 2) if output_fmt == 'NLC' else y)
        if intermediates_only:
            return intermediates
        stopped = stop_early and max_index < last
        return self._to_map(x, norm=False) if stopped else self._to_features(x), intermediates

    def prune_intermediate_layers(
            self,
            indices: int | list[int] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> list[int]:
        """Remove what the given intermediates do not need; norm and head also where they do not fit what is left.

        Args:
            indices: Parts to keep: the last n if int, else these.
            prune_norm: Remove the norm in any case.
            prune_head: Remove the classifier and pooling in any case.

        Returns:
            The indices of the kept intermediates.
        """
        parts = getattr(self, self.parts)
        take_indices, max_index = feature_take_indices(len(parts), indices)
        unfit = not self.one_width and max_index < len(parts) - 1
        setattr(self, self.parts, parts[:max_index + 1])
        if prune_norm or unfit:
            self.norm = nn.Identity()
        self.num_features = self.head_hidden_size = self.feature_info[max_index]['num_chs']
        if prune_head or unfit:
            self.reset_classifier(0, '')
        return take_indices
