"""Activation checkpointing of a block: its backward runs its forward again, nothing is stored."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
import torch.utils.checkpoint as checkpointing
from torch.utils import _pytree as pytree

from dyhead_cuda.backends import backend, current
from dyhead_cuda.older_torch import is_exporting

Result = TypeVar("Result")

# The last operator of a block. Its result is the input of the next block.
_LAST = ("dyhead.fuse_branches_fwd.default", "dyhead.dynamic_relu_fwd.default")


# torch 2.4 has no policies: there a compiled model keeps nothing, and computes all blocks at once.
_POLICY: Any = getattr(checkpointing, "CheckpointPolicy", None)


def _policy(_context: Any, operator: Any, *_: Any, **__: Any) -> Any:
    return _POLICY.MUST_SAVE if str(operator) in _LAST else _POLICY.PREFER_RECOMPUTE


# What torch.compile has traced is one graph. Unless it keeps the result of each block, it computes
# all blocks again at once, which takes as much memory as keeping everything.
_KEEP_THE_LAST: dict[str, Any] = (
    {}
    if _POLICY is None
    else {"context_fn": partial(checkpointing.create_selective_checkpoint_contexts, _policy)}
)


def recomputed(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call ``function(*arguments)`` and keep only the arguments for the backward.

    The backward calls ``function`` again, with the same backend and autocast settings. Without
    gradients, in ``torch.export`` and inside transforms of torch.func this is a plain call.

    Args:
        function: deterministic.
        arguments: all tensors that ``function`` reads, in any nest of tuples, lists and dicts. It
            must not read others, from a module for example: they may have changed by the backward.

    Returns:
        What ``function`` returns.
    """
    compiling = torch.compiler.is_dynamo_compiling()  # under which is_exporting is always true
    if not torch.is_grad_enabled() or (is_exporting() and not compiling):
        return function(*arguments)
    if not compiling and torch._C._are_functorch_transforms_active():
        return function(*arguments)  # they have no hooks on saved tensors
    # checkpoint keeps tensors that are arguments themselves, and checks them for in-place writes.
    leaves, structure = pytree.tree_flatten(arguments)
    requested = current()

    def run(*leaves: Any) -> Result:
        with nullcontext() if compiling else backend(requested):
            return function(*pytree.tree_unflatten(leaves, structure))

    return checkpointing.checkpoint(
        run,
        *leaves,
        use_reentrant=False,
        preserve_rng_state=False,
        **(_KEEP_THE_LAST if compiling else {}),
    )
