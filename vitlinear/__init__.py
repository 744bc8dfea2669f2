"""Linear-attention vision backbones for timm.

Importing this package registers its models, after which `timm.create_model('vvt_small')` and everything else that
takes a timm model name works with them. Nothing else happens at import.
"""
from . import models
from .zoo.hub import set_hub_org

__version__ = '0.2.0'

__all__ = ['__version__', 'models', 'optimize_for_inference', 'set_hub_org']


def __getattr__(name: str):
    if name == 'optimize_for_inference':
        from .inference.optimize import optimize_for_inference
        return optimize_for_inference
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
