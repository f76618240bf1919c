"""Calls of deform_conv for tests, and what they should give, map by map."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from dyhead_cuda import reference
from dyhead_cuda.ops.common import compute_dtype
from dyhead_cuda.ops.deform_conv import deform_conv
from dyhead_cuda.ops.jobs import Job, Plan, ReadRule, Size, UpsampleMode, map_rows
from tests.helpers.compare import leaf
from tests.helpers.resizing import resized

Tensors = dict[str, Tensor]
GRADIENTS = ("source", "predictions", "weights", "bias", "gates")  # of deform_conv_bwd


@dataclass(frozen=True)
class Call(ABC):
    """A plan, and tensors by name: source, predictions, weights, and where used bias and gates.

    Weights and biases are stacked.
    """

    images: int = 2
    moments: bool = False
    out_in_compute_dtype: bool = False

    @property
    @abstractmethod
    def plan(self) -> Plan: ...

    @abstractmethod
    def values(self) -> Tensors:
        """In float64, on the CPU."""

    def tensors(self, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensors:
        compute = compute_dtype(dtype)
        return {
            name: leaf(value.to(device), dtype if name == "source" else compute)
            for name, value in self.values().items()
        }

    def run(self, tensors: Tensors) -> list[Tensor]:
        results = deform_conv(
            tensors["source"],
            tensors["predictions"],
            tensors["weights"].unbind(),
            self.plan,
            tensors["bias"].unbind() if "bias" in tensors else (),
            tensors.get("gates"),
            out_in_compute_dtype=self.out_in_compute_dtype,
            moments=self.moments,
        )
        return list(results if self.moments else results[:1])

    def arguments(self, tensors: Tensors) -> tuple[Any, ...]:
        """Of ``deform_conv_fwd``."""
        plan = self.plan
        return (
            tensors["source"],
            tensors["predictions"],
            list(tensors["weights"].unbind()),
            list(tensors["bias"].unbind()) if "bias" in tensors else [],
            tensors.get("gates"),
            *plan.tables,
            plan.mask_logits,
            self.out_in_compute_dtype,
            self.moments,
            False,
        )

    def backward_arguments(self, tensors: Tensors) -> tuple[Any, ...]:
        """Of ``deform_conv_bwd``, with random gradients."""
        plain = {name: t.detach() for name, t in tensors.items()}
        arguments = self.arguments(plain)
        out, mean, *_ = torch.ops.dyhead.deform_conv_fwd(*arguments)
        grads = [torch.randn_like(mean) if self.moments else None for _ in range(3)]
        source, predictions, weights, _, gates, *tables, _, _ = arguments
        first = [torch.randn_like(out), *grads, source, predictions, weights, gates, out, mean]
        wanted = [int(name in tensors) for name in GRADIENTS]
        return (*first, *tables, wanted, False, False)

    def reference(self, tensors: Tensors) -> list[Tensor]:
        """The same in float64: map by map, with the reference's 3x3 convolution."""
        t = {name: value.double() for name, value in tensors.items()}
        plan, channels = self.plan, t["weights"].shape[1]
        sources = self.maps(t["source"], plan.sources)
        predicted = self.maps(t["predictions"], plan.predictions)
        maps, statistics = [], []
        for job in plan.jobs:
            size = job.out
            if job.predictions is not None:
                predictions = predicted[job.predictions]
                offset = read(predictions[:, :18], size, job.offset_rule)
                mask = read(predictions[:, 18:], size, job.mask_rule)
                mask = mask.sigmoid() if plan.mask_logits else mask
            y = t["source"].new_zeros(self.images, channels, *size)
            for source, weight in job.terms:
                x, w = sources[source], t["weights"][weight]
                gate = t["gates"][:, source].view(-1, 1, 1, 1) if "gates" in t else 1
                if job.predictions is None:
                    y = y + gate * convolution_of_size(x, size, w, job.stride)
                else:
                    read_at = offset, mask * gate
                    y = y + convolution_of_size(x, size, w, job.stride, read_at)
            if "bias" in t:
                y = y + t["bias"][job.terms[0][1]].view(1, -1, 1, 1)
            means_of = resized(y, job.upsampled or size, job.up_mode)
            maps.append(y.permute(0, 2, 3, 1).reshape(-1, channels))
            mean = y.mean((2, 3))
            var = (y - mean[:, :, None, None]).square().mean((2, 3))
            statistics.append((mean, var, means_of.mean((2, 3))))
        moments = [torch.stack(values) for values in zip(*statistics, strict=True)]
        return [torch.cat(maps), *(moments if self.moments else [])]

    def maps(self, rows: Tensor, sizes: Sequence[Size]) -> list[Tensor]:
        """The maps [N, C, H, W] of the given sizes, which lie one after the other."""
        parts = rows.split(map_rows(sizes, self.images))
        return [
            part.view(self.images, *size, rows.shape[1]).permute(0, 3, 1, 2)
            for part, size in zip(parts, sizes, strict=True)
        ]


def normals(seed: int) -> Any:
    """A function of a shape that gives normal values in float64."""
    source = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source, dtype=torch.float64)

    return normal


def off_the_grid(offsets: Tensor, noise: Tensor) -> Tensor:
    """Away from integer coordinates, where the derivative jumps."""
    return offsets.floor() + 0.1 + 0.8 * noise.sigmoid()


@dataclass(frozen=True)
class Work(Call):
    """All that a call can do: jobs of several terms, all read rules, gates, bias and moments.

    No job reads source map 2 and weights 3.
    """

    channels: int = 2
    out_channels: int = 3
    mask_logits: bool = True
    with_bias: bool = True
    with_gates: bool = True
    moments: bool = True
    scale: int = 1  # of all sizes
    seed: int = 0

    @property
    def plan(self) -> Plan:
        s = self.scale
        sources = [(3 * s, 4 * s), (2 * s, 2 * s), (s, s), (2 * s, 3 * s)]
        jobs = [
            Job((3 * s, 4 * s), 0, [(0, 0), (1, 1)]),
            Job((2 * s, 2 * s), 0, [(1, 2)], (1, 1), ReadRule.FLAT, ReadRule.CROP, (3 * s, 4 * s)),
            Job(
                (2 * s, 2 * s),
                0,
                [(0, 0)],
                (2, 2),
                ReadRule.CROP,
                ReadRule.FLAT,
                (2 * s, 5 * s),
                UpsampleMode.NEAREST,
            ),
            Job((s, 2 * s), 1, [(3, 1), (0, 2), (3, 1)], (1, 2), upsampled=(1, 1)),
            Job((2 * s, 3 * s), None, [(3, 4), (1, 0)]),
        ]
        predictions = [(3 * s, 4 * s), (s, 2 * s)]
        return Plan(self.images, sources, predictions, jobs, mask_logits=self.mask_logits)

    def values(self) -> Tensors:
        n, plan, normal = self.images, self.plan, normals(self.seed)
        predictions = normal(sum(map_rows(plan.predictions, n)), 27)
        predictions[:, :18] = off_the_grid(predictions[:, :18], predictions[:, 18:].repeat(1, 2))
        values = {
            "source": normal(sum(map_rows(plan.sources, n)), self.channels),
            "predictions": predictions,
            "weights": normal(5, self.out_channels, self.channels, 3, 3) / 3,
        }
        if self.with_bias:
            values["bias"] = normal(5, self.out_channels)
        if self.with_gates:
            values["gates"] = normal(n, len(plan.sources))
        return values


@dataclass(frozen=True)
class ManyJobs(Call):
    """More jobs, terms and sources than the tables of a CUDA launch hold."""

    moments: bool = True
    count: int = 40
    channels: int = 8

    @property
    def plan(self) -> Plan:
        maps, count = [(2, 3)] * self.count, self.count
        jobs = [
            Job(
                size,
                i // 2,
                [(i, 0), ((i * 7) % count, 1), ((i + 1) % count, 0)],
                upsampled=(4, 5),
            )
            for i, size in enumerate(maps)
        ]
        return Plan(self.images, maps, maps[: count // 2], jobs)

    def values(self) -> Tensors:
        normal, channels, rows = normals(3), self.channels, self.images * 6 * self.count
        predictions = normal(rows // 2, 27)
        predictions[:, :18] = off_the_grid(predictions[:, :18], normal(rows // 2, 18))
        return {
            "source": normal(rows, channels),
            "predictions": predictions,
            "weights": normal(2, channels, channels, 3, 3) / 8,
            "bias": normal(2, channels),
            "gates": normal(self.images, self.count),
        }


@dataclass(frozen=True)
class Convolution(Call):
    """One deformable convolution of any geometry."""

    images: int = 1
    channels: int = 16
    out_channels: int = 16
    size: tuple[int, int] = (9, 10)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    deform_groups: int = 1
    offset_scale: float = 1.0

    @property
    def output(self) -> Size:
        return output_of(self, self.size)

    @property
    def plan(self) -> Plan:
        return Plan(
            self.images,
            [self.size],
            [self.output],
            [Job(self.output, 0, [(0, 0)], self.stride)],
            self.kernel,
            self.padding,
            self.dilation,
            self.groups,
            self.deform_groups,
            mask_logits=False,
        )

    def values(self) -> Tensors:
        normal = normals(7)
        taps = self.kernel[0] * self.kernel[1] * self.deform_groups
        offsets = self.offset_scale * normal(self.images * math.prod(self.output), 2 * taps)
        offsets = off_the_grid(offsets, normal(*offsets.shape))
        masks = normal(offsets.shape[0], taps).sigmoid()
        shape = (1, self.out_channels, self.channels // self.groups, *self.kernel)
        return {
            "source": normal(self.images * math.prod(self.size), self.channels),
            "predictions": torch.cat([offsets, masks], 1),
            "weights": normal(*shape) / math.sqrt(self.channels // self.groups * taps),
            "bias": normal(1, self.out_channels),
        }

    def reference(self, tensors: Tensors) -> list[Tensor]:
        t = {name: value.double() for name, value in tensors.items()}
        (predictions,) = self.maps(t["predictions"], [self.output])
        (source,) = self.maps(t["source"], [self.size])
        offsets = predictions.shape[1] // 3 * 2
        y = reference.modulated_deform_conv2d(
            source,
            predictions[:, :offsets],
            t["weights"][0],
            t["bias"][0],
            self.stride,
            self.padding,
            self.dilation,
            predictions[:, offsets:],
        )
        return [y.permute(0, 2, 3, 1).reshape(-1, self.out_channels)]

    def displaced(self, tensors: Tensors, value: float) -> Tensors:
        """With offsets of ``value``, beyond every border."""
        moved = {name: t.detach().clone() for name, t in tensors.items()}
        moved["predictions"][::3, :18] = value
        moved["predictions"][1::3, 4] = value
        return moved


@dataclass(frozen=True)
class Plain(Call):
    """A plain convolution of several maps, as the one that predicts offsets and masks."""

    out_in_compute_dtype: bool = True
    channels: int = 16
    out_channels: int = 27
    sizes: tuple[Size, ...] = ((9, 17), (3, 4))
    kernel: Size = (3, 3)
    stride: Size = (1, 1)
    padding: Size = (1, 1)
    dilation: Size = (1, 1)
    groups: int = 1
    with_bias: bool = True

    @property
    def plan(self) -> Plan:
        outs = [output_of(self, size) for size in self.sizes]
        jobs = [Job(out, None, [(i, 0)], self.stride) for i, out in enumerate(outs)]
        return Plan(
            self.images,
            self.sizes,
            [(0, 0)],
            jobs,
            self.kernel,
            self.padding,
            self.dilation,
            self.groups,
        )

    def values(self) -> Tensors:
        normal = normals(11)
        shape = (1, self.out_channels, self.channels // self.groups, *self.kernel)
        values = {
            "source": normal(sum(map_rows(self.sizes, self.images)), self.channels),
            "predictions": normal(0, 3 * math.prod(self.kernel)),
            "weights": normal(*shape) / math.sqrt(math.prod(shape[2:])),
        }
        if self.with_bias:
            values["bias"] = normal(1, self.out_channels)
        return values

    def reference(self, tensors: Tensors) -> list[Tensor]:
        t = {name: value.double() for name, value in tensors.items()}
        bias = t["bias"][0] if "bias" in t else None
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        maps = [
            conv2d(x, t["weights"][0], bias, *geometry) for x in self.maps(t["source"], self.sizes)
        ]
        rows = [y.permute(0, 2, 3, 1).reshape(-1, self.out_channels) for y in maps]
        return [torch.cat(rows) + t["predictions"].sum()]  # of no values


def output_of(work: Convolution | Plain, size: Size) -> Size:
    height, width = (
        (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
        for size, pad, dilation, kernel, stride in zip(
            size, work.padding, work.dilation, work.kernel, work.stride, strict=True
        )
    )
    return height, width


def read(values: Tensor, size: tuple[int, int], rule: int) -> Tensor:
    height, width = size
    if rule != ReadRule.FLAT:
        return values[:, :, :height, :width]
    n, k = values.shape[:2]
    return values.flatten(1)[:, : k * height * width].reshape(n, k, height, width)


def convolution_of_size(
    x: Tensor,
    size: tuple[int, int],
    weight: Tensor,
    stride: tuple[int, int],
    read_at: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """A convolution of as many output pixels as asked for, deformable with offset and mask.

    Zeros below and to the right of x change no sample. Pixels beyond ``size`` are cut off, and read
    nothing, as their gradient of 0 times NaN would be NaN.
    """
    needed = [
        max(have, (out - 1) * step + 1)
        for have, out, step in zip(x.shape[2:], size, stride, strict=True)
    ]
    outs = [(have - 1) // step + 1 for have, step in zip(needed, stride, strict=True)]

    def padded(t: Tensor, to: Sequence[int], value: float = 0.0) -> Tensor:
        return pad(t, (0, to[1] - t.shape[3], 0, to[0] - t.shape[2]), value=value)

    x = padded(x, needed)
    if read_at is None:
        out = conv2d(x, weight, padding=1, stride=stride)
    else:
        offset, mask = padded(read_at[0], outs, 1e9), padded(read_at[1], outs)
        out = reference.modulated_deform_conv2d(x, offset, weight, None, stride, 1, 1, mask)
    return out[:, :, : size[0], : size[1]]


ONE_PIXEL = Convolution(size=(1, 1), moments=True)

WORKS = {
    "all": Work(),
    "without moments": Work(moments=False),
    "wide": Work(moments=False, out_in_compute_dtype=True, channels=33),
    "without bias and gates": Work(with_bias=False, with_gates=False),
    "plain masks": Work(mask_logits=False, with_gates=False),
    "many channels": Work(channels=70, out_channels=40),
    "several chunks": Work(images=3, channels=5, out_channels=4, scale=9),
    "no images": Work(images=0),
}

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

# What the CUDA kernel with wgmma takes: steps of 64 channels, more than 128 outputs of a group.
WGMMA = {
    "small": Convolution(channels=64, out_channels=256, size=(8, 16)),
    "odd tiles": Convolution(channels=64, out_channels=136, size=(9, 34), images=3),
    "shared tiles": Convolution(channels=128, out_channels=256, size=(9, 34), images=2),
    "jobs": Work(images=3, channels=64, out_channels=256, scale=4),
    "without bias and gates": Work(
        channels=128, out_channels=144, with_bias=False, with_gates=False, moments=False
    ),
    "groups": Convolution(channels=256, out_channels=512, size=(8, 17), groups=2, deform_groups=4),
    "columns": Convolution(channels=64, out_channels=520, size=(5, 9), kernel=(1, 3)),
    "float32 outputs": Work(channels=64, out_channels=256, out_in_compute_dtype=True),
    "far offsets": Convolution(channels=64, out_channels=256, size=(9, 20), offset_scale=9),
}

# On both sides of what the CUDA kernel of plain convolutions takes: 3x3 without strides and
# dilation, up to 32 outputs of a group, vectors of channels, maps that are not too narrow.
PLAIN = {
    "predicting": Plain(channels=136, sizes=((17, 33), (8, 16), (3, 4))),
    "rounded": Plain(images=1, out_in_compute_dtype=False, out_channels=32, with_bias=False),
    "padded": Plain(images=3, channels=8, out_channels=5, sizes=((5, 9),), padding=(3, 0)),
    "plain groups": Plain(channels=144, out_channels=36, groups=2, padding=(0, 2)),
    "odd channels": Plain(channels=12),
    "many outputs": Plain(out_channels=40),
    "narrow map": Plain(sizes=((1, 100), (3, 4))),
    "one row": Plain(kernel=(1, 3), padding=(0, 1)),
    "plain strides": Plain(stride=(2, 1)),
    "dilated": Plain(dilation=(1, 2)),
    "nothing": Plain(images=0),
}
