"""The kernel of plain convolutions, compiled for the host, against the reference in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.helpers.deform_work import PLAIN, Plain
from tests.helpers.not_finite import NOT_FINITE

from .arithmetic import dtypes
from .deform_operator import Operator, check, check_backward


@dtypes
@pytest.mark.parametrize("name", PLAIN)
def test_plain_convolutions(simt: Any, name: str, dtype: torch.dtype) -> None:
    check(PLAIN[name], dtype, Operator(simt))
    check_backward(PLAIN[name], dtype, Operator(simt))


@pytest.mark.parametrize("name", ["predicting", "plain groups"])
def test_plain_convolutions_in_both_kernels(simt: Any, name: str) -> None:
    """Moments are computed by the other kernel: as exact numbers show, of the same sums."""
    work = replace(PLAIN[name], out_in_compute_dtype=True)
    tensors = {key: t.detach().mul(4).round() for key, t in work.tensors(torch.bfloat16).items()}
    device = simt.deform_conv.DeviceLimits(4, 227 * 1024)
    for sums_only in (True, False):
        assert sums_only == simt.deform_conv.takes_plain_kernel(
            work.plan.tables,
            "bfloat16",
            work.channels,
            work.out_channels,
            sums_only=sums_only,
            device=device,
        )
    own, *_ = Operator(simt).forward(work.plan, tensors, out_in_compute_dtype=True)
    other, *_ = Operator(simt).forward(work.plan, tensors, out_in_compute_dtype=True, moments=True)
    assert torch.equal(own, other)


@dtypes
@pytest.mark.parametrize("value", NOT_FINITE)
def test_plain_convolutions_spread_what_is_not_finite(
    simt: Any, value: float, dtype: torch.dtype
) -> None:
    """To the pixels that read it, and nowhere else: what is outside a map is not read."""
    work = Plain(images=1, channels=72, sizes=((9, 17), (3, 4)))
    tensors = {name: t.detach() for name, t in work.tensors(dtype).items()}
    pixels = [(0, 0), (8, 16), (4, 15)]
    expected = torch.zeros(9, 17, dtype=torch.bool)
    for y, x in pixels:
        tensors["source"][17 * y + x] = value
        expected[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2] = True
    out = Operator(simt, allow_tf32=True).run(work, tensors)[0]
    wrong = (~out[: 9 * 17].isfinite()).view(9, 17, -1) != expected[:, :, None]
    assert not wrong.any(), wrong.nonzero()
    assert out[9 * 17 :].isfinite().all()


def test_tf32_of_plain_convolutions_is_rounded(simt: Any) -> None:
    """To nearest, not truncated as a tensor core does: numbers just below 1 become 1."""
    work = Plain(images=1, channels=64, sizes=((8, 16),), with_bias=False)
    tensors = {name: torch.ones_like(t) for name, t in work.tensors(torch.float32).items()}
    expected = work.reference(tensors)[0].float()
    tensors["source"] -= 2.0**-20
    operator = Operator(simt, allow_tf32=True)
    assert torch.equal(operator.run(work, tensors)[0], expected)
