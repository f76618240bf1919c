"""``dyhead::deform_conv_fwd`` and ``_bwd``: any list of deformable jobs on matrices of rows.

One operator serves the published block (a job per branch and level), the paper's spatial attention
(a job per target level with a term per level) and the plain convolution (one job); see
:mod:`dyhead_cuda.ops.jobs` for what jobs and terms are.
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


def deform_conv(
    source: Tensor,
    predictions: Tensor,
    weights: Sequence[Tensor],
    plan: Plan,
    bias: Sequence[Tensor] = (),
    gates: Tensor | None = None,
    *,
    out_in_compute_dtype: bool = False,
    moments: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run a plan.

    Args:
        source: [R, C], the rows of all source maps.
        predictions: [Q, 3 * D * K], the rows of all prediction maps: offsets (dy, dx per tap and
            deformable group, in pixels), then masks (logits where ``plan.mask_logits``).
        weights: matrices [C_out, C / groups, kh, kw].
        bias: a bias [C_out] for each matrix, or none at all.
        gates: [N, sources] or None, a factor of every source map.
        out_in_compute_dtype: return rows of the accumulation type instead of the source's.
        moments: whether to return moments (not with ``out_in_compute_dtype``).

    Returns:
        Rows [S, C_out] of the jobs' outputs, and per job, image and channel the mean, the biased
        variance and the mean after upsampling, each [J, N, C_out] (J = 0 without ``moments``).
    """
    source = dense(source)
    dtype = compute_dtype(source.dtype)
    matrices, biases = kernel_weights(source, weights, bias)
    return call(
        "deform_conv_fwd",
        source,
        dense(predictions, dtype),
        matrices,
        biases or None,  # AOTInductor knows no empty lists of tensors
        None if gates is None else dense(gates, dtype),
        *plan.tables,
        plan.mask_logits,
        out_in_compute_dtype,
        moments,
        source.is_cuda and tf32_allowed(),
    )


def _fake_fwd(
    source: Tensor,
    predictions: Tensor,
    weights: list[Tensor],
    bias: list[Tensor] | None,
    gates: Tensor | None,
    images: int,
    source_sizes: list[int],
    prediction_sizes: list[int],
    out_sizes: list[int],
    up_sizes: list[int],
    geometry: list[int],
    terms: list[int],
    jobs: list[int],
    mask_logits: bool,
    out_in_compute_dtype: bool,
    moments: bool,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels = weights[0].shape[0]
    pixels = pixels_of(out_sizes)
    count = len(out_sizes) // 2 if moments else 0
    mean = predictions.new_empty(count, images, channels)
    like = predictions if out_in_compute_dtype else source
    return (
        like.new_empty(images * pixels, channels),
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
    predictions: Tensor,
    weights: list[Tensor],
    gates: Tensor | None,
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
    out_in_compute_dtype: bool,
    wanted: list[int],
    allow_tf32: bool,
    deterministic: bool,
) -> tuple[Tensor, ...]:
    shapes: list[Sequence[int]] = [
        source.shape,
        predictions.shape,
        (len(weights), *weights[0].shape),
        (len(weights), weights[0].shape[0]),
        (images, len(source_sizes) // 2),
    ]
    first, *others = (shape if want else (0,) for shape, want in zip(shapes, wanted, strict=True))
    return (source.new_empty(first), *(predictions.new_empty(shape) for shape in others))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    source, predictions, weights, bias, gates, *tables = inputs
    *tables, moments, ctx.allow_tf32 = tables
    out, mean, _, _ = output
    # Only the gradients of the moments read the outputs.
    ctx.save_for_backward(source, predictions, gates, out if moments else None, mean, *weights)
    ctx.tables, ctx.biases = tables, bias and len(bias)
    # torch takes an empty list for one of tensors, which has a list of gradients.
    ctx.no_gradients = [[] if table == [] else None for table in inputs[5:]]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, *grads: Tensor | None) -> tuple[Any, ...]:
    source, predictions, gates, out, mean, *weights = ctx.saved_tensors
    if grad_out is not None:
        grad_out = dense(grad_out)
    elif out is not None:
        grad_out = torch.zeros_like(out)
    else:
        no_weights, no_biases = [None] * len(weights), ctx.biases and [None] * ctx.biases
        return (None, None, no_weights, no_biases, None, *ctx.no_gradients)
    moments: list[Tensor | None] = [None, None, None]
    if out is not None and any(g is not None for g in grads):
        moments = [torch.zeros_like(mean) if g is None else dense(g) for g in grads]
    wanted = wanted_gradients(ctx.needs_input_grad[:5])
    results = call(
        "deform_conv_bwd",
        grad_out,
        *moments,
        source,
        predictions,
        weights,
        gates,
        grad_out if out is None else out,
        mean,
        *ctx.tables,
        wanted,
        ctx.allow_tf32,
        torch.are_deterministic_algorithms_enabled(),
    )
    found = [grad if want else None for grad, want in zip(results, wanted, strict=True)]
    return (
        *found[:2],
        unstacked(found[2], weights[0].dtype, len(weights)),
        ctx.biases and unstacked(found[3], weights[0].dtype, ctx.biases),
        found[4],
        *ctx.no_gradients,
    )


if library.loaded("cpu"):
    torch.library.register_fake("dyhead::deform_conv_fwd", _fake_fwd)
    torch.library.register_fake("dyhead::deform_conv_bwd", _fake_bwd)
    register_autograd("deform_conv_fwd", _backward, setup_context=_setup_context)
    forbid_second_derivative("deform_conv_bwd")
    _maps: dict[str, Images | Rows] = {
        "source": Rows("source_sizes"),
        "predictions": Rows("prediction_sizes"),
        "gates": Images(0),
    }
    register_folding("deform_conv_fwd", _maps, Rows("out_sizes"), *[Images(1)] * 3)
    _grads: dict[str, Images | Rows] = {"grad_out": Rows("out_sizes"), "out": Rows("out_sizes")}
    _moments: dict[str, Images | Rows] = dict.fromkeys(
        ("grad_mean", "grad_var", "grad_up_mean", "mean"), Images(1)
    )
    register_folding(
        "deform_conv_bwd",
        {**_grads, **_moments, **_maps},
        _maps["source"],
        _maps["predictions"],
        Summed(),
        Summed(),
        _maps["gates"],
    )
