"""Sums over tokens and what queries make of them: all five token mechanisms are these with something small between."""
from ..._dispatch import primitive
from . import autograd, torch, triton

clamp_magnitude = primitive(
    torch=torch.clamp_magnitude, autograd=autograd.clamp_magnitude, triton=triton.clamp_magnitude)
split_heads = primitive(torch=torch.split_heads, triton=triton.split_heads)
token_sums = primitive(torch=torch.token_sums, autograd=autograd.token_sums, triton=triton.token_sums)
token_moments = primitive(torch=torch.token_moments, autograd=autograd.token_moments, triton=triton.token_moments)
token_apply = primitive(torch=torch.token_apply, autograd=autograd.token_apply, triton=triton.token_apply)

__all__ = ['clamp_magnitude', 'split_heads', 'token_apply', 'token_moments', 'token_sums']
