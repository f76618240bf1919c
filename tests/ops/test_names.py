"""What graphs and profilers call the operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad

from dyhead_cuda import DyHead, DynamicReLU, ModulatedDeformConv2d, UnifiedDyHead
from dyhead_cuda.ops.transforms import node_name
from tests.helpers.devices import needs_cpu_library
from tests.helpers.inputs import halving_sizes, random_pyramid
from tests.helpers.modules import as_list
from tests.helpers.profiles import profile

OPERATORS = ["OffsetDeformConv", "BlockCoefficients", "FuseBranches", "PackLevels", "UnpackLevels"]

pytestmark = needs_cpu_library


def loss_of(outs: Any) -> Tensor:
    return torch.stack([x.sum() for x in as_list(outs)]).sum()


def pyramid() -> list[Tensor]:
    levels = random_pyramid(1, 8, halving_sizes(6, 5, 3), torch.float32)
    return [x.requires_grad_() for x in levels]


def rows_of(function: Callable[[], Any]) -> set[str]:
    """The names of the rows that a profiler shows."""
    with profile() as profiled:
        function()
    return {event.name for event in profiled.events()}


def nodes_of(out: Tensor) -> Iterator[Any]:
    """The nodes of the graph behind a tensor."""
    seen, left = set(), [out.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [following for following, _ in node.next_functions]
            yield node


def test_names_are_formed_as_those_of_pytorch() -> None:
    assert node_name("deform_conv_fwd") == "DyHeadDeformConvBackward"
    assert node_name("deform_conv_bwd") == "DyHeadDeformConvBackwardBackward"
    assert node_name("pack_levels") == "DyHeadPackLevelsBackward"


def test_rows_of_a_profiler() -> None:
    head = DyHead(8, 16, 1)

    def step() -> None:
        loss_of(head(pyramid())).backward()

    rows = rows_of(step)
    for operator in OPERATORS:
        assert {f"DyHead{operator}", f"DyHead{operator}Backward"} <= rows
    assert {"dyhead::offset_deform_conv_fwd", "dyhead::offset_deform_conv_bwd"} <= rows
    assert not [name for name in rows if "GeneratedBackwardFor" in name]


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: DyHead(8, 16, 1)(pyramid())[0], "DyHeadUnpackLevelsBackward"),
        (lambda: UnifiedDyHead(3, 8, 1)(pyramid()), "DyHeadDynamicReluBackward"),
        (lambda: DynamicReLU(8)(pyramid()[0]), "DyHeadDynamicReluBackward"),
        (
            lambda: ModulatedDeformConv2d(8, 8, 1)(pyramid()[0], torch.zeros(1, 2, 6, 5)),
            "DyHeadDeformConvBackward",
        ),
    ],
)
def test_nodes_of_a_graph(make: Callable[[], Tensor], name: str) -> None:
    out = make()  # kept, as the nodes are
    nodes = list(nodes_of(out))
    assert name in {node.name() for node in nodes}
    assert not [node for node in nodes if "GeneratedBackwardFor" in node.name()]
    assert name in {type(node).__name__ for node in nodes}  # what drawings of graphs show


def test_the_node_of_a_backward_operator() -> None:
    x = pyramid()[0]
    (found,) = torch.autograd.grad(DynamicReLU(8)(x).sum(), x, create_graph=True)
    assert "DyHeadDynamicReluBackwardBackward" in {node.name() for node in nodes_of(found)}


def test_under_a_transform() -> None:
    relu, x = DynamicReLU(8), pyramid()[0].detach()
    rows = rows_of(lambda: grad(lambda y: relu(y).sum())(x))
    ours = {name for name in rows if "Relu" in name}
    assert {"DyHeadDynamicRelu", "DyHeadDynamicReluGeneratedBackward"} <= ours
    assert not [name for name in rows if "Transformed" in name]
