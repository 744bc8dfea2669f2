"""The backbones: one file per family. Importing this package registers them with timm."""
from ._castling import CastlingSchedule
from .castling_vit import (
    CastlingLevit,
    CastlingLevitDistilled,
    CastlingMultiScaleVit,
    CastlingPyramid,
    CastlingVisionTransformer,
    CastlingVisionTransformerDistilled,
)
from .gkvit import GraphKernelVisionTransformer
from .qna_vit import QnAVisionTransformer
from .vvt import VicinityVisionTransformer
from .xvit import XNormPyramid, XNormVisionTransformer

__all__ = [
    'CastlingLevit',
    'CastlingLevitDistilled',
    'CastlingMultiScaleVit',
    'CastlingPyramid',
    'CastlingSchedule',
    'CastlingVisionTransformer',
    'CastlingVisionTransformerDistilled',
    'GraphKernelVisionTransformer',
    'QnAVisionTransformer',
    'VicinityVisionTransformer',
    'XNormPyramid',
    'XNormVisionTransformer',
]
