"""What the operators multiply: the counts that ``torch.utils.flop_counter`` and others show.

Counted are the products of convolutions and linear layers, as counters count those of PyTorch's
own layers. Not counted is what is done once per value: blending the four pixels around a sample,
biases, norms and sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import flop_registry, register_flop_formula

from dyhead_cuda import library
from dyhead_cuda.ops.jobs import JOB_FIELDS

Shape = Sequence[int]
_TERMS = JOB_FIELDS.index("terms")


class Call(NamedTuple):
    """One call of an operator, with a shape in the place of every tensor.

    Args:
        arguments: by the names in the operator's schema.
        outputs: the shapes of what it returned.
    """

    arguments: dict[str, Any]
    outputs: Sequence[Shape]


def _deform_conv(call: Call, rows: int) -> int:
    """Every row of the output has a product for each of its job's terms."""
    a = call.arguments
    terms = a["jobs"][_TERMS :: len(JOB_FIELDS)]
    if len(set(terms)) <= 1:  # of all jobs of the package; a tracer may not know the sizes
        rows_and_terms = rows * sum(terms[:1])
    else:
        sizes = a["out_sizes"]
        pixels = [height * width for height, width in zip(sizes[::2], sizes[1::2], strict=True)]
        rows_and_terms = a["images"] * sum(map(prod, zip(pixels, terms, strict=True)))
    return rows_and_terms * prod(a["weights"][0])  # [C_out, C_in / groups, kh, kw]


def _deform_conv_fwd(call: Call) -> int:
    return _deform_conv(call, call.outputs[0][0])


def _deform_conv_bwd(call: Call) -> int:
    """The samples' gradient, from which those of source, predictions and gates follow; weights'."""
    source, predictions, weights, _, gates = call.arguments["wanted"]
    products = (source or predictions or gates) + weights
    return products * _deform_conv(call, call.arguments["grad_out"][0])


def _offset_deform_conv_fwd(call: Call) -> int:
    """Every row of predictions has a product, too."""
    predictions, out, *_ = call.outputs
    offsets = predictions[0] * prod(call.arguments["offset_weight"])
    return offsets + _deform_conv(call, out[0])


def _offset_deform_conv_bwd(call: Call) -> int:
    """As deform_conv_bwd, twice; the offset convolution starts from what its readers found."""
    a = call.arguments
    source, offset_weight, offset_bias, weights, _ = a["wanted"]
    offsets = a["predictions"][0] * prod(a["offset_weight"])
    products = (source or offset_weight or offset_bias) + weights
    return (source + offset_weight) * offsets + products * _deform_conv(call, a["grad_out"][0])


def _coefficient_products(call: Call) -> tuple[int, int, int]:
    """A gate for each job, and the two layers of the dynamic ReLU for each level."""
    a = call.arguments
    _, images, channels = a["mean"]
    levels = images * (max(a["job_levels"]) + 1)
    gates = images * len(a["job_levels"]) * channels
    return gates, levels * prod(a["fc1_weight"]), levels * prod(a["fc2_weight"])


def _block_coefficients_fwd(call: Call) -> int:
    return sum(_coefficient_products(call))


def _block_coefficients_bwd(call: Call) -> int:
    """The inputs' gradients, which everything else follows from, and the weights'."""
    gates, fc1, fc2 = _coefficient_products(call)
    *_, of_gates, _, of_fc1, _, of_fc2, _ = call.arguments["wanted"]
    return gates + fc1 + fc2 + of_gates * gates + of_fc1 * fc1 + of_fc2 * fc2


def _dynamic_relu_fwd(call: Call) -> int:
    a = call.arguments
    return a["rows"][0] * (prod(a["fc1_weight"]) + prod(a["fc2_weight"]))


def _dynamic_relu_bwd(call: Call) -> int:
    """The inputs' gradients, of the first layer for the rows'; torch multiplies for weights."""
    a = call.arguments
    of_rows, _, _ = a["wanted"]
    return a["rows"][0] * (of_rows * prod(a["fc1_weight"]) + prod(a["fc2_weight"]))


MULTIPLY_ADDS: dict[str, Callable[[Call], int]] = {
    "deform_conv_fwd": _deform_conv_fwd,
    "deform_conv_bwd": _deform_conv_bwd,
    "offset_deform_conv_fwd": _offset_deform_conv_fwd,
    "offset_deform_conv_bwd": _offset_deform_conv_bwd,
    "block_coefficients_fwd": _block_coefficients_fwd,
    "block_coefficients_bwd": _block_coefficients_bwd,
    "dynamic_relu_fwd": _dynamic_relu_fwd,
    "dynamic_relu_bwd": _dynamic_relu_bwd,
}
WITHOUT_PRODUCTS = (
    "fuse_branches_fwd",
    "fuse_branches_bwd",
    "pack_levels",
    "unpack_levels",
)


def multiply_adds(name: str, arguments: Sequence[Any], outputs: Any) -> int:
    """The multiply-adds of a call of ``dyhead::name``.

    Args:
        name: of the operator, one of :data:`MULTIPLY_ADDS`.
        arguments: in the order of the schema, with tensors or their shapes.
        outputs: what it returned, likewise.

    Returns:
        A whole number; FLOP counters that count a multiplication and an addition as two have twice
        this.
    """
    names = [a.name for a in getattr(torch.ops.dyhead, name).default._schema.arguments]
    arguments, outputs = pytree.tree_map_only(
        torch.Tensor, lambda x: x.shape, (list(arguments), outputs)
    )
    return MULTIPLY_ADDS[name](Call(dict(zip(names, arguments, strict=True)), outputs))


def _flops(name: str, *arguments: Any, out_val: Any, **named: Any) -> int:
    """Two operations for each multiply-add, as ``FlopCounterMode`` calls it."""
    if named:  # the last ones, by keyword
        schema = getattr(torch.ops.dyhead, name).default._schema.arguments
        arguments += tuple(named[a.name] for a in schema[len(arguments) :])
    return 2 * multiply_adds(name, arguments, out_val)


if library.loaded("cpu"):
    for _name in MULTIPLY_ADDS:
        _operator, _formula = getattr(torch.ops.dyhead, _name), partial(_flops, _name)
        register_flop_formula(_operator, get_raw=True)(_formula)
        # torch 2.4 puts it where its counter does not look.
        flop_registry.setdefault(_operator, _formula)
