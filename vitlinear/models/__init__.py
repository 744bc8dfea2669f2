"""The backbones: one file per family. Importing this package registers them with timm."""
from ._castling import CastlingSchedule
from .castling_deit import CastlingVisionTransformer, CastlingVisionTransformerDistilled
from .castling_levit import CastlingLevit, CastlingLevitDistilled
from .castling_mvitv2 import CastlingMultiScaleVit
from .castling_pvt_v2 import CastlingPyramid
from .gkvit import GraphKernelVisionTransformer
from .qna_vit import QnAVisionTransformer
from .vvt import VicinityVisionTransformer
from .xvit import XNormVisionTransformer
from .xvit_pyramid import XNormPyramid

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
