"""NaN and infinity in the arguments of deform_conv, and results that must show them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.helpers.compare import TOLERANCE, leaf, random_like
from tests.helpers.deform_work import GRADIENTS, Work

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
CALLS_AND_PLACES = [
    (call, place) for call in CALLS for place in PLACES if (call, place) != ("no gates", "gate")
]


def far(value: float, dtype: torch.dtype) -> float:
    """A far offset that ``dtype`` can hold."""
    return math.copysign(min(abs(value), torch.finfo(dtype).max), value)


def planted(call: Work, place: str, value: float, dtype: torch.dtype, device: str = "cpu") -> Case:
    """``value`` in one place, next to samples that far offsets put outside."""
    tensors = {name: t.detach() for name, t in call.tensors(dtype, device).items()}
    (cotangent,) = random_like(*call.reference(tensors)[:1])
    cotangent = cotangent.to(dtype).to(device)
    predictions = tensors["predictions"]
    for row in (1, -2):  # rows of different maps
        predictions[row, 4] = predictions[row + 1, 11] = 1e6
    if place == "features":
        tensors["source"][2, 0] = value
    elif place == "offset":
        predictions[1, 5] = predictions[-2, 10] = predictions[4, 0] = value
    elif place == "mask":
        predictions[1, 20] = predictions[-2, 23] = predictions[4, 18] = value
    elif place == "gate":
        tensors["gates"][0, 0] = value
    else:
        cotangent[1, 0] = cotangent[-2, -1] = value
    return Case(call, {name: leaf(t) for name, t in tensors.items()}, cotangent, dtype)


@dataclass(frozen=True)
class Case:
    """Arguments and a gradient of the output, with values that are not finite."""

    call: Work
    tensors: dict[str, Tensor]
    cotangent: Tensor
    dtype: torch.dtype

    def check(self, results: Sequence[Tensor], gradients: dict[str, Tensor]) -> None:
        """Results and gradients by name are finite where the reference's are, and close there."""
        exact = {name: leaf(t, torch.float64) for name, t in self.tensors.items()}
        expected = self.call.reference(exact)
        for a, e in zip(results, expected, strict=bool(results)):
            assert_same_finite(a, e, self.dtype)
        if not gradients:
            return
        inputs = [exact[name] for name in gradients]
        wanted = torch.autograd.grad(expected[0], inputs, self.cotangent.double())
        for (name, a), e in zip(gradients.items(), wanted, strict=True):
            # Terms that cancel may be all that is finite.
            assert_same_finite(a, e, self.dtype, name, factor=4)

    def run(self) -> None:
        """Check the library of the tensors' device."""
        results = self.call.run(self.tensors)
        names = [name for name in GRADIENTS if name in self.tensors]
        inputs = [self.tensors[name] for name in names]
        grads = torch.autograd.grad(results[0], inputs, self.cotangent.to(results[0].dtype))
        self.check(results, dict(zip(names, grads, strict=True)))


def assert_same_finite(
    actual: Tensor, expected: Tensor, dtype: torch.dtype, name: str = "result", factor: float = 1
) -> None:
    """The same elements are finite, and those are close."""
    finite = expected.isfinite()
    wrong = actual.isfinite() != finite
    assert not wrong.any(), f"{name}: {int(wrong.sum())} of {wrong.numel()}, {finite.sum()} finite"
    # Gradients of terms that cancel are judged by the largest.
    error = float((actual[finite].double() - expected[finite]).detach().norm())
    norm = float(expected[finite].detach().norm())
    assert error <= factor * TOLERANCE[dtype] * max(norm, 1e-3), (
        f"{name}: {error:.3g} of {norm:.3g}"
    )
