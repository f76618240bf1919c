"""Whether the modules inside an accelerated block are as they were when it was accelerated.

The fused forward reads their parameters and never calls them. What is attached later (hooks,
adapters, pruning, another class or forward) acts when a module is called, so the block then runs
the forward of its own class.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from dyhead_cuda import plain


class Inner(NamedTuple):
    """A module inside a block, and what it was when the block was accelerated."""

    path: tuple[str, ...]
    type: type[nn.Module]


# Each class with the forward that it had when the first block with it was accelerated.
_KINDS: dict[type[nn.Module], plain.Kind] = {}


def _kind(type_: type[nn.Module]) -> plain.Kind:
    return _KINDS.setdefault(type_, plain.kind(type_, ()))


def inner_modules(block: nn.Module) -> tuple[Inner, ...]:
    """All modules inside ``block``, as they are now."""
    found = tuple(
        Inner(tuple(path.split(".")), type(module))
        for path, module in block.named_modules()
        if path
    )
    for _, type_ in found:
        _kind(type_)
    return found


def why_changed(block: nn.Module, inner: tuple[Inner, ...]) -> str | None:
    """What of ``inner`` must be called now, and why, or None."""
    reason = plain.hooks_everywhere()
    if reason is not None:
        return reason
    for path, type_ in inner:
        module: Any = block
        for name in path:
            module = module._modules.get(name)
            if module is None:
                return f"{'.'.join(path)} is no longer there"
        # Each forward asks this of every module: a look at what is usual comes first.
        state, kind = module.__dict__, _KINDS.get(type_)
        if (
            kind is None
            or type(module) is not type_
            or type_.forward is not kind.forward
            or state["_forward_hooks"]
            or state["_forward_pre_hooks"]
            or state["_backward_hooks"]
            or state["_backward_pre_hooks"]
            or "forward" in state
        ):
            reason = plain.why_not_plain(module, _kind(type_))
            if reason is not None:
                return f"{'.'.join(path)} {reason}"
    return None
