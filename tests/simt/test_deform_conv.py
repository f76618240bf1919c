"""The CUDA deform_conv, compiled for the host, against the reference in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from dyhead_cuda import reference
from dyhead_cuda.ops.common import compute_dtype
from dyhead_cuda.ops.deform_conv import Job, Map, Plan, deform_conv, stack_maps
from tests.conftest import (
    TOLERANCE,
    assert_close,
    assert_gradients_close,
    leaf,
    random_like,
    relative_l2,
)
from tests.deform_work import WORKS, Work

from .arrays import to_array, to_tensor

dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
TF32 = 1e-3


def name_of(dtype: torch.dtype) -> str:
    return str(dtype)[6:]


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

    def backward(
        self,
        plan: Plan,
        tensors: dict[str, Tensor],
        results: Sequence[Tensor],
        grads: Sequence[Tensor],
        *,
        wide_out: bool = False,
        deterministic: bool = False,
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
            *plan.tables,
            plan.mask_logits,
            wide_out,
            with_bias="bias" in tensors,
            allow_tf32=self.allow_tf32,
            deterministic=deterministic,
            device=self.device(),
        )
        return {name: to_tensor(array, source.dtype) for name, array in gradients.items()}

    def run(self, work: Work | Convolution, tensors: dict[str, Tensor]) -> list[Tensor]:
        return self.forward(work.plan, tensors, wide_out=work.wide_out, moments=work.moments)


@dataclass(frozen=True)
class Convolution:
    """One plain or deformable convolution of any geometry: the interface of Work."""

    channels: int = 16
    out_channels: int = 16
    size: tuple[int, int] = (9, 10)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    deform_groups: int = 1
    images: int = 1
    offset_scale: float = 1.0
    moments: bool = False
    wide_out: bool = False

    @property
    def output(self) -> tuple[int, int]:
        height, width = (
            (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
            for size, pad, dilation, kernel, stride in zip(
                self.size, self.padding, self.dilation, self.kernel, self.stride, strict=True
            )
        )
        return height, width

    @property
    def plan(self) -> Plan:
        out = Map(0, *self.output)
        return Plan(
            self.images,
            [Map(0, *self.size)],
            [Job(out, out, [(0, 0)], self.stride)],
            self.kernel,
            self.padding,
            self.dilation,
            self.groups,
            self.deform_groups,
            mask_logits=False,
        )

    def tensors(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        source = torch.Generator().manual_seed(7)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=source, dtype=torch.float64)

        taps = self.kernel[0] * self.kernel[1] * self.deform_groups
        offsets = self.offset_scale * normal(self.images * math.prod(self.output), 2 * taps)
        # Away from integer coordinates, where the derivative jumps.
        offsets = offsets.floor() + 0.1 + 0.8 * normal(*offsets.shape).sigmoid()
        masks = normal(offsets.shape[0], taps).sigmoid()
        tensors = {
            "source": normal(self.images * math.prod(self.size), self.channels),
            "predictions": torch.cat([offsets, masks], 1),
            "weights": normal(1, self.out_channels, self.channels // self.groups, *self.kernel),
            "bias": normal(1, self.out_channels),
        }
        tensors["weights"] /= math.sqrt(self.channels // self.groups * taps)
        compute = compute_dtype(dtype)
        return {k: leaf(t, dtype if k == "source" else compute) for k, t in tensors.items()}

    def reference(self, tensors: dict[str, Tensor]) -> list[Tensor]:
        t = {name: value.double() for name, value in tensors.items()}

        def maps(rows: Tensor, size: tuple[int, int]) -> Tensor:
            return rows.view(self.images, *size, rows.shape[1]).permute(0, 3, 1, 2)

        predictions = maps(t["predictions"], self.output)
        offsets = predictions.shape[1] // 3 * 2
        y = reference.modulated_deform_conv2d(
            maps(t["source"], self.size),
            predictions[:, :offsets],
            t["weights"][0],
            t["bias"][0],
            self.stride,
            self.padding,
            self.dilation,
            predictions[:, offsets:],
        )
        return [y.permute(0, 2, 3, 1).reshape(-1, self.out_channels)]


CONVOLUTIONS = {
    "one pixel": Convolution(channels=1, out_channels=1, size=(1, 1)),
    "vectors": Convolution(channels=72, out_channels=48, images=2, offset_scale=3),
    "wide output": Convolution(channels=8, out_channels=264, size=(5, 27)),
    "middle output": Convolution(channels=136, out_channels=104, size=(8, 17)),
    "groups": Convolution(channels=32, out_channels=48, groups=2, deform_groups=4),
    "groups across deformable groups": Convolution(
        channels=12, out_channels=6, groups=2, deform_groups=3
    ),
    "depthwise": Convolution(channels=5, out_channels=10, groups=5, size=(4, 5)),
    "large kernel": Convolution(
        channels=72, kernel=(5, 3), padding=(2, 3), dilation=(2, 1), size=(7, 9)
    ),
    "strides": Convolution(stride=(2, 3), size=(11, 13), padding=(0, 2)),
    "far offsets": Convolution(offset_scale=30),
}


def check(work: Work | Convolution, dtype: torch.dtype, operator: Operator) -> None:
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


def check_backward(
    work: Work | Convolution, dtype: torch.dtype, operator: Operator, *, deterministic: bool = False
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
        wide_out=work.wide_out,
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
            assert relative_l2(actual[name], e) < 2 * TF32, name
    else:
        assert_gradients_close([actual[name] for name in names], expected, dtype)
    return actual


@dtypes
@pytest.mark.parametrize("name", WORKS)
def test_jobs_backward(simt: Any, name: str, dtype: torch.dtype) -> None:
    check_backward(WORKS[name], dtype, Operator(simt))


@dtypes
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(simt: Any, name: str, dtype: torch.dtype) -> None:
    check(CONVOLUTIONS[name], dtype, Operator(simt))
    check_backward(CONVOLUTIONS[name], dtype, Operator(simt))


@pytest.mark.parametrize(
    "work", [WORKS["all"], *(CONVOLUTIONS[n] for n in ("vectors", "groups", "middle output"))]
)
def test_tf32(simt: Any, work: Work | Convolution) -> None:
    operator = Operator(simt, allow_tf32=True)
    check(work, torch.float32, operator)
    check_backward(work, torch.float32, operator)
    # IEEE arithmetic is closer: TF32 is not what float32 runs in unasked.
    exact = work.reference(work.tensors(torch.float32))[0]
    errors = [
        relative_l2(Operator(simt, allow).run(work, work.tensors(torch.float32))[0], exact)
        for allow in (False, True)
    ]
    assert errors[1] > 20 * errors[0]


@dtypes
@pytest.mark.usefixtures("seed")
def test_orders_of_threads(simt: Any, dtype: torch.dtype) -> None:
    work = Work(channels=24, out_channels=16)
    check(work, dtype, Operator(simt))
    check_backward(work, dtype, Operator(simt))


@dtypes
def test_deterministic(simt: Any, dtype: torch.dtype) -> None:
    work = Work(channels=24, out_channels=16)
    grads = []
    for seed in range(2):
        simt.set_seed(seed)
        grads.append(check_backward(work, dtype, Operator(simt), deterministic=True))
    assert all(torch.equal(grads[1][name], g) for name, g in grads[0].items())


def test_deterministic_gradients_that_are_not_finite(simt: Any) -> None:
    work = Convolution()
    tensors = work.tensors(torch.float32)
    results = Operator(simt).run(work, tensors)
    for bad in (math.inf, math.nan):
        cotangent = torch.ones_like(results[0])
        cotangent[3, 2] = bad
        grads = Operator(simt).backward(
            work.plan, tensors, results, [cotangent], deterministic=True
        )
        assert grads["source"].isnan().all()


@dtypes
@pytest.mark.parametrize("value", [math.nan, math.inf, -1e30, 2.0**31, -(2.0**31)])
def test_offsets_without_a_place(simt: Any, dtype: torch.dtype, value: float) -> None:
    work = Convolution(channels=8, out_channels=8)
    tensors = {name: t.detach() for name, t in work.tensors(dtype).items()}
    tensors["predictions"][::3, :18] = value
    tensors["predictions"][1::3, 4] = value
    finite = {name: t.clone() for name, t in tensors.items()}
    finite["predictions"][:, :18].nan_to_num_(1e6, 1e6, -1e6)
    expected = work.reference(finite)
    actual = Operator(simt).run(work, tensors)
    assert_close(actual, expected, dtype)
    grads = Operator(simt).backward(work.plan, tensors, actual, [torch.ones_like(actual[0])])
    assert all(g.isfinite().all() for g in grads.values())


def test_masks_outside_are_not_read(simt: Any) -> None:
    work = Convolution(channels=8, out_channels=8)
    tensors = {name: t.detach() for name, t in work.tensors(torch.float32).items()}
    tensors["predictions"][::2, :18] = 1e6
    tensors["predictions"][::2, 18:] = math.nan
    assert Operator(simt).run(work, tensors)[0].isfinite().all()


def test_many_jobs_take_several_launches(simt: Any) -> None:
    """More jobs, terms and sources than fit the tables of a launch."""
    images, count = 2, 40
    sources = stack_maps([(2, 3)] * count, images)
    outs = stack_maps([(2, 3)] * count, images)
    jobs = [
        Job(
            out,
            outs[i // 2],
            [(i, 0), ((i * 7) % count, 1), ((i + 1) % count, 0)],
            upsampled=(4, 5),
        )
        for i, out in enumerate(outs)
    ]
    plan = Plan(images, sources, jobs)
    generator = torch.Generator().manual_seed(3)
    tensors = {
        "source": torch.randn(images * 6 * count, 8, generator=generator),
        "predictions": torch.randn(images * 6 * count // 2, 27, generator=generator),
        "weights": torch.randn(2, 8, 8, 3, 3, generator=generator) / 8,
        "bias": torch.randn(2, 8, generator=generator),
        "gates": torch.rand(images, count, generator=generator),
    }
    arguments = [*tensors.values()]
    actual = Operator(simt).forward(plan, tensors, moments=True)
    precise = [leaf(t, torch.float64) for t in arguments]
    source, predictions, weights, bias, gates = precise
    expected = deform_conv(
        source, predictions, weights.unbind(), plan, bias.unbind(), gates, moments=True
    )
    assert_close(actual, expected, torch.float32)
    cotangents = random_like(*actual)
    grads = Operator(simt).backward(plan, tensors, actual, [g.float() for g in cotangents])
    wanted = dict(zip(tensors, torch.autograd.grad(expected, precise, cotangents), strict=True))
    del wanted["weights"]
    assert_gradients_close([grads[n] for n in wanted], [*wanted.values()], torch.float32)
