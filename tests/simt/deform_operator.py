"""The emulated deform_conv as tests call it, and its checks against the reference in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dyhead_cuda.ops.common import compute_dtype
from dyhead_cuda.ops.jobs import Plan
from tests.helpers.compare import (
    assert_close,
    assert_gradients_close,
    leaf,
    random_like,
    relative_l2,
)
from tests.helpers.deform_work import (
    Call,
)

from .arithmetic import TF32_TOLERANCE
from .arrays import name_of, to_array, to_tensor


@dataclass(frozen=True)
class Operator:
    """The emulated operator, on a device of some size."""

    simt: Any
    allow_tf32: bool = False
    processors: int = 4
    shared_bytes: int = 227 * 1024
    wgmma: bool = False
    far: int = 0  # row of all matrices at which the forward's rows start

    def device(self) -> Any:
        return self.simt.deform_conv.DeviceLimits(self.processors, self.shared_bytes, self.wgmma)

    def forward(
        self,
        plan: Plan,
        tensors: dict[str, Tensor],
        *,
        out_in_compute_dtype: bool = False,
        moments: bool = False,
    ) -> list[Tensor]:
        source, weights = tensors["source"], tensors["weights"]
        results = self.simt.deform_conv.forward(
            name_of(source.dtype),
            to_array(source),
            to_array(tensors["predictions"]),
            [to_array(w) for w in weights],
            [to_array(b) for b in tensors.get("bias", ())],
            name_of(weights.dtype),
            to_array(tensors["gates"]) if "gates" in tensors else None,
            plan.tables,
            plan.mask_logits,
            out_in_compute_dtype,
            moments,
            allow_tf32=self.allow_tf32,
            far=self.far,
            device=self.device(),
        )
        out_dtype = compute_dtype(source.dtype) if out_in_compute_dtype else source.dtype
        names = ("mean", "var", "up_mean") if moments else ()
        return [
            to_tensor(results["out"], out_dtype),
            *(to_tensor(results[n], out_dtype) for n in names),
        ]

    def backward(
        self,
        plan: Plan,
        tensors: dict[str, Tensor],
        results: Sequence[Tensor],
        grads: Sequence[Tensor],
        *,
        out_in_compute_dtype: bool = False,
        deterministic: bool = False,
        with_source: bool = True,
        with_predictions: bool = True,
    ) -> dict[str, Tensor]:
        """Of all but the weights, from what the forward returned and the gradients of that."""
        source, weights = tensors["source"], tensors["weights"]
        out = results[0]
        mean = results[1] if len(results) > 1 else out.new_zeros(0)
        gradients = self.simt.deform_conv.backward(
            name_of(source.dtype),
            to_array(grads[0]),
            [to_array(g) for g in grads[1:]] if len(grads) > 1 else None,
            to_array(source),
            to_array(tensors["predictions"]),
            [to_array(w) for w in weights],
            name_of(weights.dtype),
            to_array(tensors["gates"]) if "gates" in tensors else None,
            to_array(out),
            to_array(mean),
            plan.tables,
            plan.mask_logits,
            out_in_compute_dtype,
            with_bias="bias" in tensors,
            allow_tf32=self.allow_tf32,
            deterministic=deterministic,
            with_source=with_source,
            with_predictions=with_predictions,
            device=self.device(),
        )
        del gradients["rows"]  # what the gradient of the weights starts from
        return {name: to_tensor(array, source.dtype) for name, array in gradients.items()}

    def run(self, work: Call, tensors: dict[str, Tensor]) -> list[Tensor]:
        return self.forward(
            work.plan, tensors, out_in_compute_dtype=work.out_in_compute_dtype, moments=work.moments
        )


def check(work: Call, dtype: torch.dtype, operator: Operator) -> None:
    tensors = work.tensors(dtype)
    expected = work.reference(tensors)
    actual = operator.run(work, tensors)
    if work.images == 0:
        assert [t.shape for t in actual] == [t.shape for t in expected]
    elif operator.allow_tf32:
        assert all(
            relative_l2(a, e) < TF32_TOLERANCE for a, e in zip(actual, expected, strict=True)
        )
    else:
        assert_close(actual, expected, dtype)


def check_backward(
    work: Call, dtype: torch.dtype, operator: Operator, *, deterministic: bool = False
) -> dict[str, Tensor]:
    tensors = work.tensors(dtype)
    results = [t.detach() for t in operator.run(work, tensors)]
    cotangents = [
        g.to(dtype).to(t.dtype) for g, t in zip(random_like(*results), results, strict=True)
    ]
    actual = operator.backward(
        work.plan,
        tensors,
        results,
        cotangents,
        out_in_compute_dtype=work.out_in_compute_dtype,
        deterministic=deterministic,
    )
    names = [name for name in tensors if name != "weights"]
    assert set(actual) == set(names)
    if work.images == 0:
        assert all((g == 0).all() for g in actual.values())
        return actual
    exact = {name: leaf(t, torch.float64) for name, t in tensors.items()}
    expected = torch.autograd.grad(
        work.reference(exact), [exact[name] for name in names], [g.double() for g in cotangents]
    )
    if operator.allow_tf32:
        for name, e in zip(names, expected, strict=True):
            assert relative_l2(actual[name], e) < 2 * TF32_TOLERANCE, name
    else:
        assert_gradients_close([actual[name] for name in names], expected, dtype)
    return actual
