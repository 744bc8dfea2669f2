"""What the tests of linear-angular attention and of its auxiliary branch share."""
import torch

from _golden import castling_cases, castling_part, castling_tensors
from vitlinear.layers import LinearAngularAttention
from vitlinear.ops import linear_angular_attention
from vitlinear.ops.local import local_attention

LAYERS = [name for name, case in castling_cases().items() if case['kind'] == 'attention']
GOLDEN = dict(rtol=1e-4, atol=2e-5)
CHUNKS = [None, 17]


def randn(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def create(*args, seed: int = 0, **kwargs) -> LinearAngularAttention:
    """A module in eval mode whose every parameter counts."""
    torch.manual_seed(seed)
    module = LinearAngularAttention(*args, **kwargs)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.normal_(std=.3 if name.startswith('dconv') else 1. if p.ndim == 1 else p[0].numel() ** -.5)
    return module.eval()


def attention(q, k, v, weight, grid=None, num_prefix_tokens=0, **options) -> torch.Tensor:
    """The op with the convolution of these kernels."""
    local = local_attention(v, weight.to(v.dtype), grid, num_prefix_tokens)
    return linear_angular_attention(q, k, v, local, grid, num_prefix_tokens, **options)


def heads_of(module: LinearAngularAttention, x: torch.Tensor) -> list[torch.Tensor]:
    """Queries, keys and values (B, heads, N, d) of a map."""
    qkv = module.qkv(x).flatten(1, 2).chunk(3, dim=-1)
    return [u.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for u in qkv]


def scalar(x: float) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)


def golden_module(name: str, chunk: int | None = None) -> LinearAngularAttention:
    """Their state dict fits with and without the auxiliary branch."""
    case = castling_cases()[name]
    config = case['constructor']
    module = LinearAngularAttention(
        config['in_channels'], config['num_heads'], qkv_bias=config['qkv_bias'],
        res_kernel_size=config['res_kernel_size'], aux_mode='always' if case['sparse_reg'] else 'off',
        aux_threshold=.02 if case['threshold'] is None else case['threshold'], aux_max_keys=None, aux_chunk=chunk)
    module.load_state_dict(castling_part(case['params']) or castling_part('params:' + case['params']), strict=True)
    return module.train(case['training'])


def golden_map(name: str, what: str = 'input') -> torch.Tensor:
    """Tokens as a map; those that are on no grid as one row, since their order is all that counts."""
    x, case = castling_tensors()[f'{name}/{what}'], castling_cases()[name]
    H, W = case['grid'] if case['grid'] and not case['prefix_tokens'] else (1, case['L'])
    return x.unflatten(1, (H, W))


def inputs(grid=(3, 5), P: int = 0, conv: str = '1d', k: int = 3, stride: int = 1, B: int = 2, heads: int = 3,
           d: int = 4, e: int = 5, dtype=torch.float64):
    """Queries, keys, values and kernels; M keys on the grid and P in front, of which a query for every stride-th."""
    H, W = grid
    N = P + -(-H // stride) * -(-W // stride)
    shapes = (
        (B, heads, N, d), (B, heads, P + H * W, d), (B, heads, P + H * W, e), (heads, 1, k, k if conv == '2d' else 1))
    return [randn(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]
