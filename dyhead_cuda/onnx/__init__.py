"""The head in standard ONNX operators: what ``torch.onnx.export`` sees in place of the kernels.

While a model is exported, :func:`dyhead_cuda.backends.select` answers "onnx", and the public
functions run those of the same name here. They use plain PyTorch where the exporter makes one
standard operator of it, and :mod:`dyhead_cuda.onnx.nodes` where it would make several or none.
Sizes are never read as numbers, so that they may stay open. Arguments have been checked by the
caller.
"""

from dyhead_cuda.onnx.operators import dynamic_relu, modulated_deform_conv2d
from dyhead_cuda.onnx.published import pyramid_blocks
from dyhead_cuda.onnx.unified import spatial_attention, stack_pyramid, task_attention

__all__ = [
    "dynamic_relu",
    "modulated_deform_conv2d",
    "pyramid_blocks",
    "spatial_attention",
    "stack_pyramid",
    "task_attention",
]
