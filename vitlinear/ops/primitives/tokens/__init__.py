"""Sums over tokens and what queries make of them: all five token mechanisms are these with something small between."""
from ..._dispatch import primitive
from . import autograd, torch

token_sums = primitive(torch=torch.token_sums, autograd=autograd.token_sums)
token_gram = primitive(torch=torch.token_gram, autograd=autograd.token_gram)
token_apply = primitive(torch=torch.token_apply, autograd=autograd.token_apply)

__all__ = ['token_apply', 'token_gram', 'token_sums']
