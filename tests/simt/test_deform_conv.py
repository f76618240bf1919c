"""The CUDA deform_conv, compiled for the host, against the reference in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from dyhead_cuda.ops.common import compute_dtype
from dyhead_cuda.ops.deform_conv import Plan
from tests.conftest import TOLERANCE, assert_close, relative_l2
from tests.deform_work import WORKS, Work

from .test_dynamic_relu import to_tensor

dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
TF32 = 1e-3


def name_of(dtype: torch.dtype) -> str:
    return str(dtype)[6:]


def to_array(t: Tensor) -> NDArray[Any]:
    t = t.detach().contiguous()
    return t.view(torch.int16).numpy().view(np.uint16) if t.element_size() == 2 else t.numpy()


@dataclass(frozen=True)
class Operator:
    """The emulated operator, on a device of some size."""

    simt: Any
    allow_tf32: bool = False
    processors: int = 4
    shared_bytes: int = 227 * 1024

    def device(self) -> Any:
        return self.simt.deform_conv.DeviceLimits(self.processors, self.shared_bytes)

    def forward(
        self,
        plan: Plan,
        tensors: dict[str, Tensor],
        *,
        wide_out: bool = False,
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
            *plan.tables,
            plan.mask_logits,
            wide_out,
            moments,
            allow_tf32=self.allow_tf32,
            device=self.device(),
        )
        out_dtype = compute_dtype(source.dtype) if wide_out else source.dtype
        names = ("mean", "var", "up_mean") if moments else ()
        return [
            to_tensor(results["out"], out_dtype),
            *(to_tensor(results[n], out_dtype) for n in names),
        ]

    def run(self, work: Work, tensors: dict[str, Tensor]) -> list[Tensor]:
        return self.forward(work.plan, tensors, wide_out=work.wide_out, moments=work.moments)


def check(work: Work, dtype: torch.dtype, operator: Operator) -> None:
    tensors = work.tensors(dtype)
    expected = work.reference(tensors)
    actual = operator.run(work, tensors)
    if work.images == 0:
        assert [t.shape for t in actual] == [t.shape for t in expected]
    elif operator.allow_tf32:
        assert all(relative_l2(a, e) < TF32 for a, e in zip(actual, expected, strict=True))
    else:
        assert_close(actual, expected, dtype)


@dtypes
@pytest.mark.parametrize("name", WORKS)
def test_jobs(simt: Any, name: str, dtype: torch.dtype) -> None:
    check(WORKS[name], dtype, Operator(simt))
