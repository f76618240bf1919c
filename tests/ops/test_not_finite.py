"""NaN and infinity come through the CPU kernels as through the reference; none is lost."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dyhead_cuda import DyHead, UnifiedDyHead, backend, functional, library
from tests.helpers.compare import TOLERANCE
from tests.helpers.convolutions import PlainConvolution
from tests.helpers.deform_work import Work
from tests.helpers.not_finite import CALLS, CALLS_AND_PLACES, NOT_FINITE, planted

library.require("cpu")

dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
values = pytest.mark.parametrize("value", NOT_FINITE)
backends = pytest.mark.parametrize("chosen", ["cpu", "reference"])


@dtypes
@values
@pytest.mark.parametrize(("call", "place"), CALLS_AND_PLACES)
def test_jobs_forward_and_backward(call: str, place: str, value: float, dtype: torch.dtype) -> None:
    case = planted(CALLS[call], place, value, dtype)
    case.run()
    shown = place in ("features", "offset", "gate") or (
        place == "mask" and (math.isnan(value) or call == "masks")
    )
    assert bool(CALLS[call].reference(case.tensors)[0].isfinite().all()) != shown


@dtypes
@values
@pytest.mark.parametrize("place", ["features", "offset", "mask", "gate"])
def test_moments_show_them(place: str, value: float, dtype: torch.dtype) -> None:
    case = planted(Work(channels=17), place, value, dtype)
    case.check(case.call.run(case.tensors), {})


@dtypes
@values
@backends
def test_a_mask_far_outside(value: float, chosen: str, dtype: torch.dtype) -> None:
    """As torchvision: zero times a mask that is not finite."""
    case = PlainConvolution(batch=1, in_multiple=20)
    tensors = {name: t.detach() for name, t in case.tensors(dtype).items()}
    tensors["offset"].fill_(1000.0)
    tensors["mask"][0, 3, 1, 1] = value
    with backend(chosen):  # type: ignore[arg-type]
        out = case.run(functional.modulated_deform_conv2d, tensors)
    lost = torch.zeros(out.shape[2:], dtype=torch.bool)
    lost[1, 1] = True
    assert torch.equal(out.isnan(), lost.expand_as(out))


@values
@backends
@pytest.mark.parametrize("place", ["offset", "mask"])
@pytest.mark.parametrize("size", [(0, 2), (3, 0), (0, 0)])
def test_a_map_of_no_pixels(size: tuple[int, int], place: str, value: float, chosen: str) -> None:
    """Zero everywhere, as outside of any map."""
    x = torch.zeros(1, 2, *size, requires_grad=True)
    out_size = [n + 2 for n in size]
    offset, mask = torch.zeros(1, 18, *out_size), torch.ones(1, 9, *out_size)
    (offset if place == "offset" else mask)[0, 4, 1, 1] = value
    weight = torch.ones(3, 2, 3, 3)
    with backend(chosen):  # type: ignore[arg-type]
        out = functional.modulated_deform_conv2d(x, offset, weight, padding=2, mask=mask)
    expected = torch.zeros(1, 3, *out_size)
    expected[:, :, 1, 1] = math.nan
    torch.testing.assert_close(out, expected, equal_nan=True)
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


def levels(value: float, dtype: torch.dtype, channels: int) -> list[Tensor]:
    return [torch.full((2, channels, s, s), value, dtype=dtype) for s in (16, 8, 4)]


@dtypes
@values
@backends
def test_heads_do_not_hide_a_training_that_diverged(
    value: float, chosen: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    head = DyHead(16, 32, 6, num_groups=4)
    unified = UnifiedDyHead(levels=3, channels=16, num_blocks=2)
    with backend(chosen):  # type: ignore[arg-type]
        outs = [*head(levels(value, dtype, 16)), *unified(levels(value, dtype, 16))]
    assert not any(out.isfinite().any() for out in outs)


@backends
def test_one_value_that_is_not_finite_shows(chosen: str) -> None:
    torch.manual_seed(0)
    head = DyHead(16, 32, 2, num_groups=4)
    features = [torch.randn(2, 16, s, s) for s in (16, 8, 4)]
    features[1][1, 3, 2, 2] = math.nan
    with backend(chosen):  # type: ignore[arg-type]
        outs = head(features)
    # Normalisation, gates and means spread it over its image, by the second block over all levels.
    assert all(out[1].isnan().all() and out[0].isfinite().all() for out in outs)


def test_overflow_in_float16_shows() -> None:
    """On the kernels, which round between convolution and normalisation."""
    torch.manual_seed(0)
    head = DyHead(16, 32, 6, num_groups=4)
    for name, parameter in head.named_parameters():
        if name.endswith("mid.weight"):
            parameter.data.mul_(1e6)
    features = [torch.randn(1, 16, s, s).half() for s in (16, 8, 4)]
    with backend("cpu"):
        outs = head(features)
    assert not all(out.isfinite().all() for out in outs)
