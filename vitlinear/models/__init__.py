"""The backbones. Importing this package registers them with timm."""
from collections.abc import Callable
from typing import Any, NamedTuple

from timm.models import is_model, model_entrypoint

from ..zoo.families import Family
from . import castling_deit, castling_levit, castling_mvitv2, castling_pvt_v2, gkvit, qna_vit, vvt, xvit, xvit_pyramid
from ._castling import FAMILY as CASTLING
from ._castling import CastlingSchedule, is_of_host
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


class Backbone(NamedTuple):
    """What a file of backbones offers to tools.

    Attributes:
        family: Facts for lists and cards.
        checkpoint_filter_fn: Takes a state dict of ours or of the authors, see the file.
        infer_variant: The architecture that a state dict belongs to, where the filter alone cannot tell.
        is_of_host: Whether the filter takes weights for those of a backbone that they are to be trained further from.
    """
    family: Family
    checkpoint_filter_fn: Callable[..., dict[str, Any]]
    infer_variant: Callable[..., str | None] | None = None
    is_of_host: Callable[..., bool] | None = None


# By the file that defines an architecture, as timm's registry names its module.
BACKBONES = {
    'castling_deit': Backbone(CASTLING, castling_deit.checkpoint_filter_fn, is_of_host=is_of_host),
    'castling_levit': Backbone(CASTLING, castling_levit.checkpoint_filter_fn, is_of_host=is_of_host),
    'castling_mvitv2': Backbone(CASTLING, castling_mvitv2.checkpoint_filter_fn, is_of_host=is_of_host),
    'castling_pvt_v2': Backbone(CASTLING, castling_pvt_v2.checkpoint_filter_fn, is_of_host=is_of_host),
    'gkvit': Backbone(gkvit.FAMILY, gkvit.checkpoint_filter_fn),
    'qna_vit': Backbone(qna_vit.FAMILY, qna_vit.checkpoint_filter_fn, infer_variant=qna_vit.infer_variant),
    'vvt': Backbone(vvt.FAMILY, vvt.checkpoint_filter_fn),
    'xvit': Backbone(xvit.FAMILY, xvit.checkpoint_filter_fn),
    'xvit_pyramid': Backbone(xvit.FAMILY, xvit_pyramid.checkpoint_filter_fn),
}


def backbone_of(architecture: str) -> Backbone:
    """What the file of an architecture of ours offers."""
    return BACKBONES[model_entrypoint(architecture).__module__.rpartition('.')[2]]


def is_ours(architecture: str) -> bool:
    """Whether an architecture is one of this package."""
    return is_model(architecture) and model_entrypoint(architecture).__module__.startswith('vitlinear.models.')
