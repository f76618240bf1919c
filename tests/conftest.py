"""What all tests share: tolerances, error measures, random inputs, seeds."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from importlib.util import find_spec

import hypothesis
import pytest
import torch
from torch import Tensor

from dyhead_cuda.pyramid import BlockParameters, BranchParameters

# Relative L2 error against the float64 reference; gradients may have twice that.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}

hypothesis.settings.register_profile(
    "dyhead",
    derandomize=True,
    deadline=None,
    max_examples=30,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("dyhead")


# On a machine that is lent as it is, make gpu-check runs what can run.
_MISSING = [name for name in ("pycocotools", "sklearn", "torchvision") if find_spec(name) is None]
collect_ignore = ["detection"] if _MISSING else []
if _MISSING and os.environ.get("CI"):
    raise pytest.UsageError(f"the tests of detectors need {', '.join(_MISSING)}")


def pytest_report_header() -> list[str]:
    if not _MISSING:
        return []
    return [f"tests/detection is left out: {', '.join(_MISSING)} not installed (extra: detection)"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    no_gpu = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(no_gpu)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def threads() -> Iterator[None]:
    """For tests that call torch.set_num_threads: the number of before comes back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected|| in float64; NaN if there is one; absolute upon zeros."""
    assert actual.shape == expected.shape, f"expected {expected.shape}, got {actual.shape}"
    a = actual.detach().double()
    b = expected.detach().to(a.device).double()
    error, size = (a - b).norm(), b.norm()
    return float(error / size) if size > 0 else float(error)


def assert_close(
    actual: Tensor | Sequence[Tensor],
    expected: Tensor | Sequence[Tensor],
    dtype: torch.dtype = torch.float64,
    factor: float = 1,
) -> None:
    """Within ``factor`` times the tolerance of ``dtype``; ``expected`` may be more precise."""
    if isinstance(actual, Tensor) or isinstance(expected, Tensor):
        assert isinstance(actual, Tensor)
        assert isinstance(expected, Tensor)
        actual, expected = [actual], [expected]
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        error = relative_l2(a, b)
        assert error <= factor * TOLERANCE[dtype], f"relative L2 error {error:.3g} of tensor {i}"


def assert_gradients_close(
    actual: Sequence[Tensor],
    expected: Sequence[Tensor],
    dtype: torch.dtype = torch.float64,
    floor: float = 1e-3,
) -> None:
    """Each within twice the tolerance of its own norm, or of ``floor`` times the largest norm.

    The second is for gradients whose terms cancel: that of a bias before a normalisation, for one.
    """
    largest = max(float(g.double().norm()) for g in expected)
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == b.shape, f"gradient {i}: expected {b.shape}, got {a.shape}"
        difference = float((a.double() - b.double()).norm())
        error = difference / max(float(b.double().norm()), floor * largest, 1e-300)
        assert error <= 2 * TOLERANCE[dtype], f"gradient {i}: relative L2 error {error:.3g}"


def leaf(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy of ``t`` of its own memory that asks for a gradient."""
    return t.detach().clone().to(dtype or t.dtype).requires_grad_()


def random_like(*tensors: Tensor, seed: int = 99) -> list[Tensor]:
    """Normal values in float64 with the shapes of the tensors."""
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(t.shape, generator=source, dtype=torch.float64) for t in tensors]


def gradients(
    outputs: Tensor | Sequence[Tensor],
    inputs: Sequence[Tensor],
    rounded_to: torch.dtype = torch.float64,
) -> list[Tensor]:
    """Gradients of ``inputs`` for random cotangents, equal for equal shapes and ``rounded_to``."""
    outs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    cotangents = [t.to(rounded_to).to(out) for t, out in zip(random_like(*outs), outs, strict=True)]
    return list(torch.autograd.grad(outs, list(inputs), cotangents))


def halving_sizes(height: int, width: int, levels: int) -> list[tuple[int, int]]:
    """Sizes of a valid pyramid, finest first."""
    sizes = [(height, width)]
    while len(sizes) < levels:
        height, width = -(-height // 2), -(-width // 2)
        sizes.append((height, width))
    return sizes


def random_pyramid(
    batch: int,
    channels: int,
    sizes: Sequence[tuple[int, int]],
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> list[Tensor]:
    """Normal feature maps [N, C, H, W], one for each of ``sizes``."""
    source = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, channels, *size, generator=source, dtype=torch.float64).to(dtype)
        for size in sizes
    ]


def random_block_parameters(
    in_channels: int,
    out_channels: int,
    *,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
    offset_scale: float = 1.0,
    seed: int = 1,
) -> BlockParameters:
    """Parameters of a block of which none is zero or constant, with offsets of a few pixels.

    The norm and gate biases keep the gates and the dynamic ReLU on both sides of their corners.
    """
    source = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0, around: float = 0.0) -> Tensor:
        values = torch.randn(shape, generator=source, dtype=torch.float64)
        return (around + scale * values).to(dtype)

    def branch() -> BranchParameters:
        return BranchParameters(
            normal(out_channels, in_channels, 3, 3, scale=(9 * in_channels) ** -0.5),
            normal(out_channels) if bias else None,
            normal(out_channels, scale=0.3, around=1),
            normal(out_channels, scale=0.5),
        )

    hidden = max(1, out_channels // 4)
    return BlockParameters(
        normal(27, in_channels, 3, 3, scale=offset_scale * (9 * in_channels) ** -0.5),
        normal(27, scale=0.5),
        branch(),
        branch(),
        branch(),
        normal(out_channels, scale=out_channels**-0.5),
        normal(1, around=0.5),
        normal(hidden, out_channels, scale=out_channels**-0.5),
        normal(hidden, around=0.5),
        normal(4 * out_channels, hidden, scale=hidden**-0.5),
        normal(4 * out_channels),
    )


def flat_parameters(parameters: BlockParameters) -> list[Tensor]:
    """All tensors of ``parameters``, in order."""
    tensors: list[Tensor] = []
    for value in parameters:
        tensors += [t for t in value if t is not None] if isinstance(value, tuple) else [value]
    return tensors


def rebuild_parameters(like: BlockParameters, tensors: Sequence[Tensor]) -> BlockParameters:
    """``tensors`` in the places where :func:`flat_parameters` found those of ``like``."""
    rest = iter(tensors)

    def take(value: Tensor | BranchParameters | None) -> Tensor | BranchParameters | None:
        if isinstance(value, BranchParameters):
            return BranchParameters(*map(take, value))  # type: ignore[arg-type]
        return None if value is None else next(rest)

    return BlockParameters(*map(take, like))  # type: ignore[arg-type]


def random_relu_inputs(
    shape: Sequence[int],
    dtype: torch.dtype = torch.float64,
    *,
    hidden: int | None = None,
    parameter_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> list[Tensor]:
    """x of ``shape`` and the four parameters of a dynamic ReLU, with some gates saturated."""
    source = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=source, dtype=torch.float64)

    channels = shape[1]
    hidden = hidden or max(1, channels // 4)
    mean = normal(shape[0], channels).view(shape[0], channels, *[1] * (len(shape) - 2))
    values = [
        normal(*shape) + 0.5 * mean,
        normal(hidden, channels) / math.sqrt(channels),
        normal(hidden) + 0.5,
        normal(4 * channels, hidden) / math.sqrt(hidden),
        2 * normal(4 * channels),
    ]
    kinds = [dtype] + [parameter_dtype or dtype] * 4
    return [leaf(value, kind) for value, kind in zip(values, kinds, strict=True)]
