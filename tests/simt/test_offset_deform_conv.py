"""Both convolutions of a block as one operator, on the emulated CUDA kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from dyhead_cuda.ops.jobs import Job, Plan
from tests.helpers.compare import assert_gradients_close, gradients, leaf, random_like
from tests.helpers.deform_checks import assert_same_bits, bits, check
from tests.helpers.offset_work import (
    CONVOLUTIONS,
    WORKS,
    OffsetCall,
    OffsetConvolution,
    OffsetWork,
)
from tests.helpers.training import deterministic

from .arithmetic import dtypes
from .arrays import name_of
from .emulated import Emulated

BACKWARD = torch.ops.dyhead.offset_deform_conv_bwd

sums = pytest.mark.parametrize("fixed", [False, True], ids=["sums", "deterministic"])


@contextmanager
def emulated(
    simt: Any, *, fixed: bool = False, processors: int = 4, shared_bytes: int = 227 * 1024
) -> Iterator[None]:
    """Operators inside are the emulated ones, on such a device; ``fixed``: deterministic."""
    mode = Emulated(simt)
    mode.device = simt.deform_conv.DeviceLimits(processors, shared_bytes)
    with mode, deterministic() if fixed else nullcontext():
        yield


@dataclass(frozen=True)
class ManyMaps(OffsetCall):
    """More source maps than a launch has, in both convolutions."""

    images: int = 1
    channels: int = 8
    out_channels: int = 8
    count: int = 36

    @property
    def plan(self) -> Plan:
        maps, count = [(2, 3)] * self.count, self.count
        jobs = [Job(size, i, [((5 * i) % count, i % 2)]) for i, size in enumerate(maps)]
        return Plan(self.images, maps, maps, jobs)


@dataclass(frozen=True)
class ManyMatrices(OffsetCall):
    """More matrices than one launch packs, together with the offset convolution's."""

    images: int = 1
    channels: int = 3
    out_channels: int = 3
    count: int = 66

    @property
    def plan(self) -> Plan:
        jobs = [Job((1, 2), 0, [(0, i)]) for i in range(self.count)]
        return Plan(self.images, [(1, 2)], [(1, 2)], jobs)


@dtypes
@sums
@pytest.mark.parametrize("name", WORKS)
def test_equals_the_reference(simt: Any, name: str, fixed: bool, dtype: torch.dtype) -> None:
    with emulated(simt, fixed=fixed):
        check(WORKS[name], dtype, WORKS[name].tensors(dtype))


@dtypes
@pytest.mark.usefixtures("seed")
def test_orders_of_threads(simt: Any, dtype: torch.dtype) -> None:
    work = OffsetWork(channels=24, out_channels=16)
    with emulated(simt):
        check(work, dtype, work.tensors(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=name_of)
@sums
def test_several_launches(simt: Any, fixed: bool, dtype: torch.dtype) -> None:
    with emulated(simt, fixed=fixed):
        check(ManyMaps(), dtype, ManyMaps().tensors(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=name_of)
def test_several_launches_pack(simt: Any, dtype: torch.dtype) -> None:
    with emulated(simt):
        check(ManyMatrices(), dtype, ManyMatrices().tensors(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=name_of)
@pytest.mark.parametrize("device", [(4, 99 * 1024), (1, 227 * 1024)], ids=["small", "128 rows"])
def test_devices(simt: Any, device: tuple[int, int], dtype: torch.dtype) -> None:
    work = OffsetConvolution(channels=72, out_channels=48, size=(9, 34))
    with emulated(simt, processors=device[0], shared_bytes=device[1]):
        check(work, dtype, work.tensors(dtype))


@dtypes
@pytest.mark.parametrize("name", ["all", *CONVOLUTIONS])
def test_equals_two_calls(simt: Any, name: str, dtype: torch.dtype) -> None:
    """In all bits, but for the features' gradient, whose sums have no order."""
    work = (WORKS | CONVOLUTIONS)[name]
    tensors = work.tensors(dtype)
    with emulated(simt):
        together, apart = work.run(tensors), work.separately(tensors)
        assert_same_bits(together, apart)
        source, *others = gradients(together, list(tensors.values()), dtype)
        expected_source, *expected = gradients(apart, list(tensors.values()), dtype)
    assert_same_bits(others, expected)
    if dtype == torch.float64:
        assert_gradients_close([source], [expected_source])
    else:
        # Each of the two calls rounds, and so does their sum.
        eps = torch.finfo(dtype).eps
        difference = (source.double() - expected_source.double()).abs()
        assert (difference <= 4 * eps * expected_source.abs().max()).all()


@dtypes
def test_deterministic(simt: Any, dtype: torch.dtype) -> None:
    work = OffsetWork(channels=24, out_channels=16)
    found = []
    for seed in range(2):
        simt.set_seed(seed)
        with emulated(simt, fixed=True):
            found.append(bits(work, work.tensors(dtype), dtype))
    assert_same_bits(*found)


@dtypes
@pytest.mark.parametrize("factor", [1e6, 1e-6])
def test_calls_of_different_sizes_share_their_steps(
    simt: Any, factor: float, dtype: torch.dtype
) -> None:
    """A feature that predicts nothing decides how large the other's gradients by offsets are."""
    if dtype == torch.float16:
        factor **= 0.5
    work = WORKS["all"]
    tensors = work.tensors(dtype)
    with torch.no_grad():
        tensors["source"][:, 0] *= factor
        tensors["source"][:, 1:] *= min(1, factor)
        tensors["offset_weight"][:, 0] = 0
        tensors["offset_weight"][:, 1:] /= min(1, factor)
    names = ["source", "offset_weight"]
    with emulated(simt, fixed=True):
        out = work.run(tensors)[0]
        cotangent = random_like(out)[0].to(dtype)
        found = torch.autograd.grad(out, [tensors[n] for n in names], cotangent)
    exact = {name: leaf(t, torch.float64) for name, t in tensors.items()}
    expected = torch.autograd.grad(
        work.reference(exact)[0], [exact[n] for n in names], cotangent.double()
    )
    for i in range(work.channels):
        assert_gradients_close([found[0][:, i]], [expected[0][:, i]], dtype)


@dtypes
def test_gradients_that_are_not_finite(simt: Any, dtype: torch.dtype) -> None:
    """They stay in the sums that they are added to, whichever call adds them."""
    work = OffsetConvolution(channels=8, out_channels=8)
    tensors = work.tensors(dtype)
    for bad in (float("inf"), float("nan")):
        found: list[Tensor] = []
        for fixed in (False, True):
            with emulated(simt, fixed=fixed):
                out = work.run(tensors)[0]
                cotangent = random_like(out)[0].to(dtype)
                cotangent[3, 2] = bad
                found += torch.autograd.grad(out, [tensors["source"]], cotangent)
        floating, integer = found
        finite = floating.isfinite()
        assert finite.any()
        assert not finite.all()
        assert torch.equal(finite, integer.isfinite())
        assert_gradients_close([integer[finite]], [floating[finite]], dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=name_of)
@sums
def test_every_choice_of_gradients(simt: Any, fixed: bool, dtype: torch.dtype) -> None:
    """Without some of them the others have the same bits; sums by atomics are close."""
    work = WORKS["all"]
    tensors = {name: t.detach() for name, t in work.tensors(dtype).items()}
    with emulated(simt):
        *arguments, _, tf32, _ = work.backward_arguments(tensors)
        every = BACKWARD(*arguments, [1] * 5, tf32, fixed)
        for wanted in product((0, 1), repeat=5):
            found = BACKWARD(*arguments, list(wanted), tf32, fixed)
            for i, (one, full, want) in enumerate(zip(found, every, wanted, strict=True)):
                if want and i == 0 and not fixed:
                    assert_gradients_close([one], [full], dtype)
                else:
                    assert torch.equal(one, full if want else full.new_empty(0)), wanted


def test_half_weights_are_read_as_they_are(simt: Any) -> None:
    work = CONVOLUTIONS["vectors"]
    halves = {name: leaf(t, torch.bfloat16) for name, t in work.tensors().items()}
    wide = {n: t if n == "source" else leaf(t, torch.float32) for n, t in halves.items()}
    found = []
    for tensors in (halves, wide):
        torch.manual_seed(0)
        with emulated(simt):
            *arguments, _ = work.backward_arguments(tensors)
            found.append(BACKWARD(*arguments, True))
    assert_same_bits(*found)


def test_gradcheck(simt: Any) -> None:
    work = OffsetWork(images=1, channels=2, out_channels=2)
    tensors = work.tensors()

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        return tuple(work.run(dict(zip(tensors, values, strict=True))))

    with emulated(simt):
        inputs = tuple(tensors.values())
        assert torch.autograd.gradcheck(run, inputs, fast_mode=True, nondet_tol=1e-10)
