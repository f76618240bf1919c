"""Dynamic Head in plain PyTorch: the judge of every kernel in this package.

Each function runs on any device in float64, float32, float16 or bfloat16 (the two small types
compute in float32 and round once at the end), is differentiable twice and can be compiled. Sources:
"the paper" is arXiv 2106.08322, "the published code" is microsoft/DynamicHead with its
re-implementations in mmdet and GLIP.
"""

from dyhead_cuda.numerics import (
    Activation,
    ResizeMode,
    Targets,
    UnifiedParameters,
    high_offset_and_mask,
    hsigmoid,
    median_level,
)
from dyhead_cuda.reference.operators import dynamic_relu, modulated_deform_conv2d
from dyhead_cuda.reference.published import (
    branch_gate,
    branch_maps,
    combine_branches,
    pyramid_block,
)
from dyhead_cuda.reference.unified import (
    scale_attention,
    scale_gates,
    spatial_attention,
    stack_pyramid,
    task_attention,
    unified_block,
)

__all__ = [
    "Activation",
    "ResizeMode",
    "Targets",
    "UnifiedParameters",
    "branch_gate",
    "branch_maps",
    "combine_branches",
    "dynamic_relu",
    "high_offset_and_mask",
    "hsigmoid",
    "median_level",
    "modulated_deform_conv2d",
    "pyramid_block",
    "scale_attention",
    "scale_gates",
    "spatial_attention",
    "stack_pyramid",
    "task_attention",
    "unified_block",
]
