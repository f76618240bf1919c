"""Backward operators compute the gradients that somebody needs, and no others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dyhead_cuda import DyHead, backend, functional
from tests.helpers.coefficients import backward_arguments as coefficient_arguments
from tests.helpers.coefficients import block_case
from tests.helpers.coefficients import run as coefficients
from tests.helpers.compare import gradients, leaf
from tests.helpers.deform_work import WORKS
from tests.helpers.devices import needs_cpu_library
from tests.helpers.fuse_cases import CASES
from tests.helpers.inputs import halving_sizes, random_pyramid, random_relu_inputs
from tests.helpers.modules import randomise
from tests.helpers.offset_work import WORKS as OFFSET_WORKS
from tests.helpers.relu_operators import backward_arguments as relu_arguments

pytestmark = needs_cpu_library

Run = Callable[[list[int]], tuple[Tensor, ...]]


def deform_conv() -> tuple[Run, int]:
    work = WORKS["all"]
    tensors = {name: t.detach() for name, t in work.tensors().items()}
    *first, _, allow_tf32, deterministic = work.backward_arguments(tensors)
    operator = torch.ops.dyhead.deform_conv_bwd
    return lambda wanted: operator(*first, wanted, allow_tf32, deterministic), 5


def offset_deform_conv() -> tuple[Run, int]:
    work = OFFSET_WORKS["all"]
    *first, _, allow_tf32, deterministic = work.backward_arguments(work.tensors())
    operator = torch.ops.dyhead.offset_deform_conv_bwd
    return lambda wanted: operator(*first, wanted, allow_tf32, deterministic), 5


def fuse_branches() -> tuple[Run, int]:
    case = CASES["two levels"]
    tensors = [t.detach() for t in case.tensors()]
    arguments = (torch.randn_like(case.run(tensors)), *tensors, *case.tables())
    return lambda wanted: torch.ops.dyhead.fuse_branches_bwd(*arguments, wanted), 4


def block_coefficients() -> tuple[Run, int]:
    case = block_case(2)
    *arguments, wanted = coefficient_arguments(case, case.tensors())
    operator = torch.ops.dyhead.block_coefficients_bwd
    return lambda wanted: operator(*arguments, wanted), len(wanted)


def dynamic_relu() -> tuple[Run, int]:
    arguments = relu_arguments(random_relu_inputs((3, 6, 5), torch.float64, hidden=4))
    return lambda wanted: torch.ops.dyhead.dynamic_relu_bwd(*arguments, True, wanted), 3


OPERATORS = [deform_conv, offset_deform_conv, fuse_branches, block_coefficients, dynamic_relu]
each_operator = pytest.mark.parametrize("operator", OPERATORS, ids=lambda f: f.__name__)


@each_operator
def test_every_choice(operator: Callable[[], tuple[Run, int]]) -> None:
    """What is wanted has the same bits as with all others; what is not is empty."""
    torch.manual_seed(0)
    run, count = operator()
    every = run([1] * count)
    alone = [[int(i == j) for j in range(count)] for i in range(count)]
    without = [[1 - want for want in wanted] for wanted in alone]
    for wanted in (*alone, *without, [0] * count):
        found = run(wanted)
        assert len(found) == count
        for one, full, want in zip(found, every, wanted, strict=True):
            assert one.dtype == full.dtype
            assert torch.equal(one, full if want else full.new_empty(0)), wanted


@each_operator
def test_bad_choices_raise(operator: Callable[[], tuple[Run, int]]) -> None:
    run, count = operator()
    for bad in ([1] * (count - 1), [1] * (count + 1), [2] * count, [-1] * count):
        with pytest.raises(RuntimeError, match="wanted"):
            run(bad)


class WantedOf(TorchDispatchMode):
    """Collects what backward operators are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        names = [a.name for a in func._schema.arguments]
        if func.namespace == "dyhead" and "wanted" in names:
            self.seen.append(list(args[names.index("wanted")]))
        return func(*args, **(kwargs or {}))


def forward_deform_conv() -> tuple[Callable[[Sequence[Tensor]], list[Tensor]], list[Tensor]]:
    work = WORKS["all"]
    tensors = work.tensors()
    names = list(tensors)
    return lambda given: work.run(dict(zip(names, given, strict=True))), list(tensors.values())


def forward_offset_deform_conv() -> tuple[Callable[[Sequence[Tensor]], list[Tensor]], list[Tensor]]:
    work = OFFSET_WORKS["all"]
    tensors = work.tensors()
    names = list(tensors)
    return lambda given: work.run(dict(zip(names, given, strict=True))), list(tensors.values())


def forward_fuse_branches() -> tuple[Callable[[Sequence[Tensor]], list[Tensor]], list[Tensor]]:
    case = CASES["two levels"]
    return lambda given: [case.run(list(given))], case.tensors()


def forward_block_coefficients() -> tuple[Callable[[Sequence[Tensor]], list[Tensor]], list[Tensor]]:
    case = block_case(2)
    return lambda given: list(coefficients(case, list(given))), case.tensors()


def forward_dynamic_relu() -> tuple[Callable[[Sequence[Tensor]], list[Tensor]], list[Tensor]]:
    inputs = random_relu_inputs((3, 6, 5), torch.float64, hidden=4)
    return lambda given: [functional.dynamic_relu(*given)], inputs


FORWARDS = [
    forward_deform_conv,
    forward_offset_deform_conv,
    forward_fuse_branches,
    forward_block_coefficients,
    forward_dynamic_relu,
]


@pytest.mark.parametrize("operator", FORWARDS, ids=lambda f: f.__name__)
def test_only_what_requires_a_gradient_is_asked_for(operator: Callable[[], Any]) -> None:
    """And it is the gradient that it has where all of them do."""
    run, tensors = operator()
    leaves = [leaf(t) for t in tensors]
    expected = gradients(run(leaves), leaves)
    for i, full in enumerate(expected):
        given = [leaf(t) if i == j else t.detach() for j, t in enumerate(tensors)]
        outs = run(given)
        with WantedOf() as wanted:
            (found,) = gradients([out for out in outs if out.requires_grad], [given[i]])
        assert sum(map(sum, wanted.seen)) == 1
        assert torch.equal(found, full)


def backward_flops(head: DyHead, levels: list[Tensor]) -> int:
    outs = head(levels)
    with FlopCounterMode(display=False) as counter:
        torch.stack([x.sum() for x in outs]).sum().backward()
    return counter.get_total_flops()


def test_frozen_weights_cost_no_products() -> None:
    head = DyHead(8, 16, 2, num_groups=2)
    randomise(head)
    levels: list[Any] = [x.requires_grad_() for x in random_pyramid(2, 8, halving_sizes(8, 8, 3))]
    levels = [x.detach().float().requires_grad_() for x in levels]
    with backend("cpu"):
        everything = backward_flops(head, levels)
        expected = [x.grad for x in levels]
        for x in levels:
            x.grad = None
        head.requires_grad_(False)
        frozen = backward_flops(head, levels)
        assert all(torch.equal(x.grad, g) for x, g in zip(levels, expected, strict=True))
        assert all(p.grad is not None for p in head.parameters())  # of the first time
    # Gradients of weights are half of the products.
    assert frozen < 0.55 * everything


@each_operator
def test_opcheck_of_a_part(operator: Callable[[], tuple[Run, int]]) -> None:
    """Fake kernels have the shapes of what is not wanted, too."""
    run, count = operator()
    calls: list[tuple[Any, Any]] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            calls.append((func, args))
            return func(*args, **(kwargs or {}))

    for first in (0, 1):
        with Record():
            run([(i + first) % 2 for i in range(count)])
    for func, args in calls:
        torch.library.opcheck(func, args)
    assert len(calls) == 2


@pytest.mark.parametrize("frozen", ["weights", "features"])
def test_compiled_code_asks_for_a_part(frozen: str) -> None:
    head = DyHead(8, 16, 2, num_groups=2)
    randomise(head)
    levels = [x.float() for x in random_pyramid(2, 8, halving_sizes(8, 8, 3))]
    if frozen == "weights":
        head.requires_grad_(False)
        levels = [x.requires_grad_() for x in levels]
    leaves = levels if frozen == "weights" else list(head.parameters())
    with backend("cpu"):
        expected = gradients(head(levels), leaves)
        torch._dynamo.reset()
        compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
        with WantedOf() as wanted:
            found = gradients(compiled(levels), leaves)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert any(0 in flags for flags in wanted.seen)
