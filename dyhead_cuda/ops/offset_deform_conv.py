"""``dyhead::offset_deform_conv_fwd`` and ``_bwd``: both convolutions of a published block.

A plain convolution predicts offsets and masks, and deformable jobs on the same source read them.
As one operator they have one gradient of the source, whose sums are kept in the accumulation type
until both have added to them: it is cleared, written and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dyhead_cuda import library
from dyhead_cuda.ops.common import (
    compute_dtype,
    dense,
    forbid_second_derivative,
    kernel_weights,
    tf32_allowed,
    unstacked,
    wanted_gradients,
)
from dyhead_cuda.ops.folding import Images, Rows, Summed, register_folding
from dyhead_cuda.ops.jobs import Plan, pixels_of
from dyhead_cuda.ops.transforms import call, register_autograd


def offset_deform_conv(
    source: Tensor,
    offset_weight: Tensor,
    offset_bias: Tensor | None,
    weights: Sequence[Tensor],
    plan: Plan,
    bias: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Predict offsets and masks of the first source maps, and run a plan that reads them.

    The predictions have the accumulation type: an offset rounded to bfloat16 would move its sample,
    and near a whole pixel change the slope of the interpolation.

    Args:
        source: [R, C], the rows of all source maps.
        offset_weight: [3 * D * K, C, kh, kw], of the plain convolution: its rows of offsets (dy, dx
            per tap and deformable group, in pixels), then of masks (logits where
            ``plan.mask_logits``). It has stride 1 and the plan's kernel, padding and dilation.
        offset_bias: [3 * D * K] or None.
        weights: matrices [C_out, C / groups, kh, kw] of the jobs.
        plan: of the jobs. Its prediction map i is made from source map i and has its size.
        bias: a bias [C_out] for each matrix, or none at all.

    Returns:
        Rows [S, C_out] of the jobs' outputs, of the source's type, and per job, image and channel
        the mean, the biased variance and the mean after upsampling, each [J, N, C_out] of the
        accumulation type.

    Raises:
        RuntimeError: tensors or prediction maps that do not fit; the message says which would.

    Example:
        >>> import torch
        >>> from dyhead_cuda.ops.jobs import Job, Plan
        >>> from dyhead_cuda.ops.offset_deform_conv import offset_deform_conv
        >>> plan = Plan(1, [(4, 5)], [(4, 5)], [Job((4, 5), 0, [(0, 0)])])
        >>> rows, predict = torch.ones(20, 8), torch.ones(27, 8, 3, 3)
        >>> y, mean, _, _ = offset_deform_conv(rows, predict, None, [torch.ones(6, 8, 3, 3)], plan)
        >>> y.shape, mean.shape
        (torch.Size([20, 6]), torch.Size([1, 1, 6]))
    """
    source = dense(source)
    offset_biases = [] if offset_bias is None else [offset_bias]
    (offset_weight,), offset_biases = kernel_weights(source, [offset_weight], offset_biases)
    matrices, biases = kernel_weights(source, weights, bias)
    _, *results = call(
        "offset_deform_conv_fwd",
        source,
        offset_weight,
        offset_biases[0] if offset_biases else None,
        matrices,
        biases or None,  # AOTInductor knows no empty lists of tensors
        *plan.tables,
        plan.mask_logits,
        source.is_cuda and tf32_allowed(),
    )
    out, mean, var, up_mean = results
    return out, mean, var, up_mean


def _fake_fwd(
    source: Tensor,
    offset_weight: Tensor,
    offset_bias: Tensor | None,
    weights: list[Tensor],
    bias: list[Tensor] | None,
    images: int,
    source_sizes: list[int],
    prediction_sizes: list[int],
    out_sizes: list[int],
    up_sizes: list[int],
    geometry: list[int],
    terms: list[int],
    jobs: list[int],
    mask_logits: bool,
    allow_tf32: bool,
) -> tuple[Tensor, ...]:
    channels, dtype = weights[0].shape[0], compute_dtype(source.dtype)
    rows = images * pixels_of(prediction_sizes)
    mean = source.new_empty(len(out_sizes) // 2, images, channels, dtype=dtype)
    return (
        source.new_empty(rows, offset_weight.shape[0], dtype=dtype),
        source.new_empty(images * pixels_of(out_sizes), channels),
        mean,
        torch.empty_like(mean),
        torch.empty_like(mean),
    )


def _fake_bwd(
    grad_out: Tensor,
    grad_mean: Tensor | None,
    grad_var: Tensor | None,
    grad_up_mean: Tensor | None,
    source: Tensor,
    offset_weight: Tensor,
    weights: list[Tensor],
    predictions: Tensor,
    out: Tensor,
    mean: Tensor,
    images: int,
    source_sizes: list[int],
    prediction_sizes: list[int],
    out_sizes: list[int],
    up_sizes: list[int],
    geometry: list[int],
    terms: list[int],
    jobs: list[int],
    mask_logits: bool,
    wanted: list[int],
    allow_tf32: bool,
    deterministic: bool,
) -> tuple[Tensor, ...]:
    shapes: list[Sequence[int]] = [
        source.shape,
        offset_weight.shape,
        offset_weight.shape[:1],
        (len(weights), *weights[0].shape),
        (len(weights), weights[0].shape[0]),
    ]
    first, *others = (shape if want else (0,) for shape, want in zip(shapes, wanted, strict=True))
    return (source.new_empty(first), *(predictions.new_empty(shape) for shape in others))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    source, offset_weight, _, weights, bias, *tables = inputs
    *ctx.tables, ctx.allow_tf32 = tables
    predictions, out, mean, _, _ = output
    ctx.save_for_backward(source, offset_weight, predictions, out, mean, *weights)
    ctx.biases = bias and len(bias)
    # torch takes an empty list for one of tensors, which has a list of gradients.
    ctx.no_gradients = [[] if table == [] else None for table in inputs[5:]]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(predictions)  # kept for the backward only


def _backward(ctx: Any, _: None, grad_out: Tensor | None, *grads: Tensor | None) -> tuple[Any, ...]:
    source, offset_weight, predictions, out, mean, *weights = ctx.saved_tensors
    moments: list[Tensor | None] = [None, None, None]
    if any(g is not None for g in grads):
        moments = [torch.zeros_like(mean) if g is None else dense(g) for g in grads]
    wanted = wanted_gradients(ctx.needs_input_grad[:5])
    results = call(
        "offset_deform_conv_bwd",
        torch.zeros_like(out) if grad_out is None else dense(grad_out),
        *moments,
        source,
        offset_weight,
        weights,
        predictions,
        out,
        mean,
        *ctx.tables,
        wanted,
        ctx.allow_tf32,
        torch.are_deterministic_algorithms_enabled(),
    )
    found = [grad if want else None for grad, want in zip(results, wanted, strict=True)]
    dtype = offset_weight.dtype
    return (
        found[0],
        *(None if grad is None else grad.to(dtype) for grad in found[1:3]),
        unstacked(found[3], weights[0].dtype, len(weights)),
        ctx.biases and unstacked(found[4], weights[0].dtype, ctx.biases),
        *ctx.no_gradients,
    )


if library.loaded("cpu"):
    torch.library.register_fake("dyhead::offset_deform_conv_fwd", _fake_fwd)
    torch.library.register_fake("dyhead::offset_deform_conv_bwd", _fake_bwd)
    register_autograd("offset_deform_conv_fwd", _backward, setup_context=_setup_context)
    forbid_second_derivative("offset_deform_conv_bwd")
    _source, _predictions, _outs = Rows("source_sizes"), Rows("prediction_sizes"), Rows("out_sizes")
    register_folding(
        "offset_deform_conv_fwd", {"source": _source}, _predictions, _outs, *[Images(1)] * 3
    )
    _moments = dict.fromkeys(("grad_mean", "grad_var", "grad_up_mean", "mean"), Images(1))
    register_folding(
        "offset_deform_conv_bwd",
        {
            "grad_out": _outs,
            **_moments,
            "source": _source,
            "predictions": _predictions,
            "out": _outs,
        },
        _source,
        *[Summed()] * 4,
    )
