"""The backbones: one file per family. Importing this package registers them with timm."""
from .qna_vit import QnAVisionTransformer
from .vvt import VicinityVisionTransformer

__all__ = ['QnAVisionTransformer', 'VicinityVisionTransformer']
