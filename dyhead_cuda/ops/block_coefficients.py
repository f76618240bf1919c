"""``dyhead::block_coefficients_fwd`` and ``_bwd``: a block's step between its two passes.

Group normalisation, scale gates and averaging are affine per channel once the moments of the
branches are known, and so is the mean that the dynamic ReLU starts from: no pixel is touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from dyhead_cuda import library
from dyhead_cuda.ops.common import dense, forbid_second_derivative, wanted_gradients
from dyhead_cuda.ops.folding import Images, Summed, register_folding
from dyhead_cuda.ops.transforms import call, register_autograd

MAX_JOBS = 128  # of one call, kMaxCoefficientJobs in csrc/common/block_coefficients.h


def block_coefficients(
    mean: Tensor,
    var: Tensor,
    up_mean: Tensor,
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    gate_weight: Tensor,
    gate_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    job_levels: Sequence[int],
    job_branches: Sequence[int],
    *,
    num_groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """From the moments of the branches to all that the last pass over the pixels needs.

    Args:
        mean, var, up_mean: [J, N, C], float32 or float64, per job: the mean, the biased variance,
            and the mean after upsampling of the deformable convolution's output.
        norm_weights, norm_biases: [C] for each of up to 8 kinds of branches. These and the other
            parameters may be of any floating type; their gradients have the type they have.
        gate_weight, gate_bias: [C] and [1], of the scale gate.
        fc1_weight, fc1_bias, fc2_weight, fc2_bias: [H, C], [H], [4 C, H] and [4 C], of the dynamic
            ReLU.
        job_levels, job_branches: level and kind of branch of each job, in the order of the levels.
            Every level has a job.
        num_groups, eps: of the group normalisation.

    Returns:
        scale [J, N, C] and shift [L, N, C], with z = sum_j scale_j . y_j + shift_l the gated
        average, and the dynamic ReLU's coefficients [L, N, 4, C]: a1, b1, a2, b2.

    Raises:
        RuntimeError: tensors or tables that do not fit.

    Source: the published block (microsoft/DynamicHead, ``dyhead/dyhead.py``), rearranged; see
    ``csrc/common/block_coefficients.h``.
    """
    moments = dense(mean), dense(var), dense(up_mean)
    parameters = (
        [dense(t) for t in norm_weights],
        [dense(t) for t in norm_biases],
        dense(gate_weight),
        dense(gate_bias),
        dense(fc1_weight),
        dense(fc1_bias),
        dense(fc2_weight),
        dense(fc2_bias),
    )

    def run(
        moments: Sequence[Tensor], levels: Sequence[int], branches: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        tables = list(levels), list(branches), num_groups, eps
        scale, shift, coefficients, _, _ = call(
            "block_coefficients_fwd", *moments, *parameters, *tables
        )
        return scale, shift, coefficients

    if len(job_levels) <= MAX_JOBS:
        return run(moments, job_levels, job_branches)
    parts = []
    for jobs in calls_of(job_levels):
        levels = [level - job_levels[jobs.start] for level in job_levels[jobs]]
        parts.append(run([t[jobs] for t in moments], levels, job_branches[jobs]))
    scale, shift, coefficients = (torch.cat(part) for part in zip(*parts, strict=True))
    return scale, shift, coefficients


def calls_of(job_levels: Sequence[int]) -> list[slice]:
    """The jobs of each call: whole levels, as many as one call takes.

    Levels do not depend on each other here, and autograd adds up what they give the parameters.
    """
    calls: list[slice] = []
    first = end = 0
    for _, level in groupby(job_levels):
        jobs = len(list(level))
        if end > first and end + jobs - first > MAX_JOBS:
            calls.append(slice(first, end))
            first = end
        end += jobs
    return [*calls, slice(first, end)]


def _fake_fwd(
    mean: Tensor,
    var: Tensor,
    up_mean: Tensor,
    norm_weights: list[Tensor],
    norm_biases: list[Tensor],
    gate_weight: Tensor,
    gate_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    job_levels: list[int],
    job_branches: list[int],
    num_groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    jobs, images, channels = mean.shape
    levels = max(job_levels) + 1
    return (
        torch.empty_like(mean),
        mean.new_empty(levels, images, channels),
        mean.new_empty(levels, images, 4, channels),
        mean.new_empty(jobs, images, 2 * num_groups + 1),
        mean.new_empty(levels, images, 5 * channels + fc1_weight.shape[0]),
    )


def _fake_bwd(
    grad_scale: Tensor,
    grad_shift: Tensor,
    grad_coefficients: Tensor,
    mean: Tensor,
    up_mean: Tensor,
    norms: Tensor,
    layers: Tensor,
    norm_weights: list[Tensor],
    norm_biases: list[Tensor],
    gate_weight: Tensor,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    job_levels: list[int],
    job_branches: list[int],
    num_groups: int,
    wanted: list[int],
) -> tuple[Tensor, ...]:
    channels, hidden = mean.shape[2], fc1_weight.shape[0]
    shapes: list[tuple[int, ...]] = [
        *[tuple(mean.shape)] * 3,
        *[(len(norm_weights), channels)] * 2,
        (channels,),
        (1,),
        (hidden, channels),
        (hidden,),
        (4 * channels, hidden),
        (4 * channels,),
    ]
    return tuple(
        mean.new_empty(shape if want else (0,)) for shape, want in zip(shapes, wanted, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    mean, _, up_mean, norm_weights, norm_biases, *parameters = inputs[:11]
    gate_weight, _, fc1_weight, _, fc2_weight, _ = parameters
    scale, shift, coefficients, norms, layers = output
    ctx.mark_non_differentiable(norms, layers)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        mean, up_mean, norms, layers, gate_weight, fc1_weight, fc2_weight,
        *norm_weights, *norm_biases,
    )  # fmt: skip
    ctx.job_levels, ctx.job_branches, ctx.num_groups, _ = inputs[11:]
    ctx.norms = len(norm_weights)
    ctx.shapes = [t.shape for t in (scale, shift, coefficients)]
    ctx.dtypes = [t.dtype for t in parameters]


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    mean, up_mean, norms, layers, gate_weight, fc1_weight, fc2_weight, *rest = ctx.saved_tensors
    norm_weights, norm_biases = rest[: ctx.norms], rest[ctx.norms :]
    given = [
        mean.new_zeros(shape) if g is None else dense(g)
        for g, shape in zip(grads[:3], ctx.shapes, strict=True)
    ]
    wanted = wanted_gradients(ctx.needs_input_grad[:11])
    results = call(
        "block_coefficients_bwd",
        *given,
        mean,
        up_mean,
        norms,
        layers,
        norm_weights,
        norm_biases,
        gate_weight,
        fc1_weight,
        fc2_weight,
        ctx.job_levels,
        ctx.job_branches,
        ctx.num_groups,
        wanted,
    )
    found = [grad if want else None for grad, want in zip(results, wanted, strict=True)]
    used = set(ctx.job_branches)  # what no job has gets no gradient, as if it were not there

    def unstack(stacked: Tensor | None, like: Sequence[Tensor]) -> list[Tensor | None]:
        if stacked is None:
            return [None] * len(like)
        return [stacked[b].to(t.dtype) if b in used else None for b, t in enumerate(like)]

    return (
        *found[:3],
        unstack(found[3], norm_weights),
        unstack(found[4], norm_biases),
        *(g if g is None else g.to(t) for g, t in zip(found[5:], ctx.dtypes, strict=True)),
        *[None] * 4,
    )


if library.loaded("cpu"):
    torch.library.register_fake("dyhead::block_coefficients_fwd", _fake_fwd)
    torch.library.register_fake("dyhead::block_coefficients_bwd", _fake_bwd)
    register_autograd("block_coefficients_fwd", _backward, setup_context=_setup_context)
    forbid_second_derivative("block_coefficients_bwd")

    def _with_images(*names: str) -> dict[str, Images]:
        return dict.fromkeys(names, Images(1))

    register_folding(
        "block_coefficients_fwd", _with_images("mean", "var", "up_mean"), *[Images(1)] * 5
    )
    register_folding(
        "block_coefficients_bwd",
        _with_images(
            "grad_scale", "grad_shift", "grad_coefficients", "mean", "up_mean", "norms", "layers"
        ),
        *[Images(1)] * 3,
        *[Summed()] * 8,
    )
