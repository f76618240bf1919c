"""Checks of calls of deform_conv on any device, against the reference in float64 on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dyhead_cuda.ops.common import compute_dtype
from tests.helpers.compare import assert_close, assert_gradients_close, gradients, leaf
from tests.helpers.deform_work import Call, Tensors


def results(call: Call, tensors: Tensors, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and all gradients."""
    outs = call.run(tensors)
    return [x.detach() for x in outs], gradients(outs, [*tensors.values()], dtype)


def expected_of(call: Call, tensors: Tensors, dtype: torch.dtype) -> Any:
    exact = {name: leaf(t, torch.float64) for name, t in tensors.items()}
    outs = call.reference(exact)
    return outs, gradients(outs, [*exact.values()], dtype)


def check(call: Call, dtype: torch.dtype, tensors: Tensors) -> None:
    """Results and all gradients against the reference in float64."""
    actual, grads = results(call, tensors, dtype)
    assert actual[0].dtype == (compute_dtype(dtype) if call.out_in_compute_dtype else dtype)
    assert {x.dtype for x in actual[1:]} <= {compute_dtype(dtype)}
    assert [g.dtype for g in grads] == [t.dtype for t in tensors.values()]
    if call.images == 0:
        assert [x.shape for x in actual] == [x.shape for x in call.reference(tensors)]
        assert all((g == 0).all() for g in grads)
        return
    expected, wanted = expected_of(call, tensors, dtype)
    assert_close(actual, expected, dtype)
    assert_gradients_close(grads, wanted, dtype)


def bits(call: Call, tensors: Tensors, dtype: torch.dtype) -> list[Tensor]:
    outs, grads = results(call, tensors, dtype)
    return [*outs, *grads]


def assert_same_bits(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(a, b), f"tensor {i}"


def assert_second_derivative_raises(call: Any) -> None:
    """``call`` is a Call or has its methods ``tensors`` and ``run``, here and below."""
    tensors = call.tensors()
    out = call.run(tensors)[0]
    (grad,) = torch.autograd.grad(out.sum(), [tensors["source"]], create_graph=True)
    with pytest.raises(RuntimeError, match="not differentiable again"):
        grad.sum().backward()


def assert_threads_give_the_same_bits(call: Any, dtype: torch.dtype) -> None:
    """Outputs and all gradients, for any number of threads; the number is left changed."""
    first = None
    for count in (1, 2, 7, 7):
        torch.set_num_threads(count)
        tensors = call.tensors(dtype)
        outputs = call.run(tensors)
        found = [*outputs, *gradients(outputs, list(tensors.values()))]
        first = first or found
        assert_same_bits(found, first)
