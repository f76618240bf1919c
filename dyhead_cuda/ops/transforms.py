"""The operators under the transforms of :mod:`torch.func`: grad, vjp, jacrev and vmap.

``torch.library.register_autograd`` serves ordinary autograd only. Under a transform an operator
goes through a :class:`torch.autograd.Function`, which has rules for both, with the same formulas.
Under vmap the batch becomes part of the images where it can; see :mod:`dyhead_cuda.ops.folding`.

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
from dyhead_cuda.ops.folding import Batched


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
        if isinstance(gradient, (list, tuple)):
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
        needs = ctx.needs_input_grad
        # As register_autograd has it: in the structure of the operator's arguments.
        ctx.needs_input_grad = pytree.tree_unflatten(list(needs[2:]), ctx.structure)
        try:
            gradients = ctx.formula.backward(ctx, *([grads] if ctx.returns_list else grads))
        finally:
            ctx.needs_input_grad = needs
        if not isinstance(gradients, tuple):
            gradients = (gradients,)
        arguments = pytree.tree_unflatten(range(ctx.leaves), ctx.structure)
        return (None, None, *_flat(gradients, arguments))

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], name: str, structure: Any, *leaves: Any
    ) -> tuple[Any, Any]:
        names = [a.name for a in getattr(torch.ops.dyhead, name).default._schema.arguments]

        def by_name(values: Sequence[Any]) -> dict[str, Any]:
            return dict(zip(names, pytree.tree_unflatten(values, structure), strict=True))

        def run(arguments: dict[str, Any]) -> Any:
            flat, others = pytree.tree_flatten(tuple(arguments[key] for key in names))
            return _functions[name].apply(name, others, *flat)

        batched = Batched(name, by_name(leaves), by_name(in_dims[2:]), info.batch_size, run)
        results = batched.results()
        return results, 0 if isinstance(results, Tensor) else (0,) * len(results)
