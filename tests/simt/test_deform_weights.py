"""The CUDA weight gradient of deform_conv, compiled for the host, against float64 autograd."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dyhead_cuda.ops.common import compute_dtype
from dyhead_cuda.ops.jobs import Job, Plan, map_rows
from tests.helpers.compare import TOLERANCE, leaf, random_like, relative_l2
from tests.helpers.deform_work import CONVOLUTIONS, WORKS, Convolution, Work
from tests.helpers.not_finite import CALLS, FAR, planted

from .arithmetic import TF32_TOLERANCE, dtypes, not_finite
from .arrays import name_of, to_array, to_tensor

HALF = torch.bfloat16


def round_to_tf32(t: Tensor) -> Tensor:
    bits = t.detach().contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


@dataclass(frozen=True)
class Operator:
    """The emulated gradient, on a device of some size."""

    simt: Any
    allow_tf32: bool = False
    processors: int = 4
    shared_bytes: int = 227 * 1024

    def device(self) -> Any:
        return self.simt.deform_conv.DeviceLimits(self.processors, self.shared_bytes)

    def run(self, plan: Plan, tensors: dict[str, Tensor], grad_rows: Tensor) -> Tensor:
        source = tensors["source"]
        result = self.simt.deform_weights.gradient(
            name_of(source.dtype),
            to_array(source),
            to_array(tensors["predictions"]),
            to_array(tensors["gates"]) if "gates" in tensors else None,
            to_array(round_to_tf32(grad_rows) if self.allow_tf32 else grad_rows),
            tensors["weights"].shape[0],
            plan.tables,
            plan.mask_logits,
            allow_tf32=self.allow_tf32,
            device=self.device(),
        )
        return to_tensor(result, compute_dtype(source.dtype))

    def slices_of(self, plan: Plan, channels: int, outs: int, name: str) -> Any:
        return self.simt.deform_weights.slices(
            plan.tables, name, channels, outs, allow_tf32=self.allow_tf32, device=self.device()
        )

    def tolerance(self, dtype: torch.dtype) -> float:
        return 2 * (TF32_TOLERANCE if self.allow_tf32 else TOLERANCE[dtype])


def rows_of(maps: Tensor) -> Tensor:
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


def maps_of(rows: Tensor, images: int, height: int, width: int) -> Tensor:
    return rows.view(images, height, width, -1).permute(0, 3, 1, 2)


def check(
    work: Work | Convolution | Tables,
    dtype: torch.dtype,
    operator: Operator,
    tensors: dict[str, Tensor] | None = None,
) -> Tensor:
    """The gradient of random rows, checked against that of the reference."""
    tensors = work.tensors(dtype) if tensors is None else tensors
    exact = {name: leaf(t, torch.float64) for name, t in tensors.items()}
    out = work.reference(exact)[0]
    grad_rows = random_like(out)[0].to(dtype)
    (expected,) = torch.autograd.grad(out, exact["weights"], grad_rows.double())
    actual = operator.run(work.plan, tensors, grad_rows)
    assert actual.isfinite().all()
    assert relative_l2(actual, expected) <= operator.tolerance(dtype)
    assert (actual[expected == 0] == 0).all()
    return actual


@dtypes
@pytest.mark.parametrize("name", [name for name in WORKS if WORKS[name].images > 0])
def test_jobs(simt: Any, name: str, dtype: torch.dtype) -> None:
    check(replace(WORKS[name], moments=False), dtype, Operator(simt))


@pytest.mark.parametrize("name", ["all", "many channels"])
def test_jobs_tf32(simt: Any, name: str) -> None:
    check(replace(WORKS[name], moments=False), torch.float32, Operator(simt, allow_tf32=True))


def test_no_images(simt: Any) -> None:
    work = WORKS["no images"]
    tensors = work.tensors(torch.float32)
    gradient = Operator(simt).run(work.plan, tensors, torch.zeros(0, work.out_channels))
    assert gradient.shape == tensors["weights"].shape
    assert (gradient == 0).all()


# What a block computes depends on the numbers of channels: 32, 128 or 256 outputs at a time, by
# vectors or one by one.
SIZES = {
    **CONVOLUTIONS,
    "odd": Convolution(channels=7, out_channels=7, size=(5, 6)),
    "two steps, narrow": Convolution(channels=96, out_channels=24, size=(5, 6)),
    "rows of 27": Convolution(channels=72, out_channels=27, size=(5, 6)),
    "rows of 41": Convolution(out_channels=41, size=(5, 6)),
    "wide, odd rows": Convolution(channels=8, out_channels=131, size=(5, 6)),
    "one tap": Convolution(channels=200, kernel=(1, 1), padding=(0, 0), stride=(1, 2)),
    "many pixels": Convolution(channels=8, out_channels=3, images=3, size=(13, 34)),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes(simt: Any, name: str) -> None:
    check(SIZES[name], HALF, Operator(simt))


@pytest.mark.parametrize("name", ["middle output", "wide output", "groups", "many pixels"])
@pytest.mark.parametrize("math", ["float64", "float32", "tf32"])
def test_sizes_of_wide_types(simt: Any, name: str, math: str) -> None:
    dtype = torch.float64 if math == "float64" else torch.float32
    check(SIZES[name], dtype, Operator(simt, allow_tf32=math == "tf32"))


def test_little_shared_memory(simt: Any) -> None:
    convolution, operator = SIZES["wide output"], Operator(simt, shared_bytes=99 << 10)
    outs, *_ = operator.slices_of(convolution.plan, 8, 264, "bfloat16")
    assert outs == 128
    check(convolution, HALF, operator)


@pytest.mark.parametrize("processors", [1, 30, 500])
def test_slices_give_what_one_gives(simt: Any, processors: int) -> None:
    convolution, operator = SIZES["many pixels"], Operator(simt, processors=processors)
    _, blocks, [[slices]] = operator.slices_of(convolution.plan, 8, 3, "bfloat16")
    assert blocks == 5
    assert slices == {1: 1, 30: 11, 500: 21}[processors]
    check(convolution, HALF, operator)


def test_slices_are_planned_as_documented(simt: Any) -> None:
    cut = simt.deform_weights.weight_slices
    assert cut([360, 95, 95], blocks=18, resident=132) == [4, 1, 1]
    assert cut([0, 5], blocks=1, resident=1) == [0, 1]
    assert cut([0], blocks=1, resident=1) == [0]


@dataclass(frozen=True)
class Tables:
    """More jobs than one launch takes, some without pixels, plain as the predictions' own."""

    jobs: int = 30
    images: int = 2
    channels: int = 3
    out_channels: int = 5
    scale: int = 1

    @property
    def sizes(self) -> list[tuple[int, int]]:
        s = self.scale
        return [
            (0, 3) if j % 7 == 3 else ((1 + j % 3) * s, (2 + j % 2) * s) for j in range(self.jobs)
        ]

    @property
    def plan(self) -> Plan:
        jobs = [Job(size, None, [(i, i % 4), (i, 0)]) for i, size in enumerate(self.sizes)]
        return Plan(self.images, self.sizes, [], jobs)

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        source = torch.Generator().manual_seed(3)
        rows = sum(map_rows(self.sizes, self.images))
        compute = compute_dtype(dtype)
        return {
            "source": torch.randn(rows, self.channels, generator=source).to(dtype),
            "predictions": torch.zeros(0, 27, dtype=compute),
            "weights": torch.zeros(5, self.out_channels, self.channels, 3, 3, dtype=compute),
        }

    def reference(self, tensors: dict[str, Tensor]) -> list[Tensor]:
        outs = []
        parts = tensors["source"].split(map_rows(self.sizes, self.images))
        for job, rows, (height, width) in zip(self.plan.jobs, parts, self.sizes, strict=True):
            if height == 0:
                continue
            x = maps_of(rows, self.images, height, width)
            weight = tensors["weights"][[w for _, w in job.terms]].sum(0)
            outs.append(rows_of(torch.nn.functional.conv2d(x, weight, padding=1)))
        return [torch.cat(outs)]


@pytest.mark.parametrize("dtype", [HALF, torch.float64], ids=name_of)
def test_several_launches(simt: Any, dtype: torch.dtype) -> None:
    tables, operator = Tables(), Operator(simt)
    *_, launches = operator.slices_of(tables.plan, 3, 5, name_of(dtype))
    assert [len(slices) for slices in launches] == [4, 4]
    check(tables, dtype, operator)


# Samples of vectors and at most 32 outputs are copied.
COPIED = Tables(jobs=6, channels=72, out_channels=27, scale=7)


@pytest.mark.parametrize("processors", [1, 100])
@dtypes
def test_plain_samples_are_copied(simt: Any, dtype: torch.dtype, processors: int) -> None:
    check(COPIED, dtype, Operator(simt, processors=processors))


def test_plain_samples_tf32(simt: Any) -> None:
    check(COPIED, torch.float32, Operator(simt, allow_tf32=True))


def test_infinite_plain_samples_stay_where_they_are_read(simt: Any) -> None:
    """The corner of a map is read by the taps up to the middle one, and not from outside."""
    tables = Tables(jobs=1, channels=8, out_channels=27, scale=7)
    tensors = tables.tensors(HALF)
    tensors["source"][0, 3] = torch.inf
    grad_rows = torch.ones(tables.images * 7 * 14, 27, dtype=HALF)
    gradient = Operator(simt).run(tables.plan, tensors, grad_rows)
    expected = torch.ones(3, 3, dtype=torch.bool)
    expected[2], expected[:, 2] = False, False
    # Matrix 0 is used twice, by both terms.
    assert torch.equal(gradient[0, :, 3].isinf(), expected.expand(27, 3, 3))
    assert gradient[0, :, [0, 1, 2, 4, 5, 6, 7]].isfinite().all()


@pytest.mark.parametrize("value", [*FAR, -3e9])
def test_far_offsets_sample_zero(simt: Any, value: float) -> None:
    convolution = SIZES["odd"]
    tensors = convolution.tensors(torch.float32)
    masked = {name: t.detach().clone() for name, t in tensors.items()}
    bad = torch.rand(tensors["predictions"].shape) < 0.2
    bad[:, 18:] = False
    moved = torch.where(bad, value, tensors["predictions"])
    bad[:, 18:] = bad[:, :18].unflatten(1, (9, 2)).any(2)
    masked["predictions"] = torch.where(bad, 0.0, tensors["predictions"])
    expected = check(convolution, torch.float32, Operator(simt), masked)
    operator = Operator(simt)
    grad_rows = random_like(convolution.reference(masked)[0])[0].float()
    actual = operator.run(convolution.plan, masked | {"predictions": moved}, grad_rows)
    assert torch.equal(actual, expected)


@not_finite
def test_not_finite(simt: Any, call: str, place: str, value: float, dtype: torch.dtype) -> None:
    case = planted(CALLS[call], place, value, dtype)
    actual = Operator(simt).run(case.call.plan, case.tensors, case.cotangent)
    case.check([], {"weights": actual})


def test_every_order_of_threads_gives_the_same_bits(simt: Any, seed: int) -> None:
    work = Work(channels=8, out_channels=8, moments=False)
    first = check(work, HALF, Operator(simt, processors=40))
    simt.set_seed(seed + 100)
    assert torch.equal(first, check(work, HALF, Operator(simt, processors=40)))
