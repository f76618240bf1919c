"""A call of deform_conv that uses all it can do, and what it should give, map by map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from dyhead_cuda import reference
from dyhead_cuda.ops.common import compute_dtype
from dyhead_cuda.ops.deform_conv import (
    CROP,
    FLAT,
    NO_MAP,
    NONE,
    SAME,
    Job,
    Map,
    Plan,
    deform_conv,
    stack_maps,
)
from tests.conftest import leaf


@dataclass(frozen=True)
class Work:
    """A call of the operator: jobs of several terms, all read rules, gates, bias and moments.

    No job reads source map 2 and weights 3.
    """

    images: int = 2
    channels: int = 2
    out_channels: int = 3
    mask_logits: bool = True
    with_bias: bool = True
    with_gates: bool = True
    moments: bool = True
    wide_out: bool = False
    scale: int = 1  # of all sizes
    seed: int = 0

    @property
    def plan(self) -> Plan:
        n, s = self.images, self.scale
        sources = stack_maps([(3 * s, 4 * s), (2 * s, 2 * s), (s, s), (2 * s, 3 * s)], n)
        sizes = [(3 * s, 4 * s), (2 * s, 2 * s), (2 * s, 2 * s), (s, 2 * s), (2 * s, 3 * s)]
        outs = stack_maps(sizes, n)
        large, small = stack_maps([(3 * s, 4 * s), (s, 2 * s)], n)
        jobs = [
            Job(outs[0], large, [(0, 0), (1, 1)]),
            Job(outs[1], large, [(1, 2)], (1, 1), FLAT, CROP, (3 * s, 4 * s)),
            Job(outs[2], large, [(0, 0)], (2, 2), CROP, FLAT, (2 * s, 5 * s)),
            Job(outs[3], small, [(3, 1), (0, 2), (3, 1)], (1, 2), SAME, SAME, (1, 1)),
            Job(outs[4], NO_MAP, [(3, 4), (1, 0)], (1, 1), NONE, NONE),
        ]
        return Plan(n, sources, jobs, mask_logits=self.mask_logits)

    def tensors(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        source = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=source, dtype=torch.float64)

        n, plan, compute = self.images, self.plan, compute_dtype(dtype)
        predictions = normal(sum(n * job.predictions.pixels for job in plan.jobs[::3]), 27)
        # Away from integer coordinates, where the derivative jumps.
        predictions[:, :18] = (
            predictions[:, :18].floor() + 0.1 + 0.8 * predictions[:, 18:].repeat(1, 2).sigmoid()
        )
        tensors = {
            "source": normal(sum(n * m.pixels for m in plan.sources), self.channels),
            "predictions": predictions,
            "weights": normal(5, self.out_channels, self.channels, 3, 3) / 3,
        }
        if self.with_bias:
            tensors["bias"] = normal(5, self.out_channels)
        if self.with_gates:
            tensors["gates"] = normal(n, len(plan.sources))
        return {k: leaf(t, dtype if k == "source" else compute) for k, t in tensors.items()}

    def run(self, tensors: dict[str, Tensor]) -> list[Tensor]:
        results = deform_conv(
            tensors["source"],
            tensors["predictions"],
            tensors["weights"].unbind(),
            self.plan,
            tensors["bias"].unbind() if self.with_bias else (),
            tensors.get("gates"),
            wide_out=self.wide_out,
            moments=self.moments,
        )
        return list(results if self.moments else results[:1])

    def arguments(self, tensors: dict[str, Tensor]) -> tuple[Any, ...]:
        """Of ``deform_conv_fwd``."""
        plan = self.plan
        return (
            tensors["source"],
            tensors["predictions"],
            list(tensors["weights"].unbind()),
            list(tensors["bias"].unbind()) if self.with_bias else [],
            tensors.get("gates"),
            *plan.tables,
            plan.mask_logits,
            self.wide_out,
            self.moments,
            False,
        )

    def backward_arguments(self, tensors: dict[str, Tensor]) -> tuple[Any, ...]:
        """Of ``deform_conv_bwd``, with random gradients."""
        plain = {name: t.detach() for name, t in tensors.items()}
        arguments = self.arguments(plain)
        out, mean, *_ = torch.ops.dyhead.deform_conv_fwd(*arguments)
        grads = [torch.randn_like(mean) if self.moments else None for _ in range(3)]
        source, predictions, weights, _, gates, *tables, _, _ = arguments
        first = [torch.randn_like(out), *grads, source, predictions, weights, gates, out, mean]
        return (*first, *tables, self.with_bias, False, False)

    def reference(self, tensors: dict[str, Tensor]) -> list[Tensor]:
        """The same in float64: map by map, with the reference's convolution."""
        t = {name: value.double() for name, value in tensors.items()}
        maps, statistics = [], []
        for job in self.plan.jobs:
            size, up = (job.out.height, job.out.width), job.upsampled
            if job.offset_rule == NONE:
                offset = t["source"].new_zeros(self.images, 18, *size)
                mask = t["source"].new_ones(self.images, 9, *size)
            else:
                predictions = self.map(t["predictions"], job.predictions)
                offset = read(predictions[:, :18], size, job.offset_rule)
                mask = read(predictions[:, 18:], size, job.mask_rule)
                mask = mask.sigmoid() if self.mask_logits else mask
            y = t["source"].new_zeros(self.images, self.out_channels, *size)
            for source, weight in job.terms:
                x = self.map(t["source"], self.plan.sources[source])
                if self.with_gates:
                    x = x * t["gates"][:, source].view(-1, 1, 1, 1)
                y = y + convolution_of_size(x, offset, t["weights"][weight], mask, job.stride)
            if self.with_bias:
                y = y + t["bias"][job.terms[0][1]].view(1, -1, 1, 1)
            upsampled = interpolate(y, up or size, mode="bilinear", align_corners=True)
            maps.append(y.permute(0, 2, 3, 1).reshape(-1, self.out_channels))
            mean = y.mean((2, 3))
            var = (y - mean[:, :, None, None]).square().mean((2, 3))
            statistics.append((mean, var, upsampled.mean((2, 3))))
        moments = [torch.stack(values) for values in zip(*statistics, strict=True)]
        return [torch.cat(maps), *(moments if self.moments else [])]

    def map(self, rows: Tensor, m: Map) -> Tensor:
        part = rows[m.first_row :][: self.images * m.pixels]
        return part.view(self.images, m.height, m.width, rows.shape[1]).permute(0, 3, 1, 2)


def read(values: Tensor, size: tuple[int, int], rule: int) -> Tensor:
    height, width = size
    if rule != FLAT:
        return values[:, :, :height, :width]
    n, k = values.shape[:2]
    return values.flatten(1)[:, : k * height * width].reshape(n, k, height, width)


def convolution_of_size(
    x: Tensor, offset: Tensor, weight: Tensor, mask: Tensor, stride: tuple[int, int]
) -> Tensor:
    """The reference's convolution, of as many output pixels as there are offsets.

    Zeros below and to the right of x change no sample, and pixels without offsets are cut off.
    """
    size = offset.shape[2:]
    needed = [
        max(have, (out - 1) * step + 1)
        for have, out, step in zip(x.shape[2:], size, stride, strict=True)
    ]
    outs = [(have - 1) // step + 1 for have, step in zip(needed, stride, strict=True)]

    def padded(t: Tensor, to: Sequence[int]) -> Tensor:
        return pad(t, (0, to[1] - t.shape[3], 0, to[0] - t.shape[2]))

    out = reference.modulated_deform_conv2d(
        padded(x, needed), padded(offset, outs), weight, None, stride, 1, 1, padded(mask, outs)
    )
    return out[:, :, : size[0], : size[1]]


WORKS = {
    "all": Work(),
    "without moments": Work(moments=False),
    "wide": Work(moments=False, wide_out=True, channels=33),
    "without bias and gates": Work(with_bias=False, with_gates=False),
    "plain masks": Work(mask_logits=False, with_gates=False),
    "many channels": Work(channels=70, out_channels=40),
    "several chunks": Work(images=3, channels=5, out_channels=4, scale=9),
    "no images": Work(images=0),
}
