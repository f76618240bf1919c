"""The CUDA deform_conv, compiled for the host, against the reference in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import large_means
from tests.helpers.compare import (
    assert_close,
    random_like,
    relative_l2,
)
from tests.helpers.deform_work import (
    CONVOLUTIONS,
    ONE_PIXEL,
    PLAIN,
    WORKS,
    Call,
    Convolution,
    ManyJobs,
    Work,
)
from tests.helpers.not_finite import CALLS, planted

from .arithmetic import dtypes, not_finite
from .arrays import name_of
from .deform_operator import Operator, check, check_backward


@dtypes
@pytest.mark.parametrize("name", WORKS)
def test_jobs(simt: Any, name: str, dtype: torch.dtype) -> None:
    check(WORKS[name], dtype, Operator(simt))


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
    "work",
    [
        WORKS["all"],
        *(CONVOLUTIONS[n] for n in ("vectors", "groups", "middle output")),
        *(PLAIN[n] for n in ("predicting", "plain groups")),
    ],
)
def test_tf32(simt: Any, work: Call) -> None:
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
@pytest.mark.parametrize("work", [Work(channels=24, out_channels=16), PLAIN["predicting"]])
def test_orders_of_threads(simt: Any, work: Call, dtype: torch.dtype) -> None:
    check(work, dtype, Operator(simt))
    check_backward(work, dtype, Operator(simt))


@dtypes
@pytest.mark.parametrize("name", ["vectors", "middle output", "wide output", "large kernel"])
def test_small_shared_memory(simt: Any, name: str, dtype: torch.dtype) -> None:
    """What consumer GPUs have: launches that would not fit return an error."""
    operator = Operator(simt, shared_bytes=99 * 1024)
    check(CONVOLUTIONS[name], dtype, operator)
    check_backward(CONVOLUTIONS[name], dtype, operator)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize(
    "work",
    [
        Convolution(channels=72, out_channels=48, images=2, size=(9, 34), offset_scale=3),
        Convolution(channels=40, out_channels=136, size=(16, 16), kernel=(5, 3), padding=(2, 1)),
        Convolution(channels=32, out_channels=48, groups=2, deform_groups=4, size=(8, 48)),
        Work(images=3, channels=8, out_channels=8, scale=9),
    ],
    ids=["vectors", "many taps", "groups", "jobs"],
)
def test_tiles_of_128_pixels_backward(simt: Any, work: Call, dtype: torch.dtype) -> None:
    """On a device where tiles are always many."""
    operator = Operator(simt, processors=1)
    check_backward(work, dtype, operator)
    check_backward(work, dtype, operator, deterministic=True)


@dtypes
def test_deterministic(simt: Any, dtype: torch.dtype) -> None:
    work = Work(channels=24, out_channels=16)
    grads = []
    for seed in range(2):
        simt.set_seed(seed)
        grads.append(check_backward(work, dtype, Operator(simt), deterministic=True))
    assert all(torch.equal(grads[1][name], g) for name, g in grads[0].items())


@dtypes
def test_deterministic_gradients_that_are_not_finite(simt: Any, dtype: torch.dtype) -> None:
    """They stay in the sums that they are added to, as in floating-point sums."""
    work = Convolution(images=2)
    tensors = {name: t.detach() for name, t in work.tensors(dtype).items()}
    operator = Operator(simt)
    results = operator.run(work, tensors)
    for bad in (math.inf, -math.inf, math.nan):
        cotangent = random_like(results[0])[0].to(dtype)
        cotangent[3, 2] = bad
        expected, actual = (
            operator.backward(
                work.plan, tensors, results, [cotangent], deterministic=deterministic
            )["source"]
            for deterministic in (False, True)
        )
        finite = expected.isfinite()
        assert finite.any()
        assert not finite.all()
        if not math.isnan(bad):
            assert expected.isinf().any()
        assert torch.equal(actual[~finite].nan_to_num(7.0), expected[~finite].nan_to_num(7.0))
        assert_close([actual[finite]], [expected[finite]], dtype)


@dtypes
@pytest.mark.parametrize("value", [-1e30, 2.0**31, -(2.0**31)])
def test_far_offsets(simt: Any, dtype: torch.dtype, value: float) -> None:
    work = Convolution(channels=8, out_channels=8)
    tensors = work.displaced(work.tensors(dtype), value)
    expected = work.reference(tensors)
    actual = Operator(simt).run(work, tensors)
    assert_close(actual, expected, dtype)
    grads = Operator(simt).backward(work.plan, tensors, actual, [torch.ones_like(actual[0])])
    assert all(g.isfinite().all() for g in grads.values())


@dtypes
def test_one_value_is_its_own_mean(simt: Any, dtype: torch.dtype) -> None:
    """Also where it is rounded when it is stored."""
    out, mean, var, up_mean = Operator(simt).run(ONE_PIXEL, ONE_PIXEL.tensors(dtype))
    assert torch.equal(out.to(mean.dtype), mean[0])
    assert torch.equal(up_mean, mean)
    assert (var == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=name_of)
def test_moments_of_several_groups_of_tiles(simt: Any, dtype: torch.dtype) -> None:
    """Whole groups and a rest, of several jobs' and images' tiles, in any order of blocks."""
    work = Work(scale=18)
    tensors = work.tensors(dtype)
    expected = work.reference(tensors)
    runs = []
    for seed in range(2):
        simt.set_seed(seed)
        runs.append(Operator(simt).run(work, tensors))
        assert_close(runs[-1], expected, dtype)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("ratio", large_means.RATIOS)
def test_moments_of_large_means(simt: Any, ratio: float) -> None:
    tensors = large_means.tensors_of(ratio)
    large_means.check_moments(Operator(simt).run(large_means.CALL, tensors), ratio)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("deterministic", [False, True], ids=["sums", "deterministic"])
@pytest.mark.parametrize("name", ["all", "plain masks"])
def test_gradients_nobody_needs(
    simt: Any, name: str, deterministic: bool, dtype: torch.dtype
) -> None:
    """Without some of them the others have the same bits; sums by atomics are close."""
    work = WORKS[name]
    tensors = {key: t.detach() for key, t in work.tensors(dtype).items()}
    operator = Operator(simt)
    results = operator.run(work, tensors)
    cotangents = [random_like(t)[0].to(t.dtype) for t in results]

    def gradients(source: bool, predictions: bool) -> dict[str, Tensor]:
        return operator.backward(
            work.plan,
            tensors,
            results,
            cotangents,
            deterministic=deterministic,
            with_source=source,
            with_predictions=predictions,
        )

    every = gradients(True, True)
    for source, predictions in ((True, False), (False, True), (False, False)):
        found = gradients(source, predictions)
        assert found.keys() == every.keys() - {
            *(() if source else ("source",)),
            *(() if predictions else ("predictions",)),
        }
        for key, gradient in found.items():
            if key == "source" and not deterministic:
                assert_close([gradient], [every[key]], dtype)
            else:
                assert torch.equal(gradient, every[key]), key


def test_subnormal_sums_are_flushed(simt: Any) -> None:
    """As devices do it in global memory: what is left is 0 or a normal number."""
    work = Convolution(channels=8, out_channels=8)
    tensors = {name: t.detach() for name, t in work.tensors(torch.float32).items()}
    operator = Operator(simt)
    results = operator.run(work, tensors)
    cotangent = random_like(results[0])[0].float()
    normal, tiny = (
        operator.backward(work.plan, tensors, results, [cotangent * scale])["source"].double()
        for scale in (1.0, 2.0**-130)
    )
    smallest = torch.finfo(torch.float32).tiny
    assert (tiny == 0).any()
    assert (tiny.abs()[tiny != 0] >= smallest).all()
    lost = (tiny - normal * 2.0**-130).abs()
    assert (lost <= 40 * smallest).all()  # each of the parts may be lost


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_weights_are_read_as_they_are(simt: Any, dtype: torch.dtype) -> None:
    work = CONVOLUTIONS["vectors"]
    tensors = {name: t.detach() for name, t in work.tensors(dtype).items()}
    for name in ("weights", "bias"):
        tensors[name] = tensors[name].to(dtype)
    wide = {name: t.float() if name in ("weights", "bias") else t for name, t in tensors.items()}
    operator = Operator(simt)
    out = operator.run(work, tensors)
    assert torch.equal(out[0], operator.run(work, wide)[0])
    cotangent = [random_like(out[0])[0].to(dtype)]
    grads = operator.backward(work.plan, tensors, out, cotangent, deterministic=True)
    same = operator.backward(work.plan, wide, out, cotangent, deterministic=True)
    assert all(torch.equal(grads[name], same[name]) for name in grads)


@not_finite
def test_not_finite(simt: Any, call: str, place: str, value: float, dtype: torch.dtype) -> None:
    case, operator = planted(CALLS[call], place, value, dtype), Operator(simt)
    results = operator.run(case.call, case.tensors)
    for deterministic in (False, True):
        grads = operator.backward(
            case.call.plan, case.tensors, results, [case.cotangent], deterministic=deterministic
        )
        case.check(results, grads)


@dtypes
def test_few_channels_read_no_other_pixel(simt: Any, dtype: torch.dtype) -> None:
    """A step multiplies more channels than there are; values beside them may not be finite."""
    work = Convolution(channels=8, out_channels=8)
    tensors = {name: t.detach() for name, t in work.tensors(dtype).items()}
    tensors["source"][40] = math.inf
    finite = work.reference(tensors)[0].isfinite()
    assert finite.any()
    assert not finite.all()
    assert torch.equal(Operator(simt).run(work, tensors)[0].isfinite(), finite)


@dtypes
@pytest.mark.parametrize("processors", [3, 17, 200])
def test_blocks_share_the_tiles_of_the_last_round(
    simt: Any, processors: int, dtype: torch.dtype
) -> None:
    """Every split gives the result within rounding, and the same bits in every order of blocks."""
    work = Work(images=2, channels=40, out_channels=136, scale=6)
    operator = Operator(simt, processors=processors)
    check(work, dtype, operator)
    tensors = work.tensors(dtype)
    simt.set_seed(1)
    first = operator.run(work, tensors)
    simt.set_seed(2)
    assert all(map(torch.equal, first, operator.run(work, tensors)))


@dtypes
def test_launches_share_tiles_one_after_the_other(simt: Any, dtype: torch.dtype) -> None:
    check(ManyJobs(channels=16), dtype, Operator(simt, processors=100))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=name_of)
def test_many_jobs_take_several_launches(simt: Any, dtype: torch.dtype) -> None:
    check(ManyJobs(), dtype, Operator(simt))
    check_backward(ManyJobs(), dtype, Operator(simt))


@pytest.mark.guards  # pointers to rows that do not exist
@pytest.mark.parametrize("name", ["all", "vectors", "wide output", "plain groups"])
def test_elements_beyond_32_bits(simt: Any, name: str) -> None:
    """As the rows of a matrix of 2^40 rows, of which only those at the end exist."""
    work = (WORKS | CONVOLUTIONS | PLAIN)[name]
    tensors = work.tensors(torch.float32)
    near = Operator(simt, allow_tf32=True).run(work, tensors)
    far = Operator(simt, allow_tf32=True, far=2**40).run(work, tensors)
    assert all(torch.equal(a, b) for a, b in zip(near, far, strict=True))


def test_gradcheck(simt: Any) -> None:
    """Of the emulated forward and backward in float64, by finite differences."""
    work = Work(images=1, channels=2, out_channels=2)
    operator = Operator(simt)
    tensors = work.tensors()
    names = [name for name in tensors if name != "weights"]

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *values: Tensor) -> tuple[Tensor, ...]:
            ctx.inputs = {**tensors, **dict(zip(names, values, strict=True))}
            ctx.results = operator.run(work, ctx.inputs)
            return tuple(t.clone() for t in ctx.results)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
            found = operator.backward(work.plan, ctx.inputs, ctx.results, grads)
            return tuple(found[name] for name in names)

    inputs = tuple(tensors[name] for name in names)
    assert torch.autograd.gradcheck(Function.apply, inputs, fast_mode=True, nondet_tol=1e-10)
