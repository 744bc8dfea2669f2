"""oneDNN's layers with an activation and packed weights: the only file that names its private operators.

They are those that Inductor fuses into. Measured: the tanh form of GELU alone takes longer than the product before it,
within the call a quarter of that; in float32 on AMD CPUs the product itself takes half of the time of MKL's.
"""
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..layers.mlp import DepthwiseConv2d
from ..layers.qna import KeyProjection
from ..ops._dispatch import may_read, scripts_as

# Multiplications of a float32 product below which a call of oneDNN takes longer than the product does without it.
# Measured on one core: 49 x 64 by 64 x 64 takes 9 us, in oneDNN 23; 196 x 64 by 64 x 192 takes 53 and 45.
MIN_MULTIPLICATIONS = 2 ** 20


@lru_cache
def works(dtype: torch.dtype) -> bool:
    """Whether oneDNN's layers can be called with this type: calls are tried, once."""
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        x, weight = torch.ones(2, 2, dtype=dtype), torch.ones(2, 2, dtype=dtype)
        torch.ops.mkldnn._linear_pointwise(x, weight, None, 'gelu', [], 'none')
        torch.ops.mkldnn._reorder_linear_weight(weight)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
    return dtype in (torch.float32, torch.bfloat16)


def available(dtype: torch.dtype) -> bool:
    """Whether oneDNN's layers can be called with this type, and may be."""
    return torch.backends.mkldnn.enabled and works(dtype)


class Packed:
    """The form of a weight that oneDNN would bring it into in each call; made at the first one, by key."""

    def __init__(self) -> None:
        self._forms: dict[Any, torch.Tensor] = {}

    def clear(self) -> None:
        """Forget the forms, as for new weights."""
        self._forms = {}

    def get(self, key: Any, build: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The form for a key, one at a time."""
        if key not in self._forms:
            self._forms = {key: build()}
        return self._forms[key]

    def __deepcopy__(self, memo: Any) -> 'Packed':
        return Packed()

    def __reduce__(self) -> Any:
        return Packed, ()


def linear_gelu(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        gelu: str | None = None,
        packed: Packed | None = None,
) -> torch.Tensor:
    """`F.linear` and GELU, 'none' or 'tanh' as in `F.gelu`, None for no GELU; in one call where oneDNN has it.

    The weight's form for oneDNN is kept in `packed`, if given.
    """
    small = x.dtype == torch.float32 and x.numel() * len(weight) < MIN_MULTIPLICATIONS
    if not small and weight.dtype == x.dtype and torch.backends.mkldnn.enabled and works(x.dtype):
        if packed is not None:
            weight = packed.get('linear', lambda: torch.ops.mkldnn._reorder_linear_weight(weight.detach()))
        if gelu is None:
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'none', [], '')
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'gelu', [], gelu)
    x = F.linear(x, weight, bias)
    return x if gelu is None else F.gelu(x, approximate=gelu)


def call_linear(x: torch.Tensor, layer: nn.Module, act: nn.Module | None = None) -> torch.Tensor:
    """A linear layer on (..., C) and an activation."""
    weight, bias, gelu = layer.weight, layer.bias, act.approximate if type(act) is nn.GELU else None
    small = x.dtype == torch.float32 and x.numel() * len(weight) < MIN_MULTIPLICATIONS
    if (small or weight.dtype != x.dtype or not (torch.backends.mkldnn.enabled and works(x.dtype))
            or torch.is_autocast_enabled('cpu')):
        x = layer(x) if torch.is_autocast_enabled('cpu') else F.linear(x, weight, bias)
        return x if act is None else act(x)
    packed = getattr(layer, 'packed', None)
    if packed is not None:
        weight = packed.get('linear', lambda: torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach()))
    if gelu is not None:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'gelu', [], gelu)
    x = torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'none', [], '')
    return x if act is None else act(x)


def call_depthwise(x: torch.Tensor, layer: DepthwiseConv2d, act: nn.Module, pad_rows: int) -> torch.Tensor:
    """A depthwise convolution of (B, H, W, C), with rows of zeros above and below, and an activation."""
    x, padding, groups = x.permute(0, 3, 1, 2), [pad_rows, layer.padding[1]], len(layer.weight)
    weight = layer.weight
    if (layer.gelu and weight.dtype == x.dtype and not torch.is_autocast_enabled('cpu')
            and torch.backends.mkldnn.enabled and works(x.dtype)):
        packed = getattr(layer, 'packed', None)
        if packed is not None:
            weight = packed.get('depthwise', lambda: pack_convolution(layer.weight, padding, [1, 1], [1, 1], groups))
        x = torch.ops.mkldnn._convolution_pointwise(
            x, weight, layer.bias, padding, [1, 1], [1, 1], groups, 'gelu', [], 'none')
        return x.permute(0, 2, 3, 1)
    x = F.conv2d(x, weight, layer.bias, padding=padding, groups=groups).permute(0, 2, 3, 1)
    return act(F.gelu(x) if layer.gelu else x)


def pack_convolution(
        weight: torch.Tensor,
        padding: Sequence[int],
        stride: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        shape: Sequence[int] | None = None,
) -> torch.Tensor:
    """The weight as oneDNN takes it, for inputs of one shape or of all."""
    return torch.ops.mkldnn._reorder_convolution_weight(weight.detach(), padding, stride, dilation, groups, shape)


def is_cpu_inference(x: torch.Tensor) -> bool:
    """Whether a tensor is on the CPU and neither autograd nor a tracer, compiler or transform sees what is done."""
    return not torch.is_grad_enabled() and may_read(x)


def _never(x: torch.Tensor) -> bool:
    return False


@scripts_as(_never)
def _packs(x: torch.Tensor) -> bool:
    return is_cpu_inference(x) and not torch.is_autocast_enabled('cpu')


class _Packs(nn.Module):
    """A layer that keeps the form of its weight that oneDNN would bring it into in each call, for inference on a CPU.

    The weight is held twice, for other devices, modes and exporters. Writing to it in place goes unnoticed. Weights
    that are loaded or converted are packed again.
    """

    def _apply(self, *args: Any, **kwargs: Any) -> '_Packs':
        self.packed.clear()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.packed.clear()
        super()._load_from_state_dict(*args, **kwargs)


class PackedLinear(_Packs, nn.Linear):
    """`nn.Linear` with a packed weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As that of `nn.Linear`."""
        return self._pointwise(x) if _packs(x) else F.linear(x, self.weight, self.bias)

    @torch.jit.unused
    def _pointwise(self, x: torch.Tensor) -> torch.Tensor:
        return linear_gelu(x, self.weight, self.bias, packed=self.packed)


class PackedConv2d(_Packs, nn.Conv2d):
    """`nn.Conv2d` with a packed weight, for images in channels-last memory; others take the usual way."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As that of `nn.Conv2d`."""
        return self._channels_last(x) if _packs(x) else self._conv_forward(x, self.weight, self.bias)

    @torch.jit.unused
    def _channels_last(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim != 4 or x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
            return self._conv_forward(x, self.weight, self.bias)
        if self.kernel_size == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0) and self.groups == 1:
            x = linear_gelu(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias, packed=self.packed)
            return x.permute(0, 3, 1, 2)
        if self.weight.dtype != x.dtype or not available(x.dtype):
            return self._conv_forward(x, self.weight, self.bias)
        args = self.padding, self.stride, self.dilation, self.groups
        # of dense kernels oneDNN has several forms: that for another shape can take 30 times as long
        shape = None if self.groups == len(self.weight) == self.in_channels else list(x.shape)
        key = 'depthwise' if shape is None else tuple(shape)
        weight = self.packed.get(key, lambda: pack_convolution(self.weight, *args, shape))
        return torch.ops.mkldnn._convolution_pointwise(x, weight, self.bias, *args, 'none', [], '')


class PackedDepthwiseConv2d(PackedConv2d):
    """`DepthwiseConv2d` with a packed weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As that of `DepthwiseConv2d`."""
        x = self._channels_last(x) if _packs(x) else self._conv_forward(x, self.weight, self.bias)
        return F.gelu(x) if self.gelu else x


LINEARS = (nn.Linear, PackedLinear, KeyProjection)
CONVOLUTIONS = (nn.Conv2d, DepthwiseConv2d, PackedConv2d, PackedDepthwiseConv2d)


def packed(layer: nn.Module) -> nn.Module | None:
    """A packed layer with the parameters of a plain linear layer or convolution; None for others."""
    if type(layer) is nn.Linear:
        out = PackedLinear.__new__(PackedLinear)
    elif type(layer) not in (nn.Conv2d, DepthwiseConv2d):
        return None
    elif layer.padding_mode == 'zeros' and not isinstance(layer.padding, str):
        kind = PackedConv2d if type(layer) is nn.Conv2d else PackedDepthwiseConv2d
        out = kind.__new__(kind)
    else:
        return None
    out.__dict__.update((k, v.copy() if isinstance(v, dict) else v) for k, v in layer.__dict__.items())
    out.packed = Packed()
    return out
