"""The parts of a case: random data, parameters, implementations, and the work to be done."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import peers
from benchmarks.cases.precisions import GRADIENT_TOLERANCE, PRECISIONS, TOLERANCE
from benchmarks.cases.shapes import ShapeSet

Maps = list[Tensor]  # each [N, ...]: one entry of the first dimension for each image
Run = Callable[[Any, Maps], Maps]

OURS = "dyhead_cuda"
FORWARD, BOTH = "forward", "forward+backward"
DIRECTIONS = (FORWARD, BOTH)


# The peers that can be selected; ours always runs.
FAMILIES = ("reference", "torchvision", "mmcv", "layers", "compile", "dense")


def with_gradients(direction: str) -> bool:
    """Whether gradients are part of a direction.

    Raises:
        ValueError: there is no such direction.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"expected direction to be one of {DIRECTIONS}, got {direction!r}")
    return direction == BOTH


@dataclass(frozen=True)
class Setting:
    """A case at one size."""

    case: str
    shapes: ShapeSet
    batch: int = 1
    blocks: int = 1

    @property
    def title(self) -> str:
        blocks = f", {self.blocks} blocks" if self.blocks > 1 else ""
        return f"{self.case}, {self.shapes.name}, batch {self.batch}{blocks}"


@dataclass(frozen=True)
class Work:
    """The minimum work of the forward pass, for all images.

    Attributes:
        flops: of the matrix products and convolutions, a multiplication and an addition each;
            interpolation and everything per element is overhead.
        reads: values of the inputs and parameters, each read once.
        writes: values of the outputs, each written once.

    The backward pass has twice the products (the gradients of both factors), reads the inputs, the
    parameters and the gradient of the outputs, and writes the gradients of inputs and parameters.
    """

    flops: int
    reads: int
    writes: int

    def flops_of(self, direction: str) -> int:
        return self.flops * (3 if with_gradients(direction) else 1)

    def bytes_of(self, direction: str, itemsize: int) -> int:
        values = self.reads + self.writes
        if with_gradients(direction):
            values += 2 * self.reads + self.writes
        return values * itemsize

    def __add__(self, other: Work) -> Work:
        """The work of two steps, the second of which reads what the first wrote."""
        return Work(self.flops + other.flops, self.reads + other.reads, self.writes + other.writes)


def _as_they_are(maps: Maps) -> Maps:
    return maps


@dataclass(frozen=True)
class Layout:
    """How an implementation holds maps: ``encode`` brings them there, ``decode`` back."""

    encode: Callable[[Maps], Maps]
    decode: Callable[[Maps], Maps] = _as_they_are


def _channels_last(maps: Maps) -> Maps:
    return [
        x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.contiguous()
        for x in maps
    ]


NCHW = Layout(lambda maps: [x.contiguous() for x in maps])
CHANNELS_LAST = Layout(_channels_last)


@dataclass(frozen=True)
class Implementation:
    """One way to compute a case.

    Attributes:
        name: in tables and files.
        family: one of ``FAMILIES``, or "" for ours.
        run: from the module and the encoded inputs to the outputs.
        inputs, outputs: the layouts that ``run`` takes and returns; bringing data there is not
            timed.
        adapt: makes the module that it runs on of the case's; None where it is the same kind.
        operator: the name in :func:`peers.deform_convs` that decides about precisions.
        backend: what :func:`dyhead_cuda.backend` is set to; "own" for that of the device.
        compiled: its first call compiles, which says nothing about memory.
        directions: in which it is something of its own.
        bar: not the same function, but work to compare with; its result is not checked.
    """

    name: str
    family: str
    run: Run
    inputs: Layout = NCHW
    outputs: Layout = NCHW
    adapt: Callable[[Any], nn.Module] | None = None
    operator: str | None = None
    backend: str = "auto"
    compiled: bool = False
    directions: tuple[str, ...] = DIRECTIONS
    bar: bool = False

    def __post_init__(self) -> None:
        if self.family not in ("", *FAMILIES):
            raise ValueError(f"expected family to be one of {FAMILIES}, got {self.family!r}")

    def precision_for(self, precision: str, device: torch.device) -> str:
        """The precision that it runs in when asked for ``precision``: the best that it supports."""
        if self.family == "reference" and precision in ("float16", "bfloat16"):
            return "float32"  # the reference computes in float32 anyway
        if self.operator is None:
            return precision
        better = ["float16", "float32"] if device.type == "cuda" else ["float32"]
        for candidate in [precision, *better]:
            if peers.supports(self.operator, PRECISIONS[candidate], device):
                return candidate
        return precision

    def module_of(self, template: nn.Module, device: torch.device, precision: str) -> nn.Module:
        """A copy of the module, adapted to the implementation."""
        made = self.adapt(template) if self.adapt else copy.deepcopy(template)
        return made.to(device, PRECISIONS[precision])


@dataclass(frozen=True)
class Problem:
    """A case at one size with its data, on the CPU in float32.

    All values are such that bfloat16 holds them exactly, so that one float64 result judges every
    precision. The last image is the same for every batch size.
    """

    setting: Setting
    images: Maps
    module: nn.Module
    reference: Implementation
    implementations: list[Implementation]
    work: Work
    tolerance: Mapping[str, float] = field(default_factory=lambda: TOLERANCE)  # of ours
    gradient_tolerance: Mapping[str, float] = field(default_factory=lambda: GRADIENT_TOLERANCE)
    # The error that gradients may have at real sizes: of millions of values a few lie so close to a
    # kink (a maximum, a pixel's edge) that rounding decides the side, and gradients jump there.
    jumps: float = 2e-3


def ours(run: Run, name: str = OURS, **options: Any) -> Implementation:
    layouts = {"inputs": CHANNELS_LAST, "outputs": CHANNELS_LAST}
    return Implementation(name, "", run, backend="own", **{**layouts, **options})


def reference_of(run: Run) -> Implementation:
    return Implementation("reference", "reference", run, backend="reference")


def on_each_operator(run_with: Callable[[peers.DeformConv], Run]) -> list[Implementation]:
    """The layers on every deformable convolution that is installed."""
    return [
        Implementation(name, name, run_with(operator), operator=name)
        for name, operator in peers.deform_convs().items()
    ]


def dense(run: Run) -> Implementation:
    name = "dense convolution"
    return Implementation(name, "dense", run, CHANNELS_LAST, CHANNELS_LAST, bar=True)


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` of a function, the same object for the same function."""
    return torch.compile(function, dynamic=False)


def exact(t: Tensor) -> Tensor:
    """Rounded to what bfloat16 holds."""
    return t.to(torch.bfloat16).to(torch.float32)


def random_maps(shapes: Sequence[Sequence[int]], batch: int, seed: int) -> Maps:
    """Normal values [N, *shape]. Images count from the last: it is the same for every ``batch``."""
    maps = []
    for index, shape in enumerate(shapes):
        images = []
        for image in range(batch):
            source = torch.Generator().manual_seed(
                seed * 1_000_003 + index * 1009 + batch - 1 - image
            )
            images.append(torch.randn(tuple(shape), generator=source))
        maps.append(exact(torch.stack(images)))
    return maps


def randomised(module: nn.Module, seed: int = 7) -> nn.Module:
    """Draws all parameters: weights of unit gain, vectors around their initial values."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            noise = torch.randn(p.shape, generator=source)
            if p.dim() > 1:
                fan_in = math.prod(p.shape[1:][-3:])
                p.copy_(exact(noise / math.sqrt(fan_in)))
            else:
                p.copy_(exact(p + 0.3 * noise))
    return module.requires_grad_(False)


def parameter_count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
