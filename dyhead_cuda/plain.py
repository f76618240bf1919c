"""Whether a module is as its class made it, so that its parameters alone say what it computes.

The fused kernels read the parameters of the modules inside a block and never call those modules.
Hooks, adapters, pruning and quantisation act when a module is called, so a block whose inner
modules have any of these must call them; see :mod:`dyhead_cuda.unfused`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from dyhead_cuda.backends import current

_log = logging.getLogger("dyhead_cuda")
_said: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()  # what the log has about a module


class Kind(NamedTuple):
    """What a module must be for the kernels to read its parameters."""

    type: type[nn.Module]
    forward: Callable[..., Any]  # the class's, in case somebody replaces it there
    settings: dict[str, Any]  # attributes that the kernels take for granted
    parameters: tuple[str, ...]  # those that must be there


def kind(
    type_: type[nn.Module], parameters: tuple[str, ...] = ("weight", "bias"), **settings: Any
) -> Kind:
    """The kind of an unchanged module of this class."""
    return Kind(type_, type_.forward, settings, parameters)


def hooks_everywhere() -> str | None:
    """The reason to call every module: hooks for all modules of the process, or None."""
    if (
        torch_module._global_forward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_backward_pre_hooks
        or torch_module._global_backward_hooks
    ):
        return "hooks are registered for all modules of the process"
    return None


def why_called(module: nn.Module) -> str | None:
    """What makes calling ``module`` differ from calling its class's forward, or None."""
    state = module.__dict__
    if (
        state["_forward_pre_hooks"]
        or state["_forward_hooks"]
        or state["_backward_pre_hooks"]
        or state["_backward_hooks"]
    ):
        return "has hooks (pruning and the old weight_norm and spectral_norm are hooks, too)"
    if "forward" in state:
        return "has a forward of its own"
    return None


def why_not_plain(module: nn.Module, expected: Kind) -> str | None:
    """Why the kernels may not read the parameters of ``module`` instead of calling it, or None.

    Parametrizations (:mod:`torch.nn.utils.parametrize`) are no reason: they act where a weight is
    read. The class that they make has ``expected`` as its only base.
    """
    type_, forward, settings, parameters = expected
    found = type(module)
    if found is not type_ and not (
        found.__bases__ == (type_,) and "parametrizations" in module._modules
    ):
        return f"is a {found.__module__}.{found.__qualname__}, not a {type_.__name__}"
    state = module.__dict__
    if (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
    ):
        return why_called(module)
    if found.forward is not forward:
        return f"has a forward that replaced the one of {type_.__name__}"
    for name in settings:
        if state[name] != settings[name]:
            return f"has {name}={state[name]!r}, not {settings[name]!r}"
    there = state["_parameters"]
    for name in parameters:
        # A parametrized one is not among the parameters, and its attribute is costly to read.
        if there.get(name, there) is None:
            return f"has no {name}"
    return None


def first_reason(parts: Iterable[tuple[str, Any, Kind]]) -> str | None:
    """The first reason among named modules, with the name, or None if all are plain."""
    for name, module, expected in parts:
        reason = why_not_plain(module, expected)
        if reason is not None:
            return f"{name} {reason}"
    return None


_MODULE_BY_MODULE = "runs module by module, with the same numbers but slower"

_OUR_HOOKS = "dyhead_cuda.inspect.counters"
# FLOP counters that put hooks on modules, and how they come to count deformable convolutions.
_COUNTERS = {
    "thop": f"pass custom_ops={_OUR_HOOKS}.thop_ops()",
    "ptflops": f"pass custom_modules_hooks={_OUR_HOOKS}.ptflops_hooks()",
    "torchinfo": "it cannot be told; use torch.utils.flop_counter.FlopCounterMode",
}


def say_once(module: nn.Module, label: str, reason: str, instead: str = _MODULE_BY_MODULE) -> bool:
    """Log that a module is not fused, once for each reason; the reference fuses nothing.

    Args:
        module: which it is.
        label: what the log calls it.
        reason: why.
        instead: what it does.

    Returns:
        Whether it was logged now.
    """
    if torch.compiler.is_compiling() or current() == "reference" or _said.get(module) == reason:
        return False
    _said[module] = reason
    _log.warning("%s is not fused and %s: %s", label, instead, reason)
    return True


def say_uncounted(module: nn.Module, label: str) -> None:
    """Log that a FLOP counter, seen by its hooks, misses the module's deformable convolutions."""
    hooks = [hook for part in module.modules() for hook in part._forward_hooks.values()]
    origins = [getattr(hook, "__module__", None) or "" for hook in hooks]
    if _OUR_HOOKS in origins:
        return
    for counter, advice in _COUNTERS.items():
        if any(origin.partition(".")[0] == counter for origin in origins):
            _log.warning(
                "%s: %s counts its deformable convolutions as zero; %s", label, counter, advice
            )
