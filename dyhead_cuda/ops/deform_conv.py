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
from dyhead_cuda.ops.common import compute_dtype, dense, forbid_second_derivative, tf32_allowed
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
    dtype = compute_dtype(source.dtype)
    kinds = {w.dtype for w in (*weights, *bias)}
    # The CUDA kernels read half-precision weights as they are, beside half-precision rows.
    kept = source.is_cuda and kinds == {source.dtype}
    return call(
        "deform_conv_fwd",
        dense(source),
        dense(predictions, dtype),
        [dense(w, None if kept else dtype) for w in weights],
        # AOTInductor knows no empty lists of tensors.
        [dense(b, None if kept else dtype) for b in bias] if bias else None,
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
    with_bias: bool,
    allow_tf32: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    gated_images = 0 if gates is None else images
    return (
        torch.empty_like(source),
        torch.empty_like(predictions),
        predictions.new_empty(len(weights), *weights[0].shape),
        predictions.new_empty(len(weights) if with_bias else 0, weights[0].shape[0]),
        predictions.new_empty(gated_images, len(source_sizes) // 2),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    source, predictions, weights, bias, gates, *tables = inputs
    *tables, moments, ctx.allow_tf32 = tables
    out, mean, _, _ = output
    # Only the gradients of the moments read the outputs.
    ctx.save_for_backward(source, predictions, gates, out if moments else None, mean, *weights)
    ctx.tables, ctx.no_bias_gradients = tables, bias and [None] * len(bias)
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
        no_weights = [None] * len(weights)
        return (None, None, no_weights, ctx.no_bias_gradients, None, *ctx.no_gradients)
    moments: list[Tensor | None] = [None, None, None]
    if out is not None and any(g is not None for g in grads):
        moments = [torch.zeros_like(mean) if g is None else dense(g) for g in grads]
    grad_source, grad_predictions, grad_weights, grad_bias, grad_gates = call(
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
        bool(ctx.no_bias_gradients),
        ctx.allow_tf32,
        torch.are_deterministic_algorithms_enabled(),
    )
    return (
        grad_source,
        grad_predictions,
        list(grad_weights.to(weights[0].dtype).unbind()),
        ctx.no_bias_gradients and list(grad_bias.to(weights[0].dtype).unbind()),
        None if gates is None else grad_gates,
        *ctx.no_gradients,
    )


if library.loaded("cpu"):
    torch.library.register_fake("dyhead::deform_conv_fwd", _fake_fwd)
    torch.library.register_fake("dyhead::deform_conv_bwd", _fake_bwd)
    register_autograd("deform_conv_fwd", _backward, setup_context=_setup_context)
    forbid_second_derivative("deform_conv_bwd")
