"""Softmax attention to few keys whose weights are computed again in the backward pass, chunk by chunk."""
import torch
from torch.utils.checkpoint import checkpoint

from ..._numerics import at_least_float32
from .torch import attend


def masked_softmax(q, k, v, threshold, dropout_p=0., chunk=None):
    """As `torch.masked_softmax`; of more than one chunk of queries, keeps no weights."""
    dtype = v.dtype
    q, k, v = at_least_float32(q), at_least_float32(k), at_least_float32(v)
    threshold = threshold.to(q.dtype)
    if chunk is None or q.shape[2] <= chunk:
        return attend(q, k, v, threshold, dropout_p).to(dtype)
    parts = [checkpoint(attend, part, k, v, threshold, dropout_p, use_reentrant=False)
             for part in q.split(chunk, dim=2)]
    return torch.cat(parts, dim=2).to(dtype)
