"""Compiles every kernel for GPUs without one, and prints what each takes of a device: JSON by kernel and form.

A process of its own, as one that interprets kernels cannot compile them: python _compile_kernels.py CAPABILITY ...
"""
import inspect
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vitlinear.ops._triton import next_size
from vitlinear.ops.primitives.dw_gelu import kernels as dw_gelu
from vitlinear.ops.primitives.dw_gelu import launch as dw_gelu_launch
from vitlinear.ops.primitives.tokens import kernels as tokens
from vitlinear.ops.primitives.tokens import launch as tokens_launch
from vitlinear.ops.primitives.walk_series import kernels as walk_series
from vitlinear.ops.primitives.windows import kernels as windows

CUOBJDUMP = Path(triton.__file__).parent / 'backends/nvidia/bin/cuobjdump'
FLOATS = ('eps', 'scale')
# Arguments that may have any value; launches of others, counts of channels and strides, are multiples of 16.
ANY_SIZE = ('N', 'H', 'W', 'H2', 'W2', 'L', 'heads', 'stride', 'tiles', 'tiles_each', 'size', 'num_doublings')


def usage(kernel, capability: int, pointers: dict[str, str], constants: dict, warps: int, stages: int = 3) -> dict:
    """Registers, bytes of stack of a thread and bytes of shared memory of a program."""
    signature, attributes = {}, {}
    for i, name in enumerate(inspect.signature(kernel.fn).parameters):
        if name in constants:
            signature[name] = 'constexpr'
        elif name in pointers:
            signature[name], attributes[i,] = f'*{pointers[name]}', [['tt.divisibility', 16]]
        elif name in FLOATS:
            signature[name] = 'fp32'
        else:
            signature[name] = 'i32'
            if name not in ANY_SIZE:
                attributes[i,] = [['tt.divisibility', 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(
        source, target=GPUTarget('cuda', capability, 32), options=dict(num_warps=warps, num_stages=stages))
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(compiled.asm['cubin'])
        file.flush()
        listing = subprocess.run([CUOBJDUMP, '-res-usage', file.name], capture_output=True, text=True, check=True)
    found = dict(word.split(':') for word in listing.stdout.split() if word.startswith(('REG:', 'STACK:')))
    return dict(registers=int(found['REG']), stack=int(found['STACK']), shared=compiled.metadata.shared)


def token_kernels(capability: int, dtype: str, channels: int, factors: int, divides: bool):
    """The kernels of `tokens` in the form of a mechanism."""
    wide, BC = dtype == 'fp32', next_size(channels)
    stored = 'bf16' if dtype == 'bf16' else 'fp32'  # of gradients of numerators

    def constants(wide: bool, **kwargs) -> dict:
        return dict(FACTORS=factors, UNIT=not divides, PRECISION='tf32x3' if dtype == 'fp32' else 'tf32',
                    BN=tokens_launch.tile_positions(factors, wide, channels), BD=BC, BE=BC, **kwargs)

    def run(kernel, constants: dict, **pointers: str) -> dict:
        return usage(kernel, capability, pointers, constants, tokens_launch.WARPS, tokens_launch.STAGES)

    clamps = dict(DIVIDE=divides, CLAMP=divides and factors > 0, LOW=1e-4, HIGH=1e4)
    group = max(1, min(factors, tokens_launch.max_sums(4 if wide else 2) // BC ** 2))
    some = dict(table='fp32', sums='fp32', total='fp32')
    yield 'sums', run(tokens.sums_kernel, constants(wide, GROUP=group, TOTAL=int(divides), WEIGHTED=False),
                      k=dtype, v=dtype, weights=dtype, table='fp32', out='fp32')
    yield 'sums of gradients', run(
        tokens.sums_kernel, constants(stored == 'fp32', GROUP=group, TOTAL=int(divides), WEIGHTED=divides),
        k=dtype, v=stored, weights='fp32', table='fp32', out='fp32')
    yield 'apply', run(tokens.apply_kernel, constants(wide, BASE=not divides, **clamps),
                       q=dtype, base=dtype, out=dtype, **some)
    yield 'apply backward', run(
        tokens.apply_backward_kernel, constants(stored == 'fp32', **clamps),
        q=dtype, grad=dtype, grad_q=dtype, grad_y=stored, grad_weight='fp32', **some)
    yield 'sums backward', run(
        tokens.sums_backward_kernel, constants(wide, TOTAL=divides),
        k=dtype, v=dtype, grad='fp32', grad_total='fp32', table='fp32', grad_k=dtype, grad_v=dtype)


def other_kernels(capability: int, dtype: str):
    """Those of the other primitives, in the forms of the models."""
    BH, BW, BC = dw_gelu_launch.TILE
    common = dict(KH=3, KW=3, BIAS=True, BH=BH, BW=BW, BC=BC)
    yield 'depthwise', usage(
        dw_gelu.depthwise_kernel, capability, dict(x=dtype, weight=dtype, bias=dtype, out=dtype),
        dict(common, GELU=True, FLIP=False), dw_gelu_launch.WARPS)
    yield 'depthwise backward', usage(
        dw_gelu.depthwise_backward_kernel, capability,
        dict(x=dtype, grad=dtype, weight=dtype, bias=dtype, grad_y=dtype, partial='fp32'),
        dict(common, GELU=True, TAPS=16), dw_gelu_launch.WARPS)
    for name in ('clamp_kernel', 'clamp_backward_kernel'):
        yield name, usage(
            getattr(tokens, name), capability, dict(x=dtype, grad=dtype, out=dtype),
            dict(LOW=1e-4, HIGH=1e4, BLOCK=1024), 4)
    if dtype == 'fp32':
        yield 'series', usage(
            walk_series.series_kernel, capability, dict(step='fp32', start='fp32', out='fp32'),
            dict(PRECISION='tf32x3', BR=32, BE=32), 4)
    tile = dict(SCALED=True, K=3, P=32, BD=8, BH=8)
    maps = dict(score=dtype, v=dtype, bias='fp32', tap_scale='fp32')
    yield 'windows', usage(windows.windows_kernel, capability, dict(maps, out=dtype), tile, 4)
    gradients = dict(maps, grad=dtype, log_sum='fp32', inner='fp32')
    yield 'windows, parameters', usage(
        windows.windows_parameters_kernel, capability, dict(gradients, partial='fp32'), tile, 4)
    yield 'windows, pixels', usage(
        windows.windows_pixels_kernel, capability, dict(gradients, grad_score=dtype, grad_v=dtype), tile, 4)


if __name__ == '__main__':
    found = {}
    for capability in map(int, sys.argv[1:]):
        for dtype in ('bf16', 'fp16', 'fp32'):
            for channels, factors, divides in ((48, 4, True), (32, 4, True), (64, 0, False)):
                for name, used in token_kernels(capability, dtype, channels, factors, divides):
                    found[f'{capability}, {dtype}, {channels} channels, {factors} factors, {name}'] = used
            for name, used in other_kernels(capability, dtype):
                found[f'{capability}, {dtype}, {name}'] = used
    print(json.dumps(found))
