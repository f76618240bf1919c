"""The backward to the input of deform_conv with wgmma: 16-bit types, tiles of 128, nine taps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers.deform_work import PLAIN, WGMMA, Call, Convolution, Work

from .arrays import name_of
from .deform_operator import Operator, check_backward

halves = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)

TAKEN: dict[str, Call] = {
    "small": WGMMA["small"],
    "odd tiles": WGMMA["odd tiles"],
    "jobs": Work(images=1, channels=40, out_channels=72, scale=6),
    "without bias and gates": Work(
        images=1,
        channels=32,
        out_channels=16,
        with_bias=False,
        with_gates=False,
        moments=False,
        scale=6,
    ),
    "groups": Convolution(channels=96, out_channels=144, size=(8, 17), groups=2, deform_groups=4),
    "far offsets": Convolution(channels=40, out_channels=256, size=(9, 20), offset_scale=9),
    "odd outputs": Convolution(channels=72, out_channels=75, size=(12, 12), images=2),
    "few outputs": PLAIN["predicting"],
}


def device(simt: Any, wgmma: bool = True) -> Operator:
    """One where tiles are always many, and so have 128 pixels."""
    return Operator(simt, processors=1, wgmma=wgmma)


def takes(simt: Any, work: Any, dtype: torch.dtype, operator: Operator) -> bool:
    taken: bool = simt.deform_conv.input_tiling(
        work.plan.tables,
        name_of(dtype),
        work.channels,
        work.out_channels,
        vectors=work.channels % 8 == 0,
        device=operator.device(),
    )[1]
    return taken


@halves
@pytest.mark.parametrize("name", TAKEN)
def test_works(simt: Any, name: str, dtype: torch.dtype) -> None:
    work = TAKEN[name]
    assert takes(simt, work, dtype, device(simt))
    check_backward(work, dtype, device(simt))


@halves
@pytest.mark.parametrize("name", TAKEN)
def test_bits_are_those_of_mma(simt: Any, name: str, dtype: torch.dtype) -> None:
    """The emulated products add in one order, and deterministic sums do not depend on theirs."""
    found, expected = (
        check_backward(TAKEN[name], dtype, device(simt, wgmma), deterministic=True)
        for wgmma in (True, False)
    )
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


@halves
@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize("name", ["odd tiles", "groups", "few outputs"])
def test_orders_of_threads(simt: Any, name: str, dtype: torch.dtype) -> None:
    check_backward(TAKEN[name], dtype, device(simt))


@halves
def test_gradients_nobody_needs(simt: Any, dtype: torch.dtype) -> None:
    work = TAKEN["groups"]
    tensors = {name: t.detach() for name, t in work.tensors(dtype).items()}
    results = device(simt).run(work, tensors)
    every, predictions, source = (
        device(simt).backward(
            work.plan,
            tensors,
            results,
            [torch.ones_like(t) for t in results],
            deterministic=True,
            with_source=wants[0],
            with_predictions=wants[1],
        )
        for wants in ((True, True), (False, True), (True, False))
    )
    assert torch.equal(predictions["predictions"], every["predictions"])
    assert torch.equal(source["source"], every["source"])


@pytest.mark.parametrize(
    ("work", "dtype", "options"),
    [
        (Convolution(channels=72, out_channels=48, kernel=(5, 3), padding=(2, 1)), "half", {}),
        (Convolution(channels=72, out_channels=48, kernel=(1, 3)), "half", {}),
        (Convolution(channels=36, out_channels=48), "half", {}),
        (Convolution(channels=64, out_channels=264), "half", {}),
        (TAKEN["small"], "half", {"processors": 4}),
        (TAKEN["small"], "half", {"shared_bytes": 99 * 1024}),
        (TAKEN["small"], "float32", {"allow_tf32": True}),
    ],
    ids=["many taps", "few taps", "no vectors", "many outputs", "few tiles", "small", "float32"],
)
def test_what_the_kernel_does_not_take(
    simt: Any, work: Any, dtype: str, options: dict[str, Any]
) -> None:
    """Such calls have the kernel, and so the bits, that they have without wgmma."""
    of_call = torch.float32 if dtype == "float32" else torch.bfloat16
    operator = Operator(simt, **{"processors": 1, "wgmma": True, **options})
    assert not takes(simt, work, of_call, operator)
    check_backward(work, of_call, operator)
