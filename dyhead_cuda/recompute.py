"""Activation checkpointing of a block: its backward runs its forward again, nothing is stored."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from dyhead_cuda.backends import backend, current

Result = TypeVar("Result")

# The last operator of a block. Its result is the input of the next block.
_LAST = ("dyhead.fuse_branches_fwd.default", "dyhead.dynamic_relu_fwd.default")


def _policy(_context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    last = str(operator) in _LAST
    return CheckpointPolicy.MUST_SAVE if last else CheckpointPolicy.PREFER_RECOMPUTE


# What torch.compile has traced is one graph. Unless it keeps the result of each block, it computes
# all blocks again at once, which takes as much memory as keeping everything.
_keep_the_last = partial(create_selective_checkpoint_contexts, _policy)


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
    if not torch.is_grad_enabled() or (torch.compiler.is_exporting() and not compiling):
        return function(*arguments)
    if not compiling and torch._C._are_functorch_transforms_active():
        return function(*arguments)  # they have no hooks on saved tensors
    # checkpoint keeps tensors that are arguments themselves, and checks them for in-place writes.
    leaves, structure = pytree.tree_flatten(arguments)
    requested = current()

    def run(*leaves: Any) -> Result:
        with nullcontext() if compiling else backend(requested):
            return function(*pytree.tree_unflatten(leaves, structure))

    return checkpoint(
        run,
        *leaves,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=_keep_the_last if compiling else noop_context_fn,
    )
