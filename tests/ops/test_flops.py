"""FlopCounterMode counts the products of the operators exactly, on every path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dyhead_cuda import DyHead, backend, functional
from dyhead_cuda.ops.flops import MULTIPLY_ADDS, WITHOUT_PRODUCTS, Call
from dyhead_cuda.ops.jobs import JOB_FIELDS
from tests.helpers.devices import needs_cpu_library
from tests.helpers.inputs import halving_sizes, random_pyramid
from tests.helpers.modules import MODULES, as_list
from tests.helpers.spy import calls_of_operators

pytestmark = needs_cpu_library

N, C_IN, C_OUT, HIDDEN = 2, 8, 16, 4
SIZES = halving_sizes(9, 10, 3)
PIXELS = [height * width for height, width in SIZES]
JOBS = 3 * len(SIZES) - 2  # a branch on the level itself, the finer and the coarser one
LAYERS = C_OUT * HIDDEN + HIDDEN * 4 * C_OUT


def no_hook(*_: Any) -> None:
    """Makes a block call its inner modules."""


def flops(function: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def differentiable(x: Any) -> Any:
    return [y.requires_grad_() for y in x] if isinstance(x, list) else x.requires_grad_()


def both_ways(run: Callable[[], Any]) -> tuple[int, int]:
    """The operations of a forward and of its backward."""
    outs: list[Tensor] = []
    forward = flops(lambda: outs.extend(as_list(run())))
    return forward, flops(lambda: torch.stack([x.sum() for x in outs]).sum().backward())


def call_inner(module: nn.Module) -> None:
    """Makes a module call the modules inside it."""
    for inner in module.modules():
        if inner is not module and not list(inner.children()):
            inner.register_forward_hook(no_hook)


def pyramid() -> list[Tensor]:
    return differentiable(random_pyramid(N, C_IN, SIZES, torch.float32))


def block() -> Callable[[], list[Tensor]]:
    """A block on its parameters. (The counter has hooks for all modules: it would be called.)"""
    parameters = DyHead(C_IN, C_OUT, 1).blocks[0].parameters_tuple()  # type: ignore[operator]
    return lambda: functional.pyramid_block(pyramid(), parameters)


def block_products() -> tuple[int, int]:
    """Those of convolutions, and of the small layers, by hand."""
    offsets = 27 * 9 * C_IN * sum(PIXELS)
    # Its own branch; the finer level's with stride 2; the coarser level's at its own size.
    branches = 9 * C_IN * C_OUT * (sum(PIXELS) + 2 * sum(PIXELS[1:]))
    return N * (offsets + branches), N * (JOBS * C_OUT + len(SIZES) * LAYERS)


def test_a_fused_block() -> None:
    run = block()
    assert calls_of_operators(run)["block_coefficients_fwd"] == 1
    convolutions, layers = block_products()
    forward = 2 * (convolutions + layers)
    assert both_ways(run) == (forward, 2 * forward)


def test_a_block_on_the_reference() -> None:
    """A gate there is the product of a matrix and a vector, which PyTorch does not count."""
    forward, backward = both_ways(block())
    with backend("reference"):
        found = both_ways(block())
    gates = 2 * N * JOBS * C_OUT
    assert found == (forward - gates, backward - 2 * gates)


@pytest.mark.parametrize("name", MODULES)
def test_modules_that_are_called(name: str) -> None:
    """By the operators, by inner modules and on the reference: the same work."""
    make, make_inputs = MODULES[name]
    counts = []
    for path in ("operators", "modules", "reference"):
        module = make()
        if path == "modules":
            call_inner(module)
        inputs = [differentiable(x) for x in make_inputs()]
        with backend("reference" if path == "reference" else "auto"):
            forward, backward = both_ways(lambda: module(*inputs))  # noqa: B023
        counts.append(forward)
        assert backward == 2 * forward
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            assert flops(lambda: module(*inputs)) == forward  # noqa: B023
    assert counts[0] > 0
    assert counts == counts[:1] * 3


def test_groups_are_not_counted_twice() -> None:
    x, offset = torch.randn(N, 4, 5, 6), torch.zeros(N, 2 * 2 * 6, 5, 4)
    weight, bias = torch.randn(6, 2, 3, 2), torch.randn(6)
    found = flops(lambda: functional.modulated_deform_conv2d(x, offset, weight, bias, (1, 2), 1, 1))
    assert found == 2 * N * 20 * 6 * 2 * 6


def test_the_terms_of_spatial_attention() -> None:
    levels, height, width = 3, 4, 5
    features = torch.randn(N, levels, C_IN, height, width)
    weight = torch.randn(levels, C_OUT, C_IN, 3, 3)
    offsets = torch.randn(27, C_IN, 3, 3), torch.randn(27)
    for targets, count in (("all", levels), ("median", 1)):
        found = flops(
            lambda: functional.spatial_attention(features, weight, *offsets, targets=targets)  # type: ignore[arg-type]  # noqa: B023
        )
        assert found == 2 * N * height * width * count * 9 * C_IN * (levels * C_OUT + 27)


def deform_call(terms: Sequence[int]) -> Call:
    """Two images; jobs of 3x4 and 5x6 pixels with so many terms."""
    jobs = []
    for count in terms:
        record = dict.fromkeys(JOB_FIELDS, 7)
        record["terms"] = count
        jobs += list(record.values())
    arguments = {"images": 2, "out_sizes": [3, 4, 5, 6], "jobs": jobs, "weights": [(8, 4, 3, 3)]}
    return Call(arguments, [(2 * (12 + 30), 8)])


def test_jobs_of_different_terms() -> None:
    count = MULTIPLY_ADDS["deform_conv_fwd"]
    assert count(deform_call([2, 2])) == 2 * (12 + 30) * 2 * 8 * 4 * 9
    assert count(deform_call([1, 3])) == 2 * (12 + 3 * 30) * 8 * 4 * 9


def test_arguments_by_name() -> None:
    rows, fc1, fc2 = torch.randn(N, 5, 8), torch.randn(2, 8), torch.randn(32, 2)
    biases = {"fc1_bias": torch.randn(2), "fc2_bias": torch.randn(32)}
    run = torch.ops.dyhead.dynamic_relu_fwd
    found = flops(lambda: run(rows, fc1, fc2_weight=fc2, hard_sigmoid=True, **biases))
    assert found == 2 * N * (2 * 8 + 32 * 2)


def test_on_the_meta_device() -> None:
    head = DyHead(C_IN, C_OUT, 2)
    expected = flops(lambda: head(pyramid()))
    meta = [x.to("meta") for x in pyramid()]
    assert flops(lambda: head.to("meta")(meta)) == expected


def test_the_counter_names_the_modules() -> None:
    head = DyHead(C_IN, C_OUT, 2)
    with FlopCounterMode(display=False) as counter:
        head(pyramid())
    parts = {name: sum(found.values()) for name, found in counter.get_flop_counts().items()}
    assert parts["DyHead.blocks.0"] + parts["DyHead.blocks.1"] == parts["Global"]
    assert parts["DyHead.blocks.0.mid"] == 2 * N * 9 * C_IN * C_OUT * sum(PIXELS)


def test_empty_batches_count_nothing() -> None:
    head = DyHead(C_IN, C_OUT, 1)
    assert flops(lambda: head([torch.zeros(0, C_IN, *size) for size in SIZES])) == 0
    assert flops(lambda: functional.pyramid_block(
        [torch.zeros(0, C_IN, *size) for size in SIZES],
        head.blocks[0].parameters_tuple(),  # type: ignore[operator]
    )) == 0  # fmt: skip


def test_every_operator_is_known_to_count_or_not() -> None:
    operators = {
        name.removeprefix("dyhead::").partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("dyhead::")
    }
    assert operators == {*MULTIPLY_ADDS, *WITHOUT_PRODUCTS}
