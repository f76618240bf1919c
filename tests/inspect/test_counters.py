"""What other FLOP counters are given: each is imitated in a few lines, as none is installed.

thop and ptflops put hooks on the modules they have a function for, and do not look inside those;
ptflops' second backend sees operators, and fvcore the nodes of a traced graph. The numbers are
those of FlopCounterMode, which counts a multiplication and an addition as two.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dyhead_cuda import (
    DyHead,
    DynamicReLU,
    ModulatedDeformConv2d,
    UnifiedDyHead,
    functional,
)
from dyhead_cuda.inspect import counters
from tests.helpers.devices import needs_cpu_library
from tests.helpers.inputs import halving_sizes, random_pyramid
from tests.helpers.modules import MODULES

pytestmark = needs_cpu_library
each_module = pytest.mark.parametrize("name", MODULES)


def expected(module: nn.Module, inputs: tuple[Any, ...]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*inputs)
    return counter.get_total_flops() // 2


def plain_layer(module: nn.Module, inputs: Any, out: Tensor) -> int:
    """The multiply-adds of nn.Linear and nn.Conv2d."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return out.numel() * weight[0].numel()


class HookCounter:
    """Counts by forward hooks, as thop (a buffer of each module) or ptflops (an int) does.

    Args:
        attribute: of the modules, where the counts are.
        zero: what it is before.
        ops: functions for classes of modules.
    """

    def __init__(
        self, attribute: str, zero: Callable[[], Any], ops: dict[type[nn.Module], Any]
    ) -> None:
        def layer(module: nn.Module, inputs: Any, out: Tensor) -> None:
            count = getattr(module, attribute) + plain_layer(module, inputs, out)
            setattr(module, attribute, count)

        layer.__module__ = "thop.vision.basic_hooks"
        self.attribute, self.zero = attribute, zero
        self.ops = {nn.Linear: layer, nn.Conv2d: layer, **ops}

    def count(self, module: nn.Module, inputs: tuple[Any, ...]) -> int:
        handles = []
        for part in module.modules():
            setattr(part, self.attribute, self.zero())
            if type(part) in self.ops:
                handles.append(part.register_forward_hook(self.ops[type(part)]))
        with torch.no_grad():
            module(*inputs)
        for handle in handles:
            handle.remove()
        return self.total(module)

    def total(self, module: nn.Module) -> int:
        """A module with a function stands for all inside it."""
        if type(module) in self.ops:
            return int(getattr(module, self.attribute))
        return sum(self.total(child) for child in module.children())


def thop(ops: dict[type[nn.Module], Any]) -> HookCounter:
    return HookCounter("total_ops", lambda: torch.zeros(1, dtype=torch.float64), ops)


def ptflops(ops: dict[type[nn.Module], Any]) -> HookCounter:
    return HookCounter("__flops__", int, ops)


@each_module
@pytest.mark.parametrize(
    ("counter", "ops"),
    [(thop, counters.thop_ops), (ptflops, counters.ptflops_hooks)],
    ids=["thop", "ptflops"],
)
def test_hooks_for_modules(name: str, counter: Any, ops: Any) -> None:
    make, make_inputs = MODULES[name]
    module, inputs = make(), make_inputs()
    for _ in range(2):  # the functions keep nothing from one count to the next
        assert counter(ops()).count(module, inputs) == expected(module, inputs)


def test_a_module_that_is_called_twice() -> None:
    head = UnifiedDyHead(3, 8, 1)
    features = torch.randn(1, 3, 8, 4, 5)
    twice = nn.Sequential(head, head)
    once = expected(head, (features,))
    assert expected(twice, (features,)) == 2 * once
    assert thop(counters.thop_ops()).count(twice, (features,)) == 2 * once


class OperatorCounter(TorchDispatchMode):
    """Counts with a function of each operator, as ptflops' backend "aten" does."""

    def __init__(self, hooks: dict[Any, Callable[..., int]]) -> None:
        super().__init__()
        self.hooks, self.total = hooks, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in self.hooks:
            outputs = out if isinstance(out, tuple) else (out,)
            self.total += self.hooks[func._overloadpacket](args, outputs)
        return out


def test_hooks_for_operators() -> None:
    head = DyHead(4, 16, 2)
    features = random_pyramid(2, 4, halving_sizes(7, 6, 3), torch.float32)
    with torch.no_grad(), OperatorCounter(counters.ptflops_hooks("aten")) as counter:
        head(features)
    assert counter.total == expected(head, (features,))


def test_an_unknown_backend_of_ptflops() -> None:
    with pytest.raises(ValueError, match="pytorch"):
        counters.ptflops_hooks("jit")


class Functional(nn.Module):
    """A block on its parameters, whose inner modules no tracer puts hooks on."""

    def __init__(self) -> None:
        super().__init__()
        head = DyHead(4, 16, 1).requires_grad_(False)
        self.parameters_of_block = head.blocks[0].parameters_tuple()  # type: ignore[operator]

    def forward(self, *levels: Tensor) -> list[Tensor]:
        return functional.pyramid_block(levels, self.parameters_of_block)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["fused", "ModulatedDeformConv2d", "DynamicReLU"])
def test_nodes_of_a_traced_graph(kind: str) -> None:
    if kind == "fused":
        module: nn.Module = Functional()
        inputs: tuple[Any, ...] = tuple(random_pyramid(2, 4, halving_sizes(7, 6, 3), torch.float32))
    else:
        make, make_inputs = MODULES[kind]
        module, inputs = make(), make_inputs()
    with torch.no_grad():
        # What fvcore calls.
        graph, _ = torch.jit._get_trace_graph(module, inputs)
    handles, total, seen = counters.fvcore_handles(), 0, set()
    for node in graph.nodes():
        if node.kind().startswith(("dyhead::", "prim::CallFunction")):
            handle = handles[node.kind()]
            seen.add(node.kind())
            if handle is not None:
                total += handle(list(node.inputs()), list(node.outputs()))
    assert total == expected(module, inputs)
    if kind == "fused":
        assert "dyhead::block_coefficients_fwd" in seen


# --- counters that miss the head --------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (lambda: DyHead(4, 16, 1), MODULES["DyHead"][1]),
        (lambda: UnifiedDyHead(3, 8, 1), MODULES["UnifiedDyHead"][1]),
    ],
    ids=["DyHead", "UnifiedDyHead"],
)
def test_a_counter_without_our_functions_is_named(
    make: Any, inputs: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "dyhead_cuda"):
        thop(counters.thop_ops()).count(make(), inputs())
        assert "as zero" not in caplog.text
        thop({}).count(make(), inputs())
    assert "thop counts its deformable convolutions as zero" in caplog.text
    assert "thop_ops()" in caplog.text


def test_nothing_is_said_where_nothing_is_missed(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "dyhead_cuda"):
        thop({}).count(DynamicReLU(8), (torch.randn(1, 8, 4, 4),))
        ModulatedDeformConv2d(4, 4, 1)(torch.randn(1, 4, 3, 3), torch.zeros(1, 2, 3, 3))
    assert "as zero" not in caplog.text
