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

# The last operator of a block: its result is what goes into the next one.
_LAST = ("dyhead.fuse_branches_fwd.default", "dyhead.dynamic_relu_fwd.default")


def _policy(_context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    last = str(operator) in _LAST
    return CheckpointPolicy.MUST_SAVE if last else CheckpointPolicy.PREFER_RECOMPUTE


# What torch.compile has traced is one graph, in which it would run all blocks again at once: a
# block's outputs are views, and views are not what its partitioner keeps.
_keep_the_last = partial(create_selective_checkpoint_contexts, _policy)


def recomputed(function: Callable[..., Result], *arguments: Any) -> Result:
    """``function(*arguments)``, of which only the arguments are kept for the backward.

    The backward calls ``function`` once more, with the backend and autocast that were in force.
    Without gradients, and in ``torch.export``, this is a plain call.

    Args:
        function: of tensors in any nest of tuples, lists and dicts; deterministic.
        arguments: all tensors that ``function`` reads. Those that it found elsewhere, in a module
            for one, could be others by then.
    """
    compiling = torch.compiler.is_dynamo_compiling()  # under which is_exporting is always true
    if not torch.is_grad_enabled() or (torch.compiler.is_exporting() and not compiling):
        return function(*arguments)
    # Only tensors that are arguments themselves are saved (and checked for writes in place).
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
