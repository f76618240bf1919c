"""The CUDA deform_conv on a GPU, against the reference in float64 on that GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dyhead_cuda import library
from dyhead_cuda.numerics import TOLERANCES
from dyhead_cuda.older_torch import tf32
from dyhead_cuda.ops.deform_conv import deform_conv
from dyhead_cuda.ops.jobs import Job, Plan
from tests.helpers.compare import (
    TOLERANCE,
    assert_close,
    assert_gradients_close,
    leaf,
    relative_l2,
)
from tests.helpers.deform_checks import assert_same_bits, bits, check, expected_of, results
from tests.helpers.deform_work import (
    CONVOLUTIONS,
    PLAIN,
    WORKS,
    Call,
    Convolution,
    Work,
)
from tests.helpers.not_finite import CALLS, CALLS_AND_PLACES, NOT_FINITE, planted
from tests.helpers.training import HALF, deterministic

from .device import (
    captured,
    heavy,
    launched,
    need_memory,
    need_two_devices,
    on_a_busy_stream,
    unaligned,
)

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
TF32 = TOLERANCES["tf32"]
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
half = pytest.mark.parametrize("dtype", HALF, ids=lambda dtype: str(dtype)[6:])

LEVEL = Convolution(channels=256, out_channels=256, size=(100, 168), offset_scale=2)
SIZES = {
    "a level": LEVEL,
    "no vectors": replace(LEVEL, channels=255, out_channels=257, size=(50, 84)),
    "regions": replace(LEVEL, images=300, size=(7, 7)),
    "more images than a grid's y": Convolution(images=70_000, channels=16, size=(1, 1)),
    "many channels": replace(LEVEL, channels=1024, out_channels=512, size=(25, 42)),
    "depthwise": replace(LEVEL, groups=256, size=(25, 42)),
    "every other pixel": replace(LEVEL, stride=(2, 2)),
    "all samples at one place": replace(LEVEL, size=(1, 1), padding=(20, 20), offset_scale=20),
}


@pytest.fixture(autouse=True)
def _library() -> None:
    library.require(DEVICE)


# --- against the reference ----------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("name", SIZES)
def test_sizes(name: str, dtype: torch.dtype) -> None:
    if DEVICE == "cuda":
        need_memory(24)
    check(SIZES[name], dtype, SIZES[name].tensors(dtype, DEVICE))


@half
@pytest.mark.parametrize(
    "call", [WORKS["all"], WORKS["many channels"], CONVOLUTIONS["vectors"]], ids=str
)
def test_half_precision_weights_are_read_as_they_are(call: Call, dtype: torch.dtype) -> None:
    tensors = call.tensors(dtype, DEVICE)
    for name in ("weights", "bias"):
        tensors[name] = leaf(tensors[name], dtype)
    check(call, dtype, tensors)
    seen: list[torch.dtype] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if f is torch.ops.dyhead.deform_conv_fwd.default:
                seen.extend(t.dtype for t in (*args[2], *args[3]))
            return f(*args, **(kwargs or {}))

    with Watch():
        call.run(tensors)
    assert set(seen) == {dtype}


@pytest.mark.parametrize(
    "call",
    [
        WORKS["all"],
        LEVEL,
        *(CONVOLUTIONS[n] for n in ("vectors", "groups", "middle output")),
        PLAIN["predicting"],
    ],
    ids=str,
)
def test_tf32_where_torch_says_so(call: Call) -> None:
    dtype = torch.float32
    tensors = call.tensors(dtype, DEVICE)
    before = bits(replace(call, moments=False), tensors, dtype)[0]
    with tf32(True):
        actual, grads = results(call, tensors, dtype)
    expected, wanted = expected_of(call, tensors, dtype)
    assert all(relative_l2(a, e) < TF32 for a, e in zip(actual, expected, strict=True))
    for name, a, e in zip(tensors, grads, wanted, strict=True):
        assert relative_l2(a, e) < 2 * TF32, name
    # IEEE arithmetic is closer, and comes back with the switch.
    assert relative_l2(actual[0], expected[0]) > 20 * relative_l2(before, expected[0])
    assert torch.equal(call.run(tensors)[0], before)


# --- memory -------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("name", ["all", "many channels"])
def test_unaligned_tensors(name: str, dtype: torch.dtype) -> None:
    tensors = WORKS[name].tensors(dtype, DEVICE)
    check(WORKS[name], dtype, {key: unaligned(t) for key, t in tensors.items()})


@dtypes
@pytest.mark.parametrize("names", [("source",), ("predictions",), ("weights",), ("bias",)])
def test_one_unaligned_tensor_beside_vectors(names: Sequence[str], dtype: torch.dtype) -> None:
    call = Convolution(channels=64, out_channels=48)
    tensors = call.tensors(dtype, DEVICE)
    check(call, dtype, tensors | {name: unaligned(tensors[name]) for name in names})


@dtypes
def test_layouts(dtype: torch.dtype) -> None:
    call = Work(channels=24, out_channels=16)
    tensors = call.tensors(dtype, DEVICE)
    expected = call.run(tensors)
    strange = {
        "source": torch.cat([tensors["source"], tensors["source"]], 1)[:, :24],
        "predictions": tensors["predictions"].t().contiguous().t(),
        "weights": tensors["weights"].permute(3, 4, 0, 1, 2).contiguous().permute(2, 3, 4, 0, 1),
        "bias": tensors["bias"].t().contiguous().t(),
        "gates": tensors["gates"].repeat_interleave(2, 1)[:, ::2],
    }
    assert not any(t.is_contiguous() for t in strange.values())
    assert_same_bits(call.run(strange), expected)
    # An expanded gradient, as that of a sum.
    grads = torch.autograd.grad(expected[0].sum(), [*tensors.values()], retain_graph=True)
    ones = torch.ones_like(expected[0])
    wanted = torch.autograd.grad(expected[0], [*tensors.values()], ones)
    assert_gradients_close(grads, wanted, dtype)


@heavy
def test_more_than_2_to_the_31_elements() -> None:
    images, height, width, channels = 9, 1000, 1000, 256
    assert images * height * width * channels > 2**31
    need_memory(70)
    source = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=DEVICE).normal_(generator=source)

    size, pixels = (height, width), height * width
    rows = normal(images * pixels, channels, dtype=torch.bfloat16).requires_grad_()
    predictions = normal(images * pixels, 27).requires_grad_()
    weight = (normal(channels, channels, 3, 3) / 48).requires_grad_()
    # The weights' gradient is that of the last image: it is the one of a call with that alone.
    grad_out = torch.zeros(images * pixels, channels, dtype=torch.bfloat16, device=DEVICE)
    last = slice((images - 1) * pixels, None)
    grad_out[last].normal_(generator=source)
    grad_mean = normal(1, images, channels)
    grad_mean[:, :-1] = 0

    def run(count: int, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        rows, predictions, weight = tensors
        plan = Plan(count, [size], [size], [Job(size, 0, [(0, 0)])])
        out, mean, *_ = deform_conv(rows, predictions, [weight], plan, moments=True)
        return out, mean

    every = (rows, predictions, weight)
    out, mean = run(images, every)
    grads = torch.autograd.grad((out, mean), every, (grad_out, grad_mean))
    one = (leaf(rows[last]), leaf(predictions[last]), leaf(weight))
    one_out, one_mean = run(1, one)
    wanted = torch.autograd.grad(
        (one_out, one_mean), one, (grad_out[last], grad_mean[:, -1:].contiguous())
    )
    assert_close([out[last], mean[:, -1:]], [one_out, one_mean], torch.float32)
    assert_close([grads[0][last], grads[1][last], grads[2]], wanted, torch.bfloat16)
    assert not any(g[: last.start].any() for g in grads[:2])
    # A small call in float64, of the last lines.
    lines = (40, width)
    part = slice(-40 * width, None)
    plan = Plan(1, [lines], [lines], [Job(lines, 0, [(0, 0)])])
    exact, *_ = deform_conv(
        rows[part].detach().double(), predictions[part].detach().double(), [weight.double()], plan
    )
    inner = slice(20 * width, None)  # whose samples are all in the part
    assert_close(out[part][inner], exact[inner], torch.bfloat16)


# --- special values -----------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("value", [-1e30, 2.0**31, -(2.0**31)])
@pytest.mark.parametrize("channels", [8, 7])
def test_far_offsets(channels: int, value: float, dtype: torch.dtype) -> None:
    call = Convolution(channels=channels, out_channels=8)
    inputs = {
        name: leaf(t) for name, t in call.displaced(call.tensors(dtype, DEVICE), value).items()
    }
    expected, wanted = expected_of(call, inputs, dtype)
    actual, grads = results(call, inputs, dtype)
    assert_close(actual, expected, dtype)
    assert_gradients_close(grads, wanted, dtype)


@dtypes
@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize(("call", "place"), CALLS_AND_PLACES)
def test_not_finite(call: str, place: str, value: float, dtype: torch.dtype) -> None:
    planted(CALLS[call], place, value, dtype, DEVICE).run()


@dtypes
def test_non_finite_values_stay_where_they_are_read(dtype: torch.dtype) -> None:
    call = Convolution(channels=24, out_channels=16, images=4)
    tensors = {name: t.detach() for name, t in call.tensors(dtype, DEVICE).items()}
    tensors["source"][7, 3] = math.nan
    expected, actual = call.reference(tensors)[0], call.run(tensors)[0]
    assert 0 < expected.isnan().sum() < expected.numel() / 4
    assert torch.equal(actual.isnan(), expected.isnan())
    assert_close(actual[~actual.isnan()], expected[~expected.isnan()], dtype)


# --- determinism --------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize(
    "call", [Work(channels=24, out_channels=16), Convolution(size=(3, 3), offset_scale=2)], ids=str
)
def test_deterministic(call: Call, dtype: torch.dtype) -> None:
    tensors = call.tensors(dtype, DEVICE)
    with deterministic():
        first = bits(call, tensors, dtype)
        for _ in range(5):
            assert_same_bits(bits(call, tensors, dtype), first)
    expected, wanted = expected_of(call, tensors, dtype)
    assert_close(first[: len(expected)], expected, dtype)
    assert_gradients_close(first[len(expected) :], wanted, dtype)


@dtypes
@pytest.mark.parametrize("name", ["a level", "all samples at one place"])
def test_deterministic_sizes(name: str, dtype: torch.dtype) -> None:
    call = SIZES[name]
    tensors = call.tensors(dtype, DEVICE)
    with deterministic():
        first = bits(call, tensors, dtype)
        for _ in range(3):
            assert_same_bits(bits(call, tensors, dtype), first)
    usual, grads = results(call, tensors, dtype)
    assert_same_bits(first[: len(usual)], usual)
    assert_gradients_close(first[len(usual) :], grads, dtype)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_deterministic_gradients_that_are_not_finite(bad: float) -> None:
    call = Convolution()
    tensors = call.tensors(torch.float32, DEVICE)
    cotangent = torch.ones_like(call.run(tensors)[0])
    cotangent[3, 2] = bad
    with deterministic():
        (grad,) = torch.autograd.grad(call.run(tensors)[0], tensors["source"], cotangent)
    assert grad.isnan().all()  # there is no step for the sums


@dtypes
def test_only_the_sources_gradient_differs_between_runs(dtype: torch.dtype) -> None:
    call = Work(channels=64, out_channels=48, scale=9)
    tensors = call.tensors(dtype, DEVICE)
    outputs = len(call.run(tensors))
    first = bits(call, tensors, dtype)
    fixed = [i for i in range(len(first)) if i != outputs]
    for _ in range(10):
        found = bits(call, tensors, dtype)
        assert_same_bits([found[i] for i in fixed], [first[i] for i in fixed])


# --- contracts of the operator ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["predictions", "weights", "bias", "gates"])
def test_a_tensor_of_another_device_raises(name: str) -> None:
    tensors = {key: t.detach() for key, t in Work().tensors(torch.float32, DEVICE).items()}
    tensors[name] = tensors[name].cpu()
    with pytest.raises(RuntimeError, match=f"expected {name} on the device"):
        Work().run(tensors)


@dtypes
def test_two_launches_forward(dtype: torch.dtype) -> None:
    call = Work(channels=64, out_channels=48, scale=9)
    tensors = {name: t.detach() for name, t in call.tensors(dtype, DEVICE).items()}
    call.run(tensors)
    names = launched(lambda: call.run(tensors))
    # Those that this test itself makes of the stacked matrices are views.
    assert len(names) == 2, names
    assert all("dyhead" in name for name in names)


# --- streams, graphs, devices -------------------------------------------------------------------


def test_runs_on_the_current_stream() -> None:
    call = replace(LEVEL, size=(50, 84))
    tensors = {name: t.detach() for name, t in call.tensors(torch.float32, DEVICE).items()}
    expected = call.run(tensors)
    late = torch.full_like(tensors["source"], math.nan)
    found = on_a_busy_stream(late, tensors["source"], lambda: call.run(tensors | {"source": late}))
    assert_same_bits(found, expected)


@dtypes
def test_graph_capture_with_the_backward(dtype: torch.dtype) -> None:
    call = Work(channels=64, out_channels=48, scale=5)
    tensors = call.tensors(dtype, DEVICE)
    cotangents = [torch.randn_like(t) for t in call.run(tensors)]

    def step() -> list[Tensor]:
        outs = call.run(tensors)
        return [
            *(x.detach() for x in outs),
            *torch.autograd.grad(outs, [*tensors.values()], cotangents),
        ]

    graph, found = captured(step)
    for seed in range(1, 4):
        other = replace(call, seed=seed).tensors(dtype, DEVICE)
        with torch.no_grad():
            for name, t in tensors.items():
                t.copy_(other[name])
        graph.replay()
        expected, count = step(), len(cotangents)
        assert_same_bits(found[:count], expected[:count])
        assert_gradients_close(found[count:], expected[count:], dtype)


def test_workspaces_of_two_streams_are_their_own() -> None:
    call = Work(channels=64, out_channels=48, scale=9)
    calls = [replace(call, seed=seed) for seed in range(4)]
    every = [c.tensors(torch.bfloat16, DEVICE) for c in calls]
    expected = [call.run(t) for t in every]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    found: list[list[Tensor]] = [[] for _ in calls]
    for _ in range(5):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[i] = call.run(every[i])
    torch.cuda.synchronize()
    for a, b in zip(found, expected, strict=True):
        assert_same_bits(a, b)


def test_runs_on_the_device_of_its_tensors() -> None:
    need_two_devices()
    call = Work(channels=64, out_channels=48, scale=9)
    assert torch.cuda.current_device() == 0
    for dtype in (torch.float32, torch.bfloat16):
        check(call, dtype, call.tensors(dtype, "cuda:1"))
    assert torch.cuda.current_device() == 0
