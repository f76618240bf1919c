"""The compiled operators, one module each: fake kernel, autograd formula, and a typed wrapper."""

from dyhead_cuda.ops.dynamic_relu import dynamic_relu

__all__ = ["dynamic_relu"]
