"""The operators under the transforms of :mod:`torch.func`: grad, vjp, jacrev and vmap.

``torch.library.register_autograd`` serves ordinary autograd only. Under a transform an operator
goes through a :class:`torch.autograd.Function`, which has rules for both, with the same formulas.
vmap runs the operator once for each element of the batch: the kernels are told what to read by
tables of integers, which have no place for a batch dimension.

Either way a node of the graph has a readable name, such as ``DyHeadDeformConvBackward``: what
``grad_fn.name()``, a profiler's row or a picture of the graph shows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dyhead_cuda.ops import scripted


class Formula(NamedTuple):
    """What :func:`torch.library.register_autograd` takes."""

    backward: Callable[..., Any]
    setup_context: Callable[..., None] | None


_formulas: dict[str, Formula] = {}
_functions: dict[str, type[_Transformed]] = {}  # under a transform, each with a name of its own


def node_name(name: str) -> str:
    """The name of an operator's node in a graph, formed as PyTorch forms those of its own.

    ``deform_conv_fwd`` has ``DyHeadDeformConvBackward``, and ``deform_conv_bwd``
    ``DyHeadDeformConvBackwardBackward``.
    """
    words = name.removesuffix("_fwd").replace("_bwd", "_backward").split("_")
    return f"DyHead{''.join(word.capitalize() for word in words)}Backward"


def register_autograd(
    name: str,
    backward: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
) -> None:
    """Give ``dyhead::name`` its autograd formula, with and without transforms.

    Args:
        name: of the operator.
        backward: from the context and the gradients of the outputs to those of the arguments.
        setup_context: keeps what the backward needs.
    """
    _formulas[name] = Formula(backward, setup_context)
    function = node_name(name).removesuffix("Backward")
    _functions[name] = type(function, (_Transformed,), {})
    torch.library.register_autograd(f"dyhead::{name}", backward, setup_context=setup_context)
    # PyTorch has no argument for the names. The class that it made is found by the one it chose.
    for made in torch.autograd.Function.__subclasses__():
        if made.__name__ == f"GeneratedBackwardFor_dyhead_{name}_default":
            made.__name__, made._backward_cls.__name__ = function, node_name(name)


def call(name: str, *arguments: Any) -> Any:
    """``torch.ops.dyhead.name(*arguments)``, which may be inside a transform of torch.func."""
    operator = getattr(torch.ops.dyhead, name)
    if torch.compiler.is_compiling():
        return operator(*arguments)
    if torch.jit.is_tracing():
        return scripted.call(name, arguments)
    if not torch._C._are_functorch_transforms_active():
        return operator(*arguments)
    leaves, structure = pytree.tree_flatten(arguments)
    return _functions[name].apply(name, structure, *leaves)


def _flat(gradients: Sequence[Any], arguments: Sequence[Any]) -> list[Tensor | None]:
    """The gradients of arguments as those of their leaves."""
    flat: list[Tensor | None] = []
    for gradient, argument in zip(gradients, arguments, strict=True):
        if isinstance(gradient, list | tuple):
            flat += gradient
        else:
            count = len(pytree.tree_leaves(argument))
            flat += [gradient] if count == 1 else [None] * count
    return flat


class _Transformed(torch.autograd.Function):
    """An operator on the leaves of its arguments."""

    @staticmethod
    def forward(name: str, structure: pytree.TreeSpec, *leaves: Any) -> Any:
        out = getattr(torch.ops.dyhead, name)(*pytree.tree_unflatten(leaves, structure))
        return tuple(out) if isinstance(out, list) else out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        name, structure, *leaves = inputs
        ctx.formula, ctx.structure, ctx.leaves = _formulas[name], structure, len(leaves)
        (first, *_) = getattr(torch.ops.dyhead, name).default._schema.returns
        ctx.returns_list = isinstance(first.type, torch.ListType)
        if ctx.formula.setup_context is not None:
            ctx.formula.setup_context(ctx, pytree.tree_unflatten(leaves, structure), output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        gradients = ctx.formula.backward(ctx, *([grads] if ctx.returns_list else grads))
        if not isinstance(gradients, tuple):
            gradients = (gradients,)
        arguments = pytree.tree_unflatten(range(ctx.leaves), ctx.structure)
        return (None, None, *_flat(gradients, arguments))

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], name: str, structure: Any, *leaves: Any
    ) -> tuple[Any, Any]:
        dims = in_dims[2:]
        results = []
        for i in range(info.batch_size):
            parts = [
                leaf if dim is None else leaf.select(dim, i)
                for leaf, dim in zip(leaves, dims, strict=True)
            ]
            results.append(_functions[name].apply(name, structure, *parts))
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        outputs = tuple(torch.stack(group) for group in zip(*results, strict=True))
        return outputs, (0,) * len(outputs)
