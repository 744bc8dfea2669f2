"""What several mechanisms need."""
import math
from functools import partial
from typing import Any, Callable, Iterable, Iterator, Optional, Sequence, Tuple, Type, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# Multiplications of a float32 product below which a call of oneDNN takes longer than the product does without it.
# Measured on one core: 49 x 64 by 64 x 64 takes 9 us, in oneDNN 23; 196 x 64 by 64 x 192 takes 53 and 45.
ONEDNN_FROM = 2 ** 20

_T = TypeVar('_T')


def lecun_normal_(weight: torch.Tensor) -> None:
    """Truncated normal of variance 1 / fan_in in place, cut at two standard deviations as in Flax."""
    std = math.sqrt(1. / weight[0].numel()) / .87962566103423978  # that of a standard normal cut at two
    nn.init.trunc_normal_(weight, std=std, a=-2. * std, b=2. * std)


def init_lecun_(layer: nn.Module) -> None:
    """LeCun normal weight and zero bias of a linear layer or convolution, in place."""
    lecun_normal_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def check_heads(dim: int, num_heads: int, name: str = 'dim') -> int:
    """Head dimension of `dim` channels in `num_heads` heads.

    Raises:
        ValueError: Either is not positive, or `dim` is not divisible by `num_heads`.
    """
    if dim <= 0 or num_heads <= 0 or dim % num_heads:
        raise ValueError(f'{name}={dim} must be a positive multiple of num_heads={num_heads}.')
    return dim // num_heads


def inverse_norm(x: torch.Tensor, dim: int = -1, eps: float = 1e-6) -> torch.Tensor:
    """`1 / |x|` over an axis, which is kept, in float32 at least.

    It is 0 where `|x| <= eps`: such a vector has no direction, and `x / |x|` is 0 there and has no gradient.
    `F.normalize` has one of `1 / eps`.
    """
    wide = x.float() if x.dtype == torch.float16 or x.dtype == torch.bfloat16 else x
    square = wide.square().sum(dim=dim, keepdim=True)  # several times as fast as linalg.vector_norm on short axes
    least = eps * eps
    return torch.where(square > least, square.clamp(min=least).rsqrt(), 0.)


def differentiate(
        plain: Callable[..., torch.Tensor],
        inputs: Sequence[Optional[torch.Tensor]],
        grad: torch.Tensor,
) -> Tuple[Optional[torch.Tensor], ...]:
    """Gradients of `plain(*inputs)` that can be differentiated again.

    For hand-written backward passes that are asked for a graph (`create_graph=True`): what they keep from the forward
    pass would count as constant in a second derivative.

    Args:
        plain: The function in operations that autograd knows.
        inputs: Its arguments; those that require no gradient, and None, get None.
        grad: Gradient of its result.
    """
    # a tensor that is passed twice gets the gradient of each of its places
    inputs = [x.view_as(x) if x is not None and x.requires_grad else x for x in inputs]
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    grads = iter(torch.autograd.grad(plain(*inputs), wanted, grad, create_graph=True))
    return tuple(next(grads) if x is not None and x.requires_grad else None for x in inputs)


def is_eager() -> bool:
    """Whether the code runs as written, so that it may choose by the size of a map; not for TorchScript."""
    return not torch.jit.is_tracing() and not torch.compiler.is_compiling()


def use_bands(x: torch.Tensor) -> bool:
    """Whether to evaluate a large map in bands of rows that fit the caches, instead of at once.

    That needs a loop over the size of the map, so it is for eager inference on a CPU: neither autograd nor a tracer or
    compiler sees it. Where memory traffic and page faults dominate, it is several times faster.
    """
    return isinstance(x, torch.Tensor) and x.device.type == 'cpu' and not torch.is_grad_enabled() and is_eager()


def has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def is_plain(layer: nn.Module, layer_type: Type[nn.Module] = nn.Linear) -> bool:
    """Whether a layer is what its weight and bias say: no adapter, quantised or parametrised layer, no hooks.

    Nor a weight that stands for others, such as torchao's quantised ones, for which not all operators exist.
    """
    if type(layer) is not layer_type and type(layer) is not _PACKED.get(layer_type):
        return False
    return not has_hooks(layer) and not is_traceable_wrapper_subclass(layer.weight)


def has_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN's layers with an activation can be called: private operators, those that Inductor fuses into."""
    if not torch.backends.mkldnn.enabled or not hasattr(torch.ops.mkldnn, '_linear_pointwise'):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def linear(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor] = None,
        gelu: Optional[str] = None,
        packed: Optional['InferenceCache'] = None,
) -> torch.Tensor:
    """`F.linear` and GELU, 'none' or 'tanh' as in `F.gelu`, for inference on a CPU.

    In one call of oneDNN where that is there. Measured: the tanh form alone takes longer than the product before it,
    within the call a quarter of that; in float32 on AMD CPUs the product itself takes half of the time of MKL's.
    The weight's form for oneDNN is kept in `packed`, if given.
    """
    small = x.dtype == torch.float32 and x.numel() * len(weight) < ONEDNN_FROM
    if has_onednn(x.dtype) and weight.dtype == x.dtype and not small:
        if packed is not None:
            weight = packed.get((), 'linear', partial(_pack_linear, weight))
        if gelu is None:
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'none', [], '')
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'gelu', [], gelu)
    x = F.linear(x, weight, bias)
    return x if gelu is None else F.gelu(x, approximate=gelu)


def depthwise(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        padding: Sequence[int],
        gelu: str,
        packed: Optional['InferenceCache'] = None,
) -> torch.Tensor:
    """Depthwise `F.conv2d` on (B, C, H, W) and GELU, as in `linear`."""
    groups = len(weight)
    if has_onednn(x.dtype) and weight.dtype == x.dtype:
        if packed is not None:
            weight = packed.get((), 'depthwise', partial(_pack_convolution, weight, padding, [1, 1], [1, 1], groups))
        return torch.ops.mkldnn._convolution_pointwise(
            x, weight, bias, padding, [1, 1], [1, 1], groups, 'gelu', [], gelu)
    return F.gelu(F.conv2d(x, weight, bias, padding=padding, groups=groups), approximate=gelu)


def plain_gelu(act: Optional[nn.Module]) -> Optional[str]:
    """Form of an activation that is a GELU and nothing else, None for others."""
    return act.approximate if type(act) is nn.GELU and not has_hooks(act) else None


def pointwise(x: torch.Tensor, layer: nn.Module, act: Optional[nn.Module] = None) -> torch.Tensor:
    """A linear layer on (..., C), and an activation, for inference on a CPU; other layers are called as they are."""
    gelu = plain_gelu(act)
    if is_plain(layer) and not torch.is_autocast_enabled('cpu'):
        x = linear(x, layer.weight, layer.bias, gelu, packed_weight(layer))
        return x if act is None or gelu is not None else act(x)
    x = layer(x)
    return x if act is None else act(x)


def call_linear(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`layer(x)` for a linear layer, as fast as the mode allows; not for TorchScript."""
    return pointwise(x, layer) if use_bands(x) else layer(x)


class InferenceCache:
    """Keeps what was computed from weights for as long as the weights are the same.

    It compares their values, not their versions or addresses, since some ways to write to a tensor leave both as they
    were. That takes less time than the computation, on a CPU; on a GPU it would wait for the device.
    """

    def __init__(self, limit: int = 8):
        """
        Args:
            limit: How many keys to remember.
        """
        self._limit = limit
        self._entry = None

    def clear(self) -> None:
        self._entry = None

    def get(self, sources: Sequence[torch.Tensor], key: Any, build: Callable[[Any], Any]) -> Any:
        """`build(key)`, or what it returned for this key before if the values of `sources` have not changed since."""
        known, values = self._entry if self._entry is not None else ((), {})
        same = len(known) == len(sources) and all(
            a.dtype == b.dtype and a.device == b.device and torch.equal(a, b) for a, b in zip(known, sources))
        if not same:
            known, values = [source.detach().clone() for source in sources], {}
        if key not in values:
            # the sizes of many different images need not all be remembered
            values = {**(values if len(values) < self._limit else {}), key: build(key)}
        self._entry = known, values
        return values[key]

    def __deepcopy__(self, memo: Any) -> 'InferenceCache':
        return InferenceCache(self._limit)

    def __reduce__(self):
        return InferenceCache, (self._limit,)


def _pack_linear(weight: torch.Tensor, key: Any) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach())


def _pack_convolution(
        weight: torch.Tensor,
        padding: Sequence[int],
        stride: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        key: Any,
) -> torch.Tensor:
    """The weight for inputs of the shape `key`, where that is one, else for all."""
    shape = list(key) if isinstance(key, tuple) else None
    return torch.ops.mkldnn._reorder_convolution_weight(weight.detach(), padding, stride, dilation, groups, shape)


class _Packed(nn.Module):
    """A layer that keeps the form of its weight that oneDNN would bring it into in each call, for inference on a CPU.

    The weight is held twice, for other devices, modes and exporters. Writing to it in place goes unnoticed. Weights
    that are loaded or converted are packed again.
    """

    def _apply(self, *args: Any, **kwargs: Any) -> '_Packed':
        self._packed.clear()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._packed.clear()
        super()._load_from_state_dict(*args, **kwargs)


class PackedLinear(_Packed, nn.Linear):
    """`nn.Linear` with a packed weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            if use_bands(x) and not torch.is_autocast_enabled('cpu'):
                return linear(x, self.weight, self.bias, packed=self._packed)
        return F.linear(x, self.weight, self.bias)


class PackedConv2d(_Packed, nn.Conv2d):
    """`nn.Conv2d` with a packed weight, for images in channels-last memory; others take the usual way."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            if use_bands(x) and not torch.is_autocast_enabled('cpu') and x.ndim == 4 and not x.is_contiguous():
                if x.is_contiguous(memory_format=torch.channels_last):
                    return self._channels_last(x)
        return self._conv_forward(x, self.weight, self.bias)

    @torch.jit.unused
    def _channels_last(self, x: torch.Tensor) -> torch.Tensor:
        if self.kernel_size == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0) and self.groups == 1:
            x = linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias, packed=self._packed)
            return x.permute(0, 3, 1, 2)
        if not has_onednn(x.dtype) or self.weight.dtype != x.dtype:
            return self._conv_forward(x, self.weight, self.bias)
        args = self.padding, self.stride, self.dilation, self.groups
        # of dense kernels oneDNN has several forms: that for another shape can take 30 times as long
        key = 'depthwise' if self.groups == len(self.weight) == self.in_channels else tuple(x.shape)
        weight = self._packed.get((), key, partial(_pack_convolution, self.weight, *args))
        return torch.ops.mkldnn._convolution_pointwise(x, weight, self.bias, *args, 'none', [], '')


_PACKED = {nn.Linear: PackedLinear, nn.Conv2d: PackedConv2d}


def packed_weight(layer: nn.Module) -> Optional[InferenceCache]:
    """Where a layer keeps its packed weight, None for layers that have none."""
    return layer._packed if isinstance(layer, _Packed) else None


def pack(layer: nn.Module) -> bool:
    """Make a plain linear layer or convolution a packed one in place. Whether it was one."""
    packed = _PACKED.get(type(layer))
    if packed is None or has_hooks(layer):
        return False
    if packed is PackedConv2d and (layer.padding_mode != 'zeros' or isinstance(layer.padding, str)):
        return False
    layer.__class__ = packed
    layer._packed = InferenceCache(limit=1)
    return True


def band_rows(rows: int, row_size: int, band_size: int, least: int = 1) -> int:
    """Rows of a band, at least `least`, when `rows` of them are cut evenly into bands of `band_size` at most."""
    bands = -(-rows * row_size // band_size)
    return max(least, -(-rows // bands))


def one_ahead(items: Iterable[_T]) -> Iterator[_T]:
    """The items, each when the next one has been computed, so that its user may overwrite what both are made from."""
    before = None
    for item in items:
        if before is not None:
            yield before
        before = item
    if before is not None:
        yield before


def split_heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """(B, H, W, num_heads * d) to (B, num_heads, H, W, d)."""
    B, H, W, C = x.shape
    return x.reshape(B, H, W, num_heads, C // num_heads).permute(0, 3, 1, 2, 4)


def merge_heads(x: torch.Tensor) -> torch.Tensor:
    """(B, num_heads, H, W, d) to (B, H, W, num_heads * d)."""
    return x.permute(0, 2, 3, 1, 4).flatten(3)
