"""``dyhead::dynamic_relu_fwd`` and ``_bwd``: the task attention on rows, forward and backward.

The forward returns, beside the result, what its backward needs: the mean of the rows, the hidden
layer and the logits, all of the size of a few vectors per image.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dyhead_cuda import checks, library
from dyhead_cuda.ops.common import (
    compute_dtype,
    dense,
    forbid_second_derivative,
    wanted_gradients,
)
from dyhead_cuda.ops.folding import Images, register_folding
from dyhead_cuda.ops.transforms import call, register_autograd


def dynamic_relu(
    rows: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    activation: str,
) -> Tensor:
    """max(a1 . x + b1, a2 . x + b2) of rows [N, P, C], averaged over P for each image.

    The parameters may be of any floating type: they are converted to the accumulation type, so that
    their gradients come back in the type they have.
    """
    checks.one_of("activation", activation, checks.ACTIVATIONS)
    rows = dense(rows)
    dtype = compute_dtype(rows.dtype)
    out, _, _, _ = call(
        "dynamic_relu_fwd",
        rows,
        dense(fc1_weight, dtype),
        dense(fc1_bias, dtype),
        dense(fc2_weight, dtype),
        dense(fc2_bias, dtype),
        activation == "hsigmoid",
    )
    return out


def _fake_fwd(
    rows: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    hard_sigmoid: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, _, channels = rows.shape
    statistics = rows.new_empty(0, dtype=compute_dtype(rows.dtype))
    return (
        torch.empty_like(rows),
        statistics.new_empty(n, channels),
        statistics.new_empty(n, fc1_weight.shape[0]),
        statistics.new_empty(n, 4 * channels),
    )


def _fake_bwd(
    grad_out: Tensor,
    rows: Tensor,
    hidden: Tensor,
    logits: Tensor,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    hard_sigmoid: bool,
    wanted: list[int],
) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty_like(t) if want else t.new_empty(0)
        for t, want in zip((rows, logits, hidden), wanted, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    rows, fc1_weight, _, fc2_weight, _, hard_sigmoid = inputs
    _, mean, hidden, logits = output
    ctx.mark_non_differentiable(mean, hidden, logits)
    ctx.save_for_backward(rows, mean, hidden, logits, fc1_weight, fc2_weight)
    ctx.hard_sigmoid = hard_sigmoid


def _backward(ctx: Any, grad_out: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    rows, mean, hidden, logits, fc1_weight, fc2_weight = ctx.saved_tensors
    of_rows, *of_parameters, _ = ctx.needs_input_grad
    of_fc1_weight, of_fc1_bias, of_fc2_weight, of_fc2_bias = of_parameters
    of_fc1, of_fc2 = of_fc1_weight or of_fc1_bias, of_fc2_weight or of_fc2_bias
    grad_rows, grad_logits, grad_hidden = call(
        "dynamic_relu_bwd",
        dense(grad_out, rows.dtype),
        rows,
        hidden,
        logits,
        fc1_weight,
        fc2_weight,
        ctx.hard_sigmoid,
        wanted_gradients([of_rows, of_fc2, of_fc1]),
    )
    return (
        grad_rows if of_rows else None,
        grad_hidden.t() @ mean if of_fc1_weight else None,
        grad_hidden.sum(0) if of_fc1_bias else None,
        grad_logits.t() @ hidden if of_fc2_weight else None,
        grad_logits.sum(0) if of_fc2_bias else None,
        None,
    )


if library.loaded("cpu"):
    torch.library.register_fake("dyhead::dynamic_relu_fwd", _fake_fwd)
    torch.library.register_fake("dyhead::dynamic_relu_bwd", _fake_bwd)
    register_autograd("dynamic_relu_fwd", _backward, setup_context=_setup_context)
    forbid_second_derivative("dynamic_relu_bwd")
    register_folding("dynamic_relu_fwd", {"rows": Images(0)}, *[Images(0)] * 4)
    _tensors = dict.fromkeys(("grad_out", "rows", "hidden", "logits"), Images(0))
    register_folding("dynamic_relu_bwd", _tensors, *[Images(0)] * 3)
