"""Dynamic Head as modules: the published head on a pyramid, and the paper's head on one tensor."""

from dyhead_cuda.modules.initialisation import Init
from dyhead_cuda.modules.layers import DynamicReLU, LeftOut, ModulatedDeformConv2d
from dyhead_cuda.modules.published import DyHead
from dyhead_cuda.modules.published_block import (
    ATTENTIONS,
    Attention,
    DeformBranch,
    DyHeadBlock,
    WithoutTask,
)
from dyhead_cuda.modules.unified import UnifiedDyHead, UnifiedDyHeadBlock

__all__ = [
    "ATTENTIONS",
    "Attention",
    "DeformBranch",
    "DyHead",
    "DyHeadBlock",
    "DynamicReLU",
    "Init",
    "LeftOut",
    "ModulatedDeformConv2d",
    "UnifiedDyHead",
    "UnifiedDyHeadBlock",
    "WithoutTask",
]
