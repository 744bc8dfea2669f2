"""All that eager inference on a CPU does differently: row blocks that fit the caches, oneDNN's operators, folding.

A model asks once per forward pass, `applies`, and hands its parts to `run`. A hook, an adapter or a quantised layer
anywhere sends the whole model the plain way. Values are those of the plain way up to rounding.
"""
from . import levit, linear_angular, mlp, pyramid, qna, random_walk, vicinity, window, xnorm  # noqa: F401  their forms
from .door import applies, run
from .memory import keep_freed_memory
from .rows import row_block_bytes

__all__ = ['applies', 'keep_freed_memory', 'row_block_bytes', 'run']
