"""The compiled operators, one module each: fake kernel, autograd formula, and a typed wrapper."""

from dyhead_cuda.ops.block_coefficients import block_coefficients
from dyhead_cuda.ops.deform_conv import deform_conv
from dyhead_cuda.ops.dynamic_relu import dynamic_relu
from dyhead_cuda.ops.fuse_branches import fuse_branches
from dyhead_cuda.ops.pack_levels import pack_levels

__all__ = [
    "block_coefficients",
    "deform_conv",
    "dynamic_relu",
    "fuse_branches",
    "pack_levels",
]
