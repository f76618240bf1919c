"""Single nodes of an ONNX graph, for what PyTorch has no operator that becomes one node.

Each function makes one node, :func:`flat_prefix` three. The values that it returns while a model
is traced are never looked at; only their shape and type count. Names and meanings are those of the
ONNX standard.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dyhead_cuda.pyramid import OFFSET_CHANNELS, TAPS

Size = Sequence[int]  # of integers that may be symbols
Mode = tuple[str, str]

# How Resize finds a position in its input, by the mode of F.interpolate.
ALIGNED: Mode = ("linear", "align_corners")  # bilinear, align_corners=True
BILINEAR: Mode = ("linear", "half_pixel")  # bilinear, align_corners=False
NEAREST: Mode = ("nearest", "asymmetric")


def node(
    op_type: str,
    inputs: Sequence[Tensor | None],
    shape: Size,
    dtype: torch.dtype,
    version: int | None = None,
    **attributes: Any,
) -> Tensor:
    """One node with one output.

    Args:
        op_type: the operator's name in the ONNX standard.
        inputs: its inputs, of any shape, the first one of the output's device; None for one that is
            left out.
        shape: of the output.
        dtype: of the output.
        version: of the operator set that has it; None: that of the exporter.
        attributes: of the node.

    Returns:
        Its output.
    """
    out = torch.onnx.ops.symbolic(
        op_type, inputs, attributes, dtype=dtype, shape=shape, version=version
    )
    return _beside(out, inputs[0])


def _beside(out: Tensor, x: Tensor | None) -> Tensor:
    """``out``, which is on the CPU for PyTorch, on the device of ``x``."""
    return out if x is None or x.device == out.device else out.to(x.device)


def size_of(x: Tensor) -> Tensor:
    """(H, W) of x [..., H, W], as a tensor [2], int64, on the CPU."""
    attributes: dict[str, Any] = {"start": x.dim() - 2}
    return torch.onnx.ops.symbolic("Shape", (x,), attributes, dtype=torch.int64, shape=[2])


class Constants:
    """Lists of integers as tensors [K], int64, each made once.

    Tracing takes a few milliseconds for each, so all blocks of a head use the same ones.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, *values: int) -> Tensor:
        if values not in self._made:
            self._made[values] = torch.tensor(values, dtype=torch.int64)
        return self._made[values]


class Area:
    """The height and width of maps, and what nodes need of them, each made once.

    Args:
        x: one of the maps, [..., H, W].
        constants: of the graph.
    """

    def __init__(self, x: Tensor, constants: Constants) -> None:
        self.shape: Size = x.shape[-2:]  # integers that may be symbols
        self.size = size_of(x)  # the same as a tensor [2], int64
        self.constants = constants
        self._prefixes: dict[int, tuple[Tensor, Tensor]] = {}

    def prefix(self, channels: int) -> tuple[Tensor, Tensor]:
        """(K * h * w) and (0, K, h, w) for K channels, as tensors [1] and [4], int64."""
        if channels not in self._prefixes:
            pixels = node("ReduceProd", (self.size,), [1], torch.int64, keepdims=1)
            target = torch.cat([self.constants(0, channels), self.size])
            self._prefixes[channels] = pixels * channels, target
        return self._prefixes[channels]


def split(x: Tensor, parts: int, dim: int) -> Sequence[Tensor]:
    """``x`` cut into equal parts along ``dim``."""
    shape = [*x.shape[:dim], x.shape[dim] // parts, *x.shape[dim + 1 :]]
    outs = torch.onnx.ops.symbolic_multi_out(
        "Split",
        (x,),
        {"axis": dim, "num_outputs": parts},
        dtypes=[x.dtype] * parts,
        shapes=[shape] * parts,
    )
    return [_beside(out, x) for out in outs]


def offset_and_mask(predictions: Tensor, constants: Constants) -> tuple[Tensor, Tensor]:
    """Offsets [N, 18, H, W] and modulation [N, 9, H, W] of predictions [N, 27, H, W]."""
    x = predictions
    offset, logits = torch.onnx.ops.symbolic_multi_out(
        "Split",
        (x, constants(OFFSET_CHANNELS, TAPS)),
        {"axis": 1},
        dtypes=[x.dtype] * 2,
        shapes=[[x.shape[0], channels, *x.shape[2:]] for channels in (OFFSET_CHANNELS, TAPS)],
    )
    return _beside(offset, x), _beside(logits, x).sigmoid()


def mean(tensors: Sequence[Tensor]) -> Tensor:
    """The mean of tensors of one shape, element by element."""
    first = tensors[0]
    return first if len(tensors) == 1 else node("Mean", tensors, first.shape, first.dtype)


def reshape(x: Tensor, target: Tensor, shape: Size) -> Tensor:
    """``x`` in another shape.

    Args:
        x: of any shape.
        target: the shape as a tensor [D], int64; 0 keeps a dimension, -1 is what is left.
        shape: the same as integers.
    """
    return node("Reshape", (x, target), shape, x.dtype)


def resize(x: Tensor, size: Tensor, shape: Size, mode: Mode) -> Tensor:
    """A map of another size.

    Args:
        x: [N, C, h, w].
        size: (H, W) as a tensor [2], int64.
        shape: (H, W) as integers.
        mode: :data:`ALIGNED`, :data:`BILINEAR` or :data:`NEAREST`.

    Returns:
        [N, C, H, W].
    """
    kind, coordinates = mode
    return node(
        "Resize",
        (x, None, None, size),
        [*x.shape[:2], *shape],
        x.dtype,
        mode=kind,
        coordinate_transformation_mode=coordinates,
        nearest_mode="floor",
        axes=[2, 3],
    )


def deform_conv(
    x: Tensor,
    weight: Tensor,
    offset: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    deform_groups: int = 1,
) -> Tensor:
    """Modulated deformable convolution, in the standard since opset 19.

    It orders offsets as this package does, dy before dx for each tap, and so does it treat samples
    beyond the border. Where an offset is NaN or infinite, onnxruntime has 0 and this package NaN.

    Args:
        x: [N, C_in, H, W].
        weight: [C_out, C_in / groups, kh, kw].
        offset: [N, 2 * D * K, H_out, W_out].
        bias: [C_out] or None.
        mask: [N, D * K, H_out, W_out] or None.
        stride, padding, dilation: vertical, horizontal.
        groups: of the convolution.
        deform_groups: D.

    Returns:
        [N, C_out, H_out, W_out].
    """
    return node(
        "DeformConv",
        (x, weight, offset, bias, mask),
        [x.shape[0], weight.shape[0], *offset.shape[2:]],
        x.dtype,
        version=19,
        kernel_shape=list(weight.shape[2:]),
        strides=list(stride),
        pads=[*padding, *padding],
        dilations=list(dilation),
        group=groups,
        offset_group=deform_groups,
    )


def crop(x: Tensor, area: Area) -> Tensor:
    """The upper left part of x [N, K, H, W] that has this area."""
    shape = [*x.shape[:2], *area.shape]
    return node("Slice", (x, area.constants(0, 0), area.size, area.constants(2, 3)), shape, x.dtype)


def flat_prefix(x: Tensor, area: Area) -> Tensor:
    """The first K * h * w values of each image of x [N, K, H, W], read as [N, K, h, w]."""
    n, channels, height, width = x.shape
    end, target = area.prefix(channels)
    flat = reshape(x, area.constants(0, -1), [n, channels * height * width])
    shape = [n, channels * area.shape[0] * area.shape[1]]
    first = node("Slice", (flat, area.constants(0), end, area.constants(1)), shape, x.dtype)
    return reshape(first, target, [n, channels, *area.shape])
