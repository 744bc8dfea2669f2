"""The pyramids that families share: `HierarchicalModel` has timm's contract, `Pyramid` stem, stages and head as well.

The structure of `Pyramid` is that of PVTv2 (arXiv 2106.13797): overlapping patch embeddings, pre-norm blocks with a
convolutional MLP, a norm after each stage. Maps are (B, H, W, C) within a stage and leave it as a (B, C, H, W) view in
channels-last memory, so neither norms nor convolutions copy.
"""
import math
from contextlib import contextmanager
from functools import partial
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Set, Tuple, Type, Union

import torch
import torch.nn as nn
import torch.nn.functional as F

from timm.layers import DropPath, Mlp as _Mlp, calculate_drop_path_rates, get_device_dtype, to_ntuple

from ._timm import checkpoint, feature_take_indices, register_notrace_function, register_notrace_module
from ..layers import ATTENTION_LAYERS, get_attention_layer
from ..ops._common import (
    band_rows,
    depthwise,
    has_hooks,
    is_eager,
    is_plain,
    one_ahead,
    packed_weight,
    plain_gelu,
    pointwise,
    use_bands,
)
from ..layers._fold import wide_dtype
from ..layers.qna import FoldedQnAAttention

# Bytes of hidden channels that the MLP evaluates at a time in inference: about the size of the caches of two cores.
# Measured: 768 channels of a 256 x 256 map take 43 ms in bands and 175 ms at once (bf16), the difference being memory
# traffic.
MLP_BAND = 2 ** 22

AttnLayer = Union[str, Callable[..., nn.Module]]

for _layer in (*ATTENTION_LAYERS.values(), FoldedQnAAttention):
    register_notrace_module(_layer)


@register_notrace_function
def check_input(x: torch.Tensor, in_chans: int) -> None:
    """Raise ValueError unless `x` is a non-empty (B, in_chans, H, W) batch."""
    if not torch.jit.is_scripting():
        if torch.jit.is_tracing():
            return  # sizes are tensors then, and what was checked would not be part of the graph
    if x.ndim != 4:
        raise ValueError(f'Expected a (B, {in_chans}, H, W) batch of images, got {x.ndim} dimensions.')
    if x.shape[1] != in_chans:
        raise ValueError(
            f'Expected {in_chans} input channels (in_chans), got {x.shape[1]} in a batch of shape {list(x.shape)}.')
    if x.shape[0] == 0 or x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f'Expected a batch of at least one image and one pixel, got shape {list(x.shape)}.')


def _residual_in_bands(
        x: torch.Tensor,
        norm: Optional[nn.Module],
        branch: Callable[[torch.Tensor, int, int], torch.Tensor],
        hidden_dim: int,
        context: int = 0,
        out: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """`branch(x)`, or `x + branch(norm(x))`, for some images or some rows at a time, for inference.

    Args:
        x: Map (B, H, W, C).
        norm: Norm in front of the branch, with which the map itself is added to the result.
        branch: Takes a band of rows and how many of its first and last ones are context, which it leaves out.
        hidden_dim: Largest number of channels in the branch.
        context: Rows that the branch needs on either side of a band.
        out: Where to put the result; may be `x` if there is a norm.
    """
    B, H, W, _ = x.shape
    row = W * hidden_dim * x.element_size()
    images = max(1, MLP_BAND // (H * row))
    rows = band_rows(H, row, MLP_BAND, least=8)

    def bands() -> Iterator[Tuple[Tuple[slice, slice], torch.Tensor, int, int]]:
        for b in range(0, B, images):
            for i in range(0, H, rows):
                above, below = min(i, context), max(0, min(context, H - i - rows))
                band = x[b:b + images, i - above:i + rows + below]
                where = slice(b, b + images), slice(i, i + rows)
                yield where, band if norm is None else norm(band), above, below

    for where, band, above, below in one_ahead(bands()) if out is x else bands():
        y = branch(band, above, below)
        if out is None:
            out = y.new_empty(x.shape, dtype=y.dtype if norm is None else torch.result_type(x, y))
        if norm is None:
            out[where] = y
        else:
            torch.add(x[where], y, out=out[where])
    return out


class Mlp(_Mlp):
    """timm's MLP on (B, H, W, C) maps, which inference on a CPU takes in bands of rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        if not torch.jit.is_scripting():
            if use_bands(x):
                return self.in_bands(x)
        x = self.drop1(self.act(self.fc1(x)))
        return self.drop2(self.fc2(self.norm(x)))

    @torch.jit.unused
    def in_bands(
            self,
            x: torch.Tensor,
            norm: Optional[nn.Module] = None,
            out: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """`forward(x)`, or `x + forward(norm(x))`, in bands; see `residual` for `out`."""
        return _residual_in_bands(x, norm, self._band, self.fc1.out_features, out=out)

    @torch.jit.unused
    def _band(self, x: torch.Tensor, above: int, below: int) -> torch.Tensor:
        x = self.norm(self.drop1(pointwise(x, self.fc1, self.act)))
        return self.drop2(pointwise(x, self.fc2))


@register_notrace_module
class ConvMlp(nn.Module):
    """MLP with a depthwise 3x3 convolution before its activation, on (B, H, W, C) maps.

    Paper: PVTv2, arXiv 2106.13797.
    """

    def __init__(
            self,
            dim: int,
            hidden_dim: int,
            act_layer: Callable[..., nn.Module] = nn.GELU,
            drop: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.hidden_dim = hidden_dim
        self.fc1 = nn.Linear(dim, hidden_dim, **dd)
        self.dwconv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim, **dd)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden_dim, dim, **dd)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        if not torch.jit.is_scripting():
            if use_bands(x):
                return self.in_bands(x)
        x = self.fc1(x).permute(0, 3, 1, 2)
        if torch.jit.is_scripting():
            x = self.dwconv(x)
        else:
            x = self._convolve(x)
        x = self.drop1(self.act(x.permute(0, 2, 3, 1)))
        return self.drop2(self.fc2(x))

    @torch.jit.unused
    def _convolve(self, x: torch.Tensor) -> torch.Tensor:
        """The convolution; in training on a CPU with zeros around maps smaller than its kernel.

        Their backward pass takes several times as long without: 27 against 4 ms for 128 maps of 2 x 2 with 1024
        channels in bfloat16 on one core.
        """
        H, W = x.shape[-2:]
        if self.training and min(H, W) < 3 and x.device.type == 'cpu' and is_eager():
            return self.dwconv(F.pad(x, (0, max(0, 3 - W), 0, max(0, 3 - H))))[:, :, :H, :W]
        return self.dwconv(x)

    def in_bands(
            self,
            x: torch.Tensor,
            norm: Optional[nn.Module] = None,
            out: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """`forward(x)`, or `x + forward(norm(x))`, in bands with one more row on either side for the convolution.

        See `residual` for `out`.
        """
        return _residual_in_bands(x, norm, self._band, self.hidden_dim, context=1, out=out)

    def _band(self, x: torch.Tensor, above: int, below: int) -> torch.Tensor:
        x = pointwise(x, self.fc1)
        return self.drop2(pointwise(self.drop1(self._depthwise(x, above, below)), self.fc2))

    def _depthwise(self, x: torch.Tensor, above: int, below: int) -> torch.Tensor:
        """The convolution and activation of a band (B, H, W, C), without the rows that are context."""
        x = x.permute(0, 3, 1, 2)
        gelu = plain_gelu(self.act)
        rows = slice(above, x.shape[2] - below)
        if gelu is not None and is_plain(self.dwconv, nn.Conv2d) and not torch.is_autocast_enabled('cpu'):
            args = gelu, packed_weight(self.dwconv)
            if above and below:
                x = depthwise(x, self.dwconv.weight, self.dwconv.bias, [0, 1], *args)
            else:
                x = depthwise(x, self.dwconv.weight, self.dwconv.bias, [1, 1], *args)[:, :, rows]
            return x.permute(0, 2, 3, 1)
        return self.act(self.dwconv(x)[:, :, rows].permute(0, 2, 3, 1))


def residual(
        x: torch.Tensor,
        norm: nn.Module,
        branch: nn.Module,
        drop_path: nn.Module,
        overwrite: bool = False,
) -> torch.Tensor:
    """`x + drop_path(branch(norm(x)))` in eager mode: in bands, where that is possible and pays.

    Args:
        x: Map (B, H, W, C).
        norm: Norm in front of the branch.
        branch: Attention or MLP. One that works in bands has `in_bands(x, norm, out)`, `out` being where to put the
            result, None or `x` itself.
        drop_path: Stochastic depth of the branch.
        overwrite: Nobody needs `x` afterwards: in inference on a CPU the result may take its place.
    """
    if branch.training or not use_bands(x) or has_hooks(norm) or has_hooks(branch):
        return x + drop_path(branch(norm(x)))
    overwrite = overwrite and isinstance(norm, nn.LayerNorm)  # the result of others may share the memory of x
    if hasattr(branch, 'in_bands'):
        return branch.in_bands(x, norm, x if overwrite else None)
    y = drop_path(branch(norm(x)))
    return x.add_(y) if overwrite and torch.result_type(x, y) == x.dtype else x + y


class Block(nn.Module):
    """Pre-norm attention and MLP on a (B, H, W, C) map."""

    def __init__(
            self,
            dim: int,
            attn: nn.Module,
            mlp_ratio: float = 4.,
            proj_drop: float = 0.,
            drop_path: float = 0.,
            act_layer: Callable[..., nn.Module] = nn.GELU,
            norm_layer: Callable[..., nn.Module] = partial(nn.LayerNorm, eps=1e-6),
            mlp_layer: Callable[..., nn.Module] = ConvMlp,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.norm1 = norm_layer(dim, **dd)
        self.attn = attn
        self.drop_path1 = DropPath(drop_path) if drop_path > 0. else nn.Identity()
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = mlp_layer(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            x = x + self.drop_path1(self.attn(self.norm1(x)))
            x = x + self.drop_path2(self.mlp(self.norm2(x)))
        else:
            x = self.run(x)
        return x

    @torch.jit.unused
    def run(self, x: torch.Tensor, overwrite: bool = False) -> torch.Tensor:
        """`forward(x)`, which may write over `x` if `overwrite`."""
        x = residual(x, self.norm1, self.attn, self.drop_path1, overwrite)
        return residual(x, self.norm2, self.mlp, self.drop_path2, overwrite=True)


def is_new(module: nn.Module, x: torch.Tensor, y: torch.Tensor, overwrite: bool = False) -> bool:
    """Whether nobody but the caller can see `y = module(x)`, in inference on a CPU; `overwrite`: that holds for `x`."""
    if not use_bands(x) or any(has_hooks(m) for m in module.modules()):
        return False
    return overwrite or y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def run_blocks(blocks: nn.ModuleList, x: torch.Tensor, grad_checkpointing: bool, overwrite: bool) -> torch.Tensor:
    """The blocks of a stage one after the other; in inference one may write over what the one before it returned.

    Args:
        blocks: Modules from (B, H, W, C) to (B, H, W, C).
        x: Map (B, H, W, C).
        grad_checkpointing: Keep the inputs of blocks alone for the backward pass.
        overwrite: Nobody needs `x` afterwards.
    """
    for block in blocks:
        is_hidden = type(block) is Block and not has_hooks(block)
        if grad_checkpointing:
            x = checkpoint(block, x)
        elif overwrite and is_hidden and use_bands(x):
            x = block.run(x, overwrite=True)
        else:
            x = block(x)
        overwrite = is_hidden
    return x


class PatchEmbed(nn.Module):
    """Overlapping patch embedding: strided convolution and norm, (B, C, H, W) to (B, C', H', W').

    A side of n becomes ceil(n / stride) for odd `patch_size`.
    """

    def __init__(
            self,
            in_chans: int,
            embed_dim: int,
            patch_size: int = 3,
            stride: int = 2,
            norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=stride, padding=patch_size // 2, **dd)
        self.norm = norm_layer(embed_dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        memory_format = torch.channels_last
        if not torch.jit.is_scripting():
            if use_bands(x) and x.numel() < self.proj.weight.numel():
                # the weight would be brought into the format of the map, which takes longer than to do without:
                # 320 channels of a 14 x 14 map to 512 take 1.5 ms and 0.6
                memory_format = torch.contiguous_format
        x = self.proj(x.contiguous(memory_format=memory_format))
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PyramidStage(nn.Module):
    """Downsampling, blocks and norm, (B, C, H, W) to (B, C', H', W')."""

    def __init__(
            self,
            in_dim: int,
            dim: int,
            attn_layers: Sequence[nn.Module],
            downsample: bool = True,
            mlp_ratio: float = 4.,
            proj_drop: float = 0.,
            drop_path: Sequence[float] = (),
            act_layer: Type[nn.Module] = nn.GELU,
            norm_layer: Callable[..., nn.Module] = partial(nn.LayerNorm, eps=1e-6),
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.grad_checkpointing = False
        self.downsample = PatchEmbed(in_dim, dim, **dd) if downsample else nn.Identity()
        self.blocks = nn.ModuleList([
            Block(
                dim,
                attn,
                mlp_ratio=mlp_ratio,
                proj_drop=proj_drop,
                drop_path=rate,
                act_layer=act_layer,
                norm_layer=norm_layer,
                **dd,
            ) for attn, rate in zip(attn_layers, drop_path)])
        self.norm = norm_layer(dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            return self.run(x)
        x = self.downsample(x).permute(0, 2, 3, 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x).permute(0, 3, 1, 2)

    @torch.jit.unused
    def run(self, x: torch.Tensor, overwrite: bool = False) -> torch.Tensor:
        """`forward(x)`, which may write over `x` if `overwrite`."""
        y = self.downsample(x)
        overwrite = is_new(self.downsample, x, y, overwrite)
        x = run_blocks(self.blocks, y.permute(0, 2, 3, 1), self.grad_checkpointing, overwrite)
        return self.norm(x).permute(0, 3, 1, 2)


def _check_global_pool(global_pool: str) -> None:
    if global_pool not in ('avg', ''):
        raise ValueError(f"Unsupported global_pool '{global_pool}', expected 'avg' or '' (no pooling).")


def check_model_args(
        in_chans: int,
        num_classes: int,
        patch_stride: int,
        drop_path_rate: float,
        mlp_ratios: Sequence[float],
        depths: Sequence[int],
        **per_stage: Sequence[int],
) -> None:
    """Raise ValueError, with the argument's name, where an argument that all pyramids have is out of range.

    Args:
        per_stage: Positive integers, `embed_dims` among them, that need one entry per stage like `depths`.
    """
    per_stage = dict(mlp_ratios=mlp_ratios, **per_stage)
    for name, values in per_stage.items():
        if len(values) != len(depths):
            raise ValueError(f'{name}={tuple(values)} must have one entry per stage, as depths={tuple(depths)}.')
    for name, values in dict(depths=depths, **per_stage).items():
        if len(depths) == 0 or min(values) <= 0:
            raise ValueError(f'{name}={tuple(values)} must be positive.')
    for dim, ratio in zip(per_stage['embed_dims'], mlp_ratios):
        if int(dim * ratio) < 1:
            raise ValueError(f'mlp_ratios={tuple(mlp_ratios)} leave no hidden channel at embed_dims={dim}.')
    if not 0 <= drop_path_rate < 1:
        raise ValueError(f'drop_path_rate={drop_path_rate} must lie in [0, 1).')
    if in_chans < 1:
        raise ValueError(f'in_chans={in_chans} must be positive.')
    if num_classes < 0:
        raise ValueError(f'num_classes={num_classes} must not be negative.')
    if patch_stride < 1:
        raise ValueError(f'patch_stride={patch_stride} must be positive.')


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


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _fuse_in_float64(layer: nn.Module, hook: str) -> nn.Module:
    """Call a hook of a layer that folds in its own type, into new layers of the default type and device."""
    like = next((p for p in layer.parameters() if p.is_floating_point()), None)
    if like is None:
        out = getattr(layer, hook)()
        return out if hook == 'fuse' else layer
    device, dtype, wide = like.device, like.dtype, wide_dtype(like.device)
    with _default_dtype(wide):
        out = getattr(layer.to(wide), hook)()
    return (out if hook == 'fuse' else layer).to(device, dtype)


def reparameterize(model: nn.Module) -> int:
    """Let each layer below `model` that has a simpler form for inference take it, in place.

    As `timm.models.reparameterize_model`, with which timm's layers become float32 ones and round as their type does:
    here everything is folded in float64 and keeps its type and device.

    Returns:
        How many layers took another form.
    """
    count = 0
    for name, child in list(model.named_children()):
        hook = next((h for h in ('fuse', 'reparameterize', 'switch_to_deploy') if hasattr(type(child), h)), None)
        if hook is not None:
            before = {k: id(p) for k, p in child.named_parameters()}
            if type(child).__module__.startswith(__package__.partition('.')[0] + '.'):
                out = getattr(child, hook)()
                out = out if hook == 'fuse' else child
            else:
                out = _fuse_in_float64(child, hook)
            count += before != {k: id(p) for k, p in out.named_parameters()}
            setattr(model, name, out)
            child = out
        count += reparameterize(child)
    return count


class HierarchicalModel(nn.Module):
    """A stem, stages, a norm, average pooling and a classifier, with the whole of timm's contract.

    Stage i of a (B, in_chans, H, W) batch is a (B, C_i, H_i, W_i) map with H_0 = ceil(H / patch_stride) and
    H_i = ceil(H_{i-1} / 2), likewise for W, for any H and W from 1.
    """

    def __init__(
            self,
            patch_embed: nn.Module,
            stages: Sequence[nn.Module],
            embed_dims: Sequence[int],
            patch_stride: int = 4,
            norm: Optional[nn.Module] = None,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = 'avg',
            drop_rate: float = 0.,
            device=None,
            dtype=None,
    ):
        """
        Args:
            patch_embed: Images (B, in_chans, H, W) to a map (B, embed_dims[0], H_0, W_0).
            stages: Each takes the (B, C, H, W) map of the one before; they have `downsample`, `blocks` and a flag
                `grad_checkpointing`.
            embed_dims: Channels of each stage.
            patch_stride: Stride of the stem.
            norm: Norm of the last map as (B, H, W, C), None where stages end in their own.
            in_chans: Channels of the input images.
            num_classes: Classes of the head, 0 for none.
            global_pool: 'avg', or '' to leave the last map unpooled.
            drop_rate: Dropout before the classifier.
        """
        super().__init__()
        _check_global_pool(global_pool)
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.patch_embed = patch_embed
        self.stages = nn.Sequential(*stages)
        self.norm = nn.Identity() if norm is None else norm
        self.feature_info = [
            dict(num_chs=dim, reduction=patch_stride * 2 ** i, module=f'stages.{i}')
            for i, dim in enumerate(embed_dims)]
        self.num_features = self.head_hidden_size = embed_dims[-1]
        self.head_drop = nn.Dropout(drop_rate)
        dd = {'device': device, 'dtype': dtype}
        self.head = nn.Linear(self.num_features, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.init_weights(needs_reset=False)

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
    def no_weight_decay(self) -> Set[str]:
        """Names of parameters to exempt from weight decay, besides the biases and norms that timm exempts."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Regular expressions that order the parameters from input to output, for layer-wise learning rates."""
        last = (99999,)
        if coarse:
            blocks = [(r'^stages\.(\d+)', None), (r'^norm', last)]
        else:
            blocks = [
                (r'^stages\.(\d+)\.downsample', (0,)),
                (r'^stages\.(\d+)\.blocks\.(\d+)', None),
                (r'^stages\.(\d+)\.norm', last),
                (r'^norm', last),
            ]
        return dict(stem=r'^patch_embed', blocks=blocks)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier: a linear layer, or an identity without classes."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the classifier.

        Args:
            num_classes: Classes of the new one, 0 for none.
            global_pool: 'avg' or '', None to keep the present pooling.

        Raises:
            ValueError: `num_classes` is negative or `global_pool` unsupported; the model is left as it was.
        """
        if num_classes < 0:
            raise ValueError(f'num_classes={num_classes} must not be negative.')
        if global_pool is not None:
            _check_global_pool(global_pool)
            self.global_pool = global_pool
        dd = get_device_dtype(self)
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self._init_weights(self.head)
        self.head.train(self.training)

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Forward pass that returns the maps of the stages.

        Args:
            x: Images (B, in_chans, H, W).
            indices: Stages to return: the last n if int, all if None, else these.
            norm: Apply the final norm to the last map as well, where the model has one.
            stop_early: Do not run the stages after the last one asked for.
            output_fmt: 'NCHW' or 'NHWC'.
            intermediates_only: Return the list of maps alone.

        Returns:
            The last map as (B, C, H, W) and the list of maps, or that list.
        """
        if output_fmt not in ('NCHW', 'NHWC'):
            raise ValueError(f"Unsupported output_fmt '{output_fmt}', expected 'NCHW' or 'NHWC'.")
        intermediates: List[torch.Tensor] = []
        take_indices, max_index = feature_take_indices(len(self.stages), indices)

        check_input(x, self.in_chans)
        x = self.patch_embed(x)
        last = len(self.stages) - 1
        for i, stage in enumerate(self.stages):
            if not stop_early or i <= max_index:
                x = stage(x)
                y = self._forward_norm(x) if norm and i == last else x
                if i in take_indices:
                    intermediates.append(y.permute(0, 2, 3, 1) if output_fmt == 'NHWC' else y)

        if intermediates_only:
            return intermediates
        return x if stop_early and max_index < last else self._forward_norm(x), intermediates

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Remove what the given intermediates do not need.

        Args:
            indices: Stages to keep: the last n if int, else these.
            prune_norm: Remove the final norm also where the last stage is kept.
            prune_head: Remove the classifier and pooling also where the last stage is kept.

        Returns:
            The indices of the kept intermediates.
        """
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        pruned = max_index < len(self.stages) - 1
        self.stages = self.stages[:max_index + 1]
        if pruned or prune_norm:
            self.norm = nn.Identity()
        self.num_features = self.head_hidden_size = self.feature_info[max_index]['num_chs']
        if prune_head or pruned:
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, in_chans, H, W) to the last map (B, num_features, H', W')."""
        check_input(x, self.in_chans)
        if not torch.jit.is_scripting():
            if use_bands(x) and not has_hooks(self.stages):
                return self._forward_norm(self._run_stages(x))
        return self._forward_norm(self.stages(self.patch_embed(x)))

    @torch.jit.unused
    def _run_stages(self, images: torch.Tensor) -> torch.Tensor:
        """Stem and stages in inference: no map is kept for longer than the next stage takes."""
        x = self.patch_embed(images)
        overwrite = is_new(self.patch_embed, images, x)
        for stage in self.stages:
            x = stage(x) if has_hooks(stage) or not hasattr(stage, 'run') else stage.run(x, overwrite)
            overwrite = False
        return x

    def _forward_norm(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Pool and classify a map (B, num_features, H', W').

        Args:
            x: Map from `forward_features`.
            pre_logits: Return the pooled features (B, num_features) instead of the logits.
        """
        if self.global_pool:
            x = x.mean(dim=(2, 3))
        x = self.head_drop(x)
        if pre_logits:
            return x
        return self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, in_chans, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


class Pyramid(HierarchicalModel):
    """Hierarchical backbone around one attention mechanism."""

    def __init__(
            self,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = 'avg',
            embed_dims: Sequence[int] = (64, 128, 256, 512),
            depths: Sequence[int] = (2, 2, 2, 2),
            num_heads: Union[int, Sequence[int]] = (1, 2, 4, 8),
            mlp_ratios: Union[float, Sequence[float]] = 4.,
            patch_size: int = 7,
            patch_stride: int = 4,
            attn_layer: Union[AttnLayer, Sequence[AttnLayer]] = 'softmax',
            attn_kwargs: Optional[Dict[str, Any]] = None,
            act_layer: Type[nn.Module] = nn.GELU,
            drop_rate: float = 0.,
            proj_drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device=None,
            dtype=None,
    ):
        """
        Args:
            in_chans: Channels of the input images.
            num_classes: Classes of the head, 0 for none.
            global_pool: 'avg', or '' to leave the last map unpooled.
            embed_dims: Channels of each stage.
            depths: Blocks of each stage.
            num_heads: Attention heads of each stage.
            mlp_ratios: Hidden over outer channels of the MLP of each stage.
            patch_size: Kernel of the stem convolution, odd.
            patch_stride: Stride of the stem convolution; below 4 keeps a useful grid on small images.
            attn_layer: Mechanism by name (see `vitlinear.ops.ATTENTION_LAYERS`), or a module class or factory;
                one for all stages or one for each.
            attn_kwargs: Further arguments of the mechanism.
            act_layer: Activation of the MLP.
            drop_rate: Dropout before the classifier.
            proj_drop_rate: Dropout in the MLP.
            drop_path_rate: Stochastic depth rate of the last block, rising linearly from 0 at the first.

        Raises:
            ValueError: A value is out of range, or the per-stage sequences differ in length.
        """
        dd = {'device': device, 'dtype': dtype}
        num_heads = to_ntuple(len(depths))(num_heads)
        mlp_ratios = to_ntuple(len(depths))(mlp_ratios)
        check_model_args(
            in_chans, num_classes, patch_stride, drop_path_rate, mlp_ratios, depths,
            embed_dims=embed_dims, num_heads=num_heads)
        if patch_size < patch_stride or patch_size % 2 == 0:
            raise ValueError(f'patch_size={patch_size} must be odd and at least patch_stride={patch_stride}.')
        attn_layer = to_ntuple(len(depths))(attn_layer)
        if len(attn_layer) != len(depths):
            raise ValueError(f'attn_layer={attn_layer} must have one entry per stage, as depths={tuple(depths)}.')
        attn_layer = [get_attention_layer(layer) for layer in attn_layer]
        drop_path = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, dim in enumerate(embed_dims):
            attn_layers = [attn_layer[i](dim, num_heads[i], **(attn_kwargs or {}), **dd) for _ in range(depths[i])]
            stages.append(PyramidStage(
                embed_dims[max(i - 1, 0)],
                dim,
                attn_layers,
                downsample=i > 0,
                mlp_ratio=mlp_ratios[i],
                proj_drop=proj_drop_rate,
                drop_path=drop_path[i],
                act_layer=act_layer,
                **dd,
            ))
        super().__init__(
            PatchEmbed(in_chans, embed_dims[0], patch_size, patch_stride, **dd),
            stages,
            embed_dims,
            patch_stride=patch_stride,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )
