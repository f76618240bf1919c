"""torch.compile: one graph serves all image sizes and batches."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch.utils import _pytree as pytree

import dyhead_cuda
from dyhead_cuda import compat
from tests.helpers.compare import assert_close, assert_gradients_close, gradients
from tests.helpers.inputs import halving_sizes
from tests.helpers.published import mmdet

# Heights and widths of the finest level. The first has no side in common with channels and batches:
# torch.compile takes what is equal in the first call for equal always.
SIZES = [
    (15, 22), (18, 26), (20, 30), (22, 22), (14, 25), (25, 38), (17, 17), (31, 21), (24, 40),
    (19, 33), (26, 26), (17, 35), (23, 29), (28, 37),
]  # fmt: skip
CHANNELS = 16

Inputs = tuple[Any, ...]


def batch(call: int) -> int:
    return 2 + call % 3


def pyramid(call: int) -> Inputs:
    source = torch.Generator().manual_seed(call)
    sizes = halving_sizes(*SIZES[call], 3)
    shapes = [(batch(call), CHANNELS, *size) for size in sizes]
    return ([torch.randn(shape, generator=source) for shape in shapes],)


def stacked(call: int) -> Inputs:
    source = torch.Generator().manual_seed(call)
    return (torch.randn(batch(call), 3, CHANNELS, *SIZES[call], generator=source),)


def convolution(call: int) -> Inputs:
    source = torch.Generator().manual_seed(call)
    n, size = batch(call), SIZES[call]
    return tuple(torch.randn(n, c, *size, generator=source) for c in (CHANNELS, 18, 9))


def head() -> nn.Module:
    return dyhead_cuda.DyHead(CHANNELS, CHANNELS, 1, num_groups=4)


def accelerated() -> nn.Module:
    return compat.accelerate(mmdet.DyHead(CHANNELS, CHANNELS, 1, zero_init_offset=False))


def unified() -> nn.Module:
    return dyhead_cuda.UnifiedDyHead(3, CHANNELS, 1)


def conv() -> nn.Module:
    return dyhead_cuda.ModulatedDeformConv2d(CHANNELS, CHANNELS, 3, padding=1)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Inputs]]] = {
    "DyHead": (head, pyramid),
    "accelerated": (accelerated, pyramid),
    "UnifiedDyHead": (unified, stacked),
    "ModulatedDeformConv2d": (conv, convolution),
}


def tensors_of(nest: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(nest) if isinstance(leaf, Tensor)]


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Recording:
    """A backend that runs what is traced as it is, and keeps the last graph."""

    def __init__(self) -> None:
        self.graph = torch.fx.GraphModule(nn.Module(), torch.fx.Graph())

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        self.graph = graph
        return aot_eager(graph, inputs)


@pytest.mark.parametrize(
    ("dynamic", "graphs"), [(True, 2), (None, 3)], ids=["dynamic", "automatic"]
)
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", CASES)
def test_one_graph_serves_all_sizes(
    name: str, training: bool, dynamic: bool | None, graphs: int
) -> None:
    make, inputs_of = CASES[name]
    torch.manual_seed(0)
    model = make()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for call in range(len(SIZES)):
        inputs = inputs_of(call)
        leaves = tensors_of(inputs) if training and call % 5 == 0 else []
        for x in leaves:
            x.requires_grad_()
        with torch.set_grad_enabled(training):
            actual, expected = (tensors_of(run(*inputs)) for run in (compiled, model))
        assert_close(actual, expected, torch.float32)
        if leaves:
            wanted = [*leaves, *model.parameters()]
            found, right = (gradients(outs, wanted) for outs in (actual, expected))
            assert_gradients_close(found, right, torch.float32)
    compiled_frames = _debug_get_cache_entry_list(type(model).forward.__code__)
    assert 1 <= len(compiled_frames) <= graphs  # with fullgraph each has one graph


def test_a_block_is_a_small_group_of_nodes() -> None:
    counts = []
    for blocks in (1, 2):
        backend = Recording()
        model = dyhead_cuda.DyHead(CHANNELS, CHANNELS, blocks, num_groups=4)
        torch.compile(model, fullgraph=True, dynamic=True, backend=backend)(*pyramid(0))
        counts.append(sum(node.op.startswith("call") for node in backend.graph.graph.nodes))
        torch._dynamo.reset()
    # Three operators, and what takes their results apart.
    assert counts[1] - counts[0] <= 11, counts


@pytest.mark.parametrize("container", [dict, OrderedDict])
def test_a_detector_hands_its_levels_on_in_a_dictionary(container: type) -> None:
    head = dyhead_cuda.DyHead(CHANNELS, CHANNELS, 1).requires_grad_(False)
    (levels,) = pyramid(0)

    def detector(levels: list[Tensor]) -> list[Tensor]:
        return list(head(container(zip("abc", levels, strict=True))).values())

    compiled = torch.compile(detector, backend=aot_eager, fullgraph=True)
    assert_close(compiled(levels), head(levels), torch.float32)
