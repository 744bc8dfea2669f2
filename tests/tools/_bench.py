"""A point of the benchmarks."""
PLACE = dict(cpu='a cpu', torch='1', timm='2', vitlinear='3', onnxruntime='')


def point(**changes) -> dict:
    return {**dict(
        kind='model', model='a', kwargs='', mode='infer', runtime='eager', optimized='', memory_format='contiguous',
        dtype='fp32', size=32, kernel=None, batch=1, threads=1, allocator='default', **PLACE), **changes}
