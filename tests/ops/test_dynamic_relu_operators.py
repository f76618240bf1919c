"""``dyhead::dynamic_relu_fwd`` and ``_bwd`` called directly: checks, registration, determinism."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dyhead_cuda import backend, functional, library
from tests.helpers.compare import TOLERANCE, assert_close, gradients
from tests.helpers.devices import Device, each_device
from tests.helpers.inputs import random_relu_inputs
from tests.helpers.relu_operators import backward_arguments, forward_arguments

pytestmark = pytest.mark.skipif(
    not library.loaded("cpu"), reason=f"the CPU library is not loaded: {library.reason('cpu')}"
)

ALL = [1, 1, 1]  # gradients wanted
dtypes = pytest.mark.parametrize("dtype", TOLERANCE)


def test_forward_statistics() -> None:
    x, w1, b1, w2, b2 = random_relu_inputs((3, 8, 700))
    arguments = forward_arguments([x, w1, b1, w2, b2])
    _, mean, hidden, logits = torch.ops.dyhead.dynamic_relu_fwd(*arguments, True)
    assert_close(mean, x.mean(2))
    assert_close(hidden, (x.mean(2) @ w1.t() + b1).relu())
    assert_close(logits, (x.mean(2) @ w1.t() + b1).relu() @ w2.t() + b2)


@each_device
@dtypes
@pytest.mark.parametrize("shape", [(2, 6, 5), (2, 8, 30), (1, 3, 1), (0, 4, 2)])
def test_opcheck(shape: tuple[int, ...], dtype: torch.dtype, device: Device) -> None:
    inputs = [t.to(device) for t in random_relu_inputs(shape, dtype)]
    arguments = forward_arguments(inputs)
    for t in arguments:
        t.requires_grad_()
    torch.library.opcheck(torch.ops.dyhead.dynamic_relu_fwd.default, (*arguments, True))
    torch.library.opcheck(
        torch.ops.dyhead.dynamic_relu_bwd.default, (*backward_arguments(inputs), False, ALL)
    )


def wrong(arguments: list[Tensor], place: int, make: Callable[[Tensor], Tensor]) -> list[Tensor]:
    return [make(t) if i == place else t for i, t in enumerate(arguments)]


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "shorter": lambda t: t[..., :-1].contiguous(),
    "longer": lambda t: torch.cat([t, t], -1),
    "fewer first": lambda t: t[:-1].contiguous(),
    "one dimension more": lambda t: t.unsqueeze(0),
    "one dimension less": lambda t: t[0].contiguous(),
    "empty": lambda t: t[..., :0].contiguous(),
    "not contiguous": lambda t: torch.stack([t, t], -1)[..., 0],
    "another type": lambda t: t.half(),
    "integers": lambda t: t.long(),
}


@pytest.mark.parametrize("place", range(5))
@pytest.mark.parametrize("fault", WRONG)
def test_direct_calls_of_the_forward_are_checked(fault: str, place: int) -> None:
    arguments = forward_arguments(random_relu_inputs((3, 6, 5), torch.float32, hidden=4))
    torch.ops.dyhead.dynamic_relu_fwd(*arguments, True)
    if place == 0 and fault in ("fewer first", "another type"):
        return  # another batch, or rows smaller than the compute type, are no fault
    with pytest.raises(RuntimeError, match=r"expected"):
        torch.ops.dyhead.dynamic_relu_fwd(*wrong(arguments, place, WRONG[fault]), True)


@pytest.mark.parametrize("place", range(6))
@pytest.mark.parametrize("fault", WRONG)
def test_direct_calls_of_the_backward_are_checked(fault: str, place: int) -> None:
    arguments = backward_arguments(random_relu_inputs((3, 6, 5), torch.float32, hidden=4))
    torch.ops.dyhead.dynamic_relu_bwd(*arguments, True, ALL)
    with pytest.raises(RuntimeError, match=r"expected"):
        torch.ops.dyhead.dynamic_relu_bwd(*wrong(arguments, place, WRONG[fault]), True, ALL)


# --- bitwise promises -----------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize(("shape", "hidden"), [((3, 37, 2000), 9), ((1, 64, 700), 16)])
def test_bitwise_equal_for_any_number_of_threads(
    threads: None, dtype: torch.dtype, shape: tuple[int, ...], hidden: int
) -> None:
    inputs = random_relu_inputs(shape, dtype, hidden=hidden)
    results = []
    for count in (1, 2, 7, 7, 1):
        torch.set_num_threads(count)
        out = functional.dynamic_relu(*inputs)
        rows = [
            out.detach(),
            *torch.ops.dyhead.dynamic_relu_bwd(
                *backward_arguments([t.detach() for t in inputs]), True, ALL
            ),
        ]
        # Products that torch computes stay out of it: they may depend on the threads.
        results.append([*rows, gradients(out, inputs)[0]])
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert torch.equal(a, b)


def test_auto_equals_the_library_on_the_cpu() -> None:
    inputs = random_relu_inputs((2, 8, 5, 6), torch.float32)
    auto = functional.dynamic_relu(*inputs)
    with backend("auto"):
        again = functional.dynamic_relu(*inputs)
    with backend("cpu"):
        cpu = functional.dynamic_relu(*inputs)
    assert torch.equal(auto, cpu)
    assert torch.equal(again, cpu)
    for a, b in zip(gradients(auto, inputs), gradients(cpu, inputs), strict=True):
        assert torch.equal(a, b)
