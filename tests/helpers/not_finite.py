"""NaN and infinity in the arguments of deform_conv, and results that must show them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.helpers.compare import TOLERANCE, leaf
from tests.helpers.deform_work import Work

NOT_FINITE = [math.nan, math.inf, -math.inf]
# Finite offsets beyond every border; where a type cannot hold them, its largest is taken.
FAR = [1e30, -1e30]

# Calls of deform_conv without moments, which would spread a NaN over a whole map.
CALLS = {
    "logits": Work(moments=False, channels=17),
    "masks": Work(moments=False, channels=17, mask_logits=False, with_bias=False),
    "no gates": Work(moments=False, channels=17, with_gates=False),
}
PLACES = ("features", "offset", "mask", "gate", "gradient")


def far(value: float, dtype: torch.dtype) -> float:
    """A far offset that ``dtype`` can hold."""
    return math.copysign(min(abs(value), torch.finfo(dtype).max), value)


def planted(
    tensors: dict[str, Tensor], cotangent: Tensor, place: str, value: float
) -> tuple[dict[str, Tensor], Tensor]:
    """Copies with ``value`` in one place, next to samples that far offsets put outside."""
    copies = {name: t.detach().clone() for name, t in tensors.items()}
    cotangent = cotangent.clone()
    predictions = copies["predictions"]
    # Taps 2 and 5: one far away, with and without a value of its own, in rows of several maps.
    for row in (1, -2):
        predictions[row, 4] = predictions[row + 1, 11] = 1e6
    if place == "features":
        # On a map of which the reference computes no pixel that it drops, as 0 times NaN is NaN.
        copies["source"][2, 0] = value
    elif place == "offset":
        predictions[1, 5] = predictions[-2, 10] = predictions[4, 0] = value
    elif place == "mask":
        predictions[1, 20] = predictions[-2, 23] = predictions[4, 18] = value
    elif place == "gate":
        copies["gates"][0, 0] = value
    else:
        cotangent[1, 0] = cotangent[-2, -1] = value
    return {name: leaf(t) for name, t in copies.items()}, cotangent


def assert_same_finite(
    actual: Tensor, expected: Tensor, dtype: torch.dtype, name: str = "result", factor: float = 1
) -> None:
    """The same elements are finite, and those are close."""
    finite = expected.isfinite()
    wrong = actual.isfinite() != finite
    assert not wrong.any(), f"{name}: {int(wrong.sum())} of {wrong.numel()}, {finite.sum()} finite"
    # Gradients of terms that cancel are judged by the largest.
    error = float((actual[finite].double() - expected[finite]).norm())
    norm = float(expected[finite].norm())
    assert error <= factor * TOLERANCE[dtype] * max(norm, 1e-3), (
        f"{name}: {error:.3g} of {norm:.3g}"
    )
