"""Calls of offset_deform_conv for tests, what they should give, and the same as two calls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dyhead_cuda.ops.common import compute_dtype
from dyhead_cuda.ops.deform_conv import deform_conv
from dyhead_cuda.ops.jobs import Job, Plan, ReadRule, Size, map_rows
from dyhead_cuda.ops.offset_deform_conv import offset_deform_conv
from tests.helpers.deform_work import Call, Tensors, convolution_of_size, normals

GRADIENTS = ("source", "offset_weight", "offset_bias", "weights", "bias")  # of the backward


def offset_plan(
    images: int,
    sources: Sequence[Size],
    predictions: int,
    kernel: Size = (3, 3),
    padding: Size = (1, 1),
    dilation: Size = (1, 1),
) -> Plan:
    """The convolution that predicts for the first so many source maps, as plain jobs."""
    jobs = [Job(size, None, [(i, 0)]) for i, size in enumerate(sources[:predictions])]
    return Plan(images, sources, [(0, 0)], jobs, kernel, padding, dilation)


@dataclass(frozen=True)
class OffsetCall(Call):
    """A plan, and tensors by name, as GRADIENTS; biases only where they are used.

    Predicted offsets are around half a pixel and one or two whole ones: away from the places where
    a gradient jumps.
    """

    images: int = 2
    moments: bool = True
    channels: int = 4
    out_channels: int = 3
    with_bias: bool = True
    seed: int = 0

    @property
    def matrices(self) -> int:
        return 1 + max(weight for job in self.plan.jobs for _, weight in job.terms)

    def values(self) -> Tensors:
        plan, normal, c = self.plan, normals(self.seed), self.channels
        offsets, taps = 2 * plan.deform_groups * math.prod(plan.kernel), math.prod(plan.kernel)
        columns = 3 * offsets // 2
        scale = torch.full((columns, 1, 1, 1), 1.0, dtype=torch.float64)
        scale[:offsets] = 0.08
        bias = normal(columns)
        bias[:offsets] = bias[:offsets].clamp(-2, 1).floor() + 0.5
        weights = normal(self.matrices, self.out_channels, c // plan.groups, *plan.kernel)
        values = {
            "source": normal(sum(map_rows(plan.sources, self.images)), c),
            "offset_weight": scale * normal(columns, c, *plan.kernel) / math.sqrt(taps * c),
            "offset_bias": bias,
            "weights": weights / 3,
            "bias": normal(self.matrices, self.out_channels),
        }
        return values if self.with_bias else {k: v for k, v in values.items() if k != "bias"}

    def run(self, tensors: Tensors) -> list[Tensor]:
        return list(
            offset_deform_conv(
                tensors["source"],
                tensors["offset_weight"],
                tensors.get("offset_bias"),
                tensors["weights"].unbind(),
                self.plan,
                tensors["bias"].unbind() if "bias" in tensors else (),
            )
        )

    def separately(self, tensors: Tensors) -> list[Tensor]:
        """By two calls of deform_conv."""
        plan, source = self.plan, tensors["source"]
        plain = offset_plan(
            self.images,
            plan.sources,
            len(plan.predictions),
            plan.kernel,
            plan.padding,
            plan.dilation,
        )
        dtype = compute_dtype(source.dtype)
        predictions, *_ = deform_conv(
            source,
            source.new_zeros(0, 3 * math.prod(plan.kernel), dtype=dtype),
            [tensors["offset_weight"]],
            plain,
            [tensors["offset_bias"]] if "offset_bias" in tensors else (),
            out_in_compute_dtype=True,
        )
        biases = tensors["bias"].unbind() if "bias" in tensors else ()
        matrices = tensors["weights"].unbind()
        return list(deform_conv(source, predictions, matrices, plan, biases, moments=True))

    def reference(self, tensors: Tensors) -> list[Tensor]:
        t = {name: value.double() for name, value in tensors.items()}
        maps = self.maps(t["source"], self.plan.sources)[: len(self.plan.predictions)]
        rows = []
        for x in maps:
            y = convolution_of_size(x, (x.shape[2], x.shape[3]), t["offset_weight"], (1, 1))
            if "offset_bias" in t:
                y = y + t["offset_bias"].view(1, -1, 1, 1)
            rows.append(y.permute(0, 2, 3, 1).reshape(-1, y.shape[1]))
        return super().reference({**t, "predictions": torch.cat(rows)})

    def arguments(self, tensors: Tensors) -> tuple[Any, ...]:
        """Of ``offset_deform_conv_fwd``."""
        return (
            tensors["source"],
            tensors["offset_weight"],
            tensors.get("offset_bias"),
            list(tensors["weights"].unbind()),
            list(tensors["bias"].unbind()) if "bias" in tensors else None,
            *self.plan.tables,
            self.plan.mask_logits,
            False,
        )

    def backward_arguments(self, tensors: Tensors) -> tuple[Any, ...]:
        """Of ``offset_deform_conv_bwd``, with random gradients."""
        arguments = self.arguments({name: t.detach() for name, t in tensors.items()})
        predictions, out, mean, *_ = torch.ops.dyhead.offset_deform_conv_fwd(*arguments)
        grads = [torch.randn_like(out), *(torch.randn_like(mean) for _ in range(3))]
        source, offset_weight, _, weights, _, *tables, _ = arguments
        given = [*grads, source, offset_weight, weights, predictions, out, mean]
        return (*given, *tables, [1] * len(GRADIENTS), False, False)


@dataclass(frozen=True)
class OffsetWork(OffsetCall):
    """All read rules, several terms, a stride, and a source map without predictions."""

    mask_logits: bool = True
    scale: int = 1  # of all sizes

    @property
    def plan(self) -> Plan:
        s = self.scale
        sources: list[Size] = [(3 * s, 4 * s), (2 * s, 2 * s), (s, 2 * s)]
        jobs = [
            Job((3 * s, 4 * s), 0, [(0, 0)]),
            Job((2 * s, 2 * s), 0, [(1, 1)], (1, 1), ReadRule.FLAT, ReadRule.CROP, (3 * s, 4 * s)),
            Job((2 * s, 2 * s), 1, [(0, 2)], (2, 2)),
            Job((2 * s, 2 * s), 1, [(1, 0), (2, 1)]),
        ]
        return Plan(self.images, sources, sources[:2], jobs, mask_logits=self.mask_logits)


@dataclass(frozen=True)
class OffsetConvolution(OffsetCall):
    """One deformable convolution of any geometry that keeps the size of its map."""

    channels: int = 12
    out_channels: int = 6
    size: Size = (7, 9)
    kernel: Size = (3, 3)
    dilation: Size = (1, 1)
    groups: int = 1
    deform_groups: int = 1

    @property
    def plan(self) -> Plan:
        height, width = (d * (k - 1) // 2 for d, k in zip(self.dilation, self.kernel, strict=True))
        return Plan(
            self.images,
            [self.size],
            [self.size],
            [Job(self.size, 0, [(0, 0)])],
            self.kernel,
            (height, width),
            self.dilation,
            self.groups,
            self.deform_groups,
        )


WORKS: dict[str, OffsetCall] = {
    "all": OffsetWork(),
    "plain masks": OffsetWork(mask_logits=False),
    "without bias": OffsetWork(with_bias=False),
    "many channels": OffsetWork(channels=72, out_channels=40),
    "several chunks": OffsetWork(images=3, channels=5, out_channels=4, scale=9),
    "no images": OffsetWork(images=0),
}
# The reference has 3x3 kernels and one group only.
CONVOLUTIONS: dict[str, OffsetCall] = {
    "groups": OffsetConvolution(groups=2, deform_groups=3),
    "large kernel": OffsetConvolution(kernel=(5, 3), dilation=(1, 2)),
    "vectors": OffsetConvolution(channels=64, out_channels=32, groups=2, deform_groups=2),
}
