"""The operators and the paper's head as ONNX files, and which backend an export runs on."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from dyhead_cuda import DynamicReLU, ModulatedDeformConv2d, UnifiedDyHead, backend, functional
from dyhead_cuda.backends import select
from dyhead_cuda.numerics import ResizeMode
from tests.helpers import onnx_files
from tests.helpers.inputs import random_pyramid
from tests.helpers.modules import randomise
from tests.helpers.onnx_files import Each, Session, assert_same, export, operators, sizes_open

MODES: tuple[ResizeMode, ...] = get_args(ResizeMode)
CHANNELS = 8
TAPS = 6
GEOMETRY = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}
GROUPS = {"groups": 2, "deform_groups": 4}
SIZES = ((9, 12), (5, 7), (3, 2))


def pyramid(batch: int, *sizes: tuple[int, int]) -> list[Tensor]:
    return random_pyramid(batch, CHANNELS, sizes or SIZES, torch.float32)


class Deformable(nn.Module):
    """All options of a deformable convolution, whose offsets another one predicts."""

    def __init__(self, bias: bool, mask: bool) -> None:
        super().__init__()
        sizes: Any = {**GEOMETRY, "kernel_size": (3, 2)}
        self.conv = ModulatedDeformConv2d(CHANNELS, 6, bias=bias, **GROUPS, **sizes)
        self.offset = nn.Conv2d(CHANNELS, 8 * TAPS, **sizes)
        self.mask = nn.Conv2d(CHANNELS, 4 * TAPS, **sizes) if mask else None

    def forward(self, levels: list[Tensor]) -> Tensor:
        x = levels[0]
        out: Tensor = self.conv(x, self.offset(x), None if self.mask is None else self.mask(x))
        return out


class Relus(nn.Module):
    """The dynamic ReLU on inputs of 2, 3 and 4 dimensions."""

    def __init__(self, activation: Any) -> None:
        super().__init__()
        self.relu = DynamicReLU(CHANNELS, activation=activation)

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        x = levels[0]
        return [self.relu(y) for y in (x, x.flatten(2), x.mean((2, 3)))]


PARTS: dict[str, Callable[[], nn.Module]] = {
    "deformable": lambda: Deformable(True, True),
    "deformable, plain": lambda: Deformable(False, False),
    "relu": lambda: Relus("hsigmoid"),
    "relu, sigmoid": lambda: Relus("sigmoid"),
    "median": lambda: UnifiedDyHead(3, CHANNELS, 1, targets="median"),
    **{mode: partial(UnifiedDyHead, 3, CHANNELS, 1, resize=mode) for mode in MODES},
}


@cache
def parts() -> tuple[Each, Session]:
    model = Each({name: make() for name, make in PARTS.items()})
    randomise(model)
    return model, Session(export(model, (pyramid(1),), dynamic_shapes=(sizes_open(3),)))


@pytest.mark.parametrize(
    "levels",
    [pyramid(1), pyramid(2, (12, 10), (6, 5), (4, 3)), pyramid(2, (3, 2), (2, 1), (1, 1))],
    ids=["as exported", "another batch and size", "one pixel"],
)
def test_every_operator_is_the_reference(levels: list[Tensor]) -> None:
    model, session = parts()
    onnx_files.assert_each_same(session, model, levels)


def test_nodes_of_the_papers_head() -> None:
    """A target takes four nodes: the sum over levels is one deformable convolution."""
    model = UnifiedDyHead(3, CHANNELS, 2)
    randomise(model)
    file = export(model, (pyramid(1),))
    counts = operators(file)
    assert counts["DeformConv"] == counts["Conv"] == counts["Sigmoid"] - 2 == 2 * 3
    assert counts["Transpose"] <= 2  # of the weights
    assert counts.total() <= 90
    assert_same(Session(file), model, (pyramid(1),))


class Sampled(nn.Module):
    def forward(self, x: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
        return functional.modulated_deform_conv2d(x, offset, weight, padding=1)


@cache
def sampled() -> Session:
    shapes = (1, 4, 6, 5), (1, 18, 6, 5), (3, 4, 3, 3)
    return Session(export(Sampled(), tuple(torch.randn(shape) for shape in shapes)))


@pytest.mark.parametrize("value", [-1.0, 0.0, 0.5, 6.0, 1e9, -1e9])
def test_samples_at_and_beyond_the_border(value: float) -> None:
    """onnxruntime has the border of the published operator: nothing at -1 and beyond."""
    arguments = torch.randn(1, 4, 6, 5), torch.full((1, 18, 6, 5), value), torch.randn(3, 4, 3, 3)
    assert_same(sampled(), Sampled(), arguments)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_onnxruntime_has_zero_at_no_place(value: float) -> None:
    """Unlike this package."""
    offset = torch.zeros(1, 18, 6, 5)
    offset[0, 3, 2, 2] = value
    arguments = torch.randn(1, 4, 6, 5), offset, torch.randn(3, 4, 3, 3)
    (out,) = sampled()(arguments)
    assert out.isfinite().all()
    assert not Sampled()(*arguments).isfinite().all()


def test_dy_comes_before_dx() -> None:
    offset = torch.zeros(1, 18, 6, 5)
    offset[:, ::2] = 1.25
    arguments = torch.randn(1, 4, 6, 5), offset, torch.randn(3, 4, 3, 3)
    assert_same(sampled(), Sampled(), arguments)


@pytest.fixture
def exporting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)


@pytest.mark.usefixtures("exporting")
def test_an_export_has_a_backend_of_its_own() -> None:
    x = torch.empty(0)
    assert select(x) == "onnx"
    with backend("reference"):
        assert select(x) == "reference"
    with backend("cpu"), pytest.raises(RuntimeError, match="standard ones"):
        select(x)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:You are using the legacy:DeprecationWarning")
def test_the_old_exporter_is_refused() -> None:
    with pytest.raises(RuntimeError, match="dynamo=True"):
        torch.onnx.export(
            DynamicReLU(CHANNELS), (torch.randn(1, CHANNELS, 2, 2),), "unused", dynamo=False
        )
