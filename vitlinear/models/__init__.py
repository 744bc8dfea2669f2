"""The backbones: one file per family. Importing this package registers them with timm."""
from .vvt import VicinityVisionTransformer

__all__ = ['VicinityVisionTransformer']
