"""The compiled operators: for each its checks, its autograd formula and its fake kernels."""

from dyhead_cuda.ops import flops as flops  # counters know the operators from the first import
