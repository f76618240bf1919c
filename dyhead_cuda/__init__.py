"""Dynamic Head (arXiv 2106.08322) with fused kernels: a drop-in layer, exact and fast."""

from dyhead_cuda import compat, functional, reference
from dyhead_cuda.backends import backend
from dyhead_cuda.compat import accelerate
from dyhead_cuda.modules import (
    DyHead,
    DyHeadBlock,
    DynamicReLU,
    ModulatedDeformConv2d,
    UnifiedDyHead,
)
from dyhead_cuda.pyramid import BlockParameters, BranchParameters, HighOffset, Upsample
from dyhead_cuda.version import __version__

__all__ = [
    "BlockParameters",
    "BranchParameters",
    "DyHead",
    "DyHeadBlock",
    "DynamicReLU",
    "HighOffset",
    "ModulatedDeformConv2d",
    "UnifiedDyHead",
    "Upsample",
    "__version__",
    "accelerate",
    "backend",
    "compat",
    "functional",
    "reference",
]
