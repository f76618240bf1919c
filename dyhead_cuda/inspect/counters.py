"""What other packages' FLOP counters need to count a head: a table of functions for each of them.

``torch.utils.flop_counter.FlopCounterMode`` needs nothing: it knows the operators as soon as
``dyhead_cuda`` is imported. The counters here know PyTorch's own modules or operators only and
count everything else as zero. Each function returns what one of them takes; none of the packages
is imported. They count a multiplication and an addition as one, ``FlopCounterMode`` as two.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dyhead_cuda import checks, library
from dyhead_cuda.modules import DeformBranch, ModulatedDeformConv2d
from dyhead_cuda.modules.unified import UnifiedDyHeadBlock
from dyhead_cuda.ops.flops import MULTIPLY_ADDS, WITHOUT_PRODUCTS, multiply_adds

logger = logging.getLogger("dyhead_cuda")

ModuleHook = Callable[[nn.Module, Any, Tensor], None]
Handle = Callable[[Sequence[Any], Sequence[Any]], int]


def _own(module: nn.Module, out: Tensor) -> int:
    """The multiply-adds of a module's own deformable convolution, without its inner modules."""
    if isinstance(module, UnifiedDyHeadBlock):
        return out.numel() * module.spatial_weight[:, 0].numel()  # [L, C_out, C, 3, 3]
    weight = module.weight
    assert isinstance(weight, Tensor)
    return out.numel() * weight[0].numel()  # [C_out, C_in / groups, kh, kw]


def _hooks(counter: str) -> dict[type[nn.Module], ModuleHook]:
    """Forward hooks that add to the attribute ``counter`` of a module.

    Where a counter has a function for a module, it does not look at the modules inside. So their
    counts move to this one.
    """

    def count(module: nn.Module, inputs: Any, out: Tensor) -> None:
        found = _own(module, out)
        for inner in module.modules():
            if inner is not module and hasattr(inner, counter):
                found += int(getattr(inner, counter))
                setattr(inner, counter, getattr(inner, counter) * 0)
        setattr(module, counter, getattr(module, counter) + found)

    return dict.fromkeys((DeformBranch, ModulatedDeformConv2d, UnifiedDyHeadBlock), count)


def thop_ops() -> dict[type[nn.Module], ModuleHook]:
    """What ``thop.profile`` takes as ``custom_ops``.

    Returns:
        A function for each class of modules that convolves by itself.

    Example:
        >>> import dyhead_cuda
        >>> from dyhead_cuda.inspect import counters
        >>> head = dyhead_cuda.DyHead(8, 16, num_blocks=1)
        >>> ops = counters.thop_ops()
        >>> # macs, parameters = thop.profile(head, inputs=(levels,), custom_ops=ops)
        >>> sorted(type_.__name__ for type_ in ops)
        ['DeformBranch', 'ModulatedDeformConv2d', 'UnifiedDyHeadBlock']
    """
    return _hooks("total_ops")


def ptflops_hooks(backend: str = "pytorch") -> dict[Any, Callable[..., Any]]:
    """What ``ptflops.get_model_complexity_info`` takes as ``custom_modules_hooks``.

    Args:
        backend: the one of ptflops that is to count: "pytorch", which calls functions for modules,
            or "aten", which sees operators.

    Returns:
        For "pytorch" a function for each class of modules that convolves by itself, for "aten" one
        for each compiled operator.

    Raises:
        ValueError: another backend.

    Example:
        >>> from dyhead_cuda.inspect import counters
        >>> hooks = counters.ptflops_hooks()
        >>> # get_model_complexity_info(head, (8, 64, 64), input_constructor=...,
        >>> #                           custom_modules_hooks=hooks)
        >>> len(hooks)
        3
    """
    checks.one_of("backend", backend, ("pytorch", "aten"))
    if backend == "pytorch":
        return {**_hooks("__flops__")}
    if not library.loaded("cpu"):
        return {}  # the reference runs, whose operators are PyTorch's

    def hook(name: str) -> Callable[..., int]:
        def count(arguments: Sequence[Any], outputs: tuple[Any, ...]) -> int:
            return multiply_adds(name, arguments, outputs)

        return count

    return {getattr(torch.ops.dyhead, name): hook(name) for name in MULTIPLY_ADDS}


def _of_trace(value: Any) -> Any:
    """A value of a traced graph: the shape of a tensor, a constant, a list of those, or None."""
    if value.isCompleteTensor():
        return tuple(value.type().sizes())
    if value.node().kind() == "prim::ListConstruct":
        return [_of_trace(item) for item in value.node().inputs()]
    return value.toIValue()


def fvcore_handles() -> dict[str, Handle | None]:
    """What ``fvcore.nn.FlopCountAnalysis`` takes by ``set_op_handle``.

    Returns:
        A function for each compiled operator, by its name; None for those that multiply nothing.

    Example:
        >>> from dyhead_cuda.inspect import counters
        >>> handles = counters.fvcore_handles()
        >>> # FlopCountAnalysis(head, (levels,)).set_op_handle(**handles).total()
        >>> "dyhead::deform_conv_fwd" in handles
        True
    """

    def handle(name: str) -> Handle:
        def count(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
            return multiply_adds(
                name, [_of_trace(x) for x in inputs], [_of_trace(x) for x in outputs]
            )

        return count

    handles: dict[str, Handle | None] = {f"dyhead::{name}": handle(name) for name in MULTIPLY_ADDS}
    without = {f"dyhead::{name}": None for name in WITHOUT_PRODUCTS}
    return {**handles, **without, "prim::CallFunction": _scripted_function}


def _scripted_function(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """A call of a function of :mod:`dyhead_cuda.ops.scripted`, which calls one operator."""
    name = inputs[0].node().s("name").removeprefix("_")
    if name not in MULTIPLY_ADDS:
        if name not in WITHOUT_PRODUCTS:
            logger.warning("The operations of the scripted function %s are not counted", name)
        return 0
    (whole,) = outputs
    (taken,) = (use.user for use in whole.uses() if use.user.kind() == "prim::TupleUnpack")
    results = [_of_trace(x) for x in taken.outputs()]
    return multiply_adds(name, [_of_trace(x) for x in inputs[1:]], results)
