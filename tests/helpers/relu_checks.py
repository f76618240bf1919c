"""The dynamic ReLU of the library of any device, against the reference in float64 on it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dyhead_cuda import backend, functional, reference
from dyhead_cuda.ops.common import compute_dtype
from dyhead_cuda.reference import Activation
from tests.helpers.compare import assert_close, assert_gradients_close, gradients, leaf
from tests.helpers.inputs import random_relu_inputs


def random_inputs(
    shape: Sequence[int], dtype: torch.dtype = torch.float64, *, seed: int = 0, device: str
) -> list[Tensor]:
    """x [N, C, ...] and the four parameters in the accumulation type."""
    # A hidden layer this wide has gradients that do not all cancel.
    hidden = max(8, shape[1] // 4)
    inputs = random_relu_inputs(
        shape, dtype, hidden=hidden, parameter_dtype=compute_dtype(dtype), seed=seed
    )
    return [leaf(t.to(device)) for t in inputs]


def run(inputs: Sequence[Tensor], activation: Activation = "hsigmoid") -> Tensor:
    x, fc1_weight, fc1_bias, fc2_weight, fc2_bias = inputs
    with backend("cuda" if x.is_cuda else "cpu"):
        return functional.dynamic_relu(
            x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation=activation
        )


def expected_of(inputs: Sequence[Tensor], activation: Activation = "hsigmoid") -> Tensor:
    x, fc1_weight, fc1_bias, fc2_weight, fc2_bias = inputs
    return reference.dynamic_relu(
        x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation=activation
    )


def check(inputs: Sequence[Tensor], activation: Activation = "hsigmoid") -> None:
    """Result and all gradients."""
    dtype = inputs[0].dtype
    precise = [leaf(t, torch.float64) for t in inputs]
    expected = expected_of(precise, activation)
    actual = run(inputs, activation)
    assert actual.dtype == dtype
    assert_close(actual, expected, dtype)
    grads = gradients(actual, inputs, dtype)
    assert [g.dtype for g in grads] == [t.dtype for t in inputs]
    assert_gradients_close(grads, gradients(expected, precise, dtype), dtype)
