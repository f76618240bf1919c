"""Published blocks of many sizes, and the check of one against the reference on its device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dyhead_cuda import backend, functional
from dyhead_cuda.backends import Backend
from dyhead_cuda.commands.check_cases import keep_lines_apart
from dyhead_cuda.pyramid import BlockParameters, HighOffset, Upsample
from tests.helpers.compare import assert_close, assert_gradients_close, leaf, random_like
from tests.helpers.devices import Device
from tests.helpers.inputs import (
    flat_parameters,
    halving_sizes,
    random_block_parameters,
    random_pyramid,
    rebuild_parameters,
)

Size = tuple[int, int]


@dataclass(frozen=True)
class Block:
    """Sizes and options of one block."""

    sizes: tuple[Size, ...] = tuple(halving_sizes(13, 10, 3))
    batch: int = 2
    in_channels: int = 5
    out_channels: int = 8
    num_groups: int = 4
    bias: bool = True
    high_offset: HighOffset = "flat"
    upsample: Upsample = "bilinear"
    eps: float = 1e-5
    offset_scale: float = 1.0
    seed: int = 0
    device: Device = "cpu"  # whose backend is compared with the reference

    def tensors(
        self, dtype: torch.dtype = torch.float64, parameter_dtype: torch.dtype | None = None
    ) -> tuple[list[Tensor], BlockParameters]:
        features = random_pyramid(self.batch, self.in_channels, self.sizes, dtype, self.seed)
        parameters = random_block_parameters(
            self.in_channels,
            self.out_channels,
            bias=self.bias,
            dtype=parameter_dtype or dtype,
            offset_scale=self.offset_scale,
            seed=self.seed + 1,
        )
        tensors = [leaf(t.to(self.device)) for t in flat_parameters(parameters)]
        return [leaf(x.to(self.device)) for x in features], rebuild_parameters(parameters, tensors)

    def run(
        self, name: Backend, features: Sequence[Tensor], parameters: BlockParameters
    ) -> list[Tensor]:
        with backend(name):
            return functional.pyramid_block(
                features,
                parameters,
                high_offset=self.high_offset,
                upsample=self.upsample,
                num_groups=self.num_groups,
                eps=self.eps,
            )


BLOCKS = {
    "odd sizes": Block(),
    "five levels": Block(sizes=tuple(halving_sizes(25, 37, 5)), batch=1),
    "to 1x1": Block(sizes=tuple(halving_sizes(5, 3, 5)), num_groups=2),
    "one level": Block(sizes=((6, 7),)),
    "one pixel": Block(sizes=((1, 1),), num_groups=1),
    "a row and a column": Block(sizes=((1, 9), (1, 5), (1, 3))),
    "more than a vector": Block(in_channels=70, out_channels=40, batch=1),
    "one group": Block(num_groups=1, bias=False),
    "a group per channel": Block(num_groups=8, bias=False),
    "several chunks": Block(sizes=tuple(halving_sizes(31, 26, 2)), offset_scale=4),
    "another eps": Block(eps=0.1),
}


def in_double(
    features: Sequence[Tensor], parameters: BlockParameters
) -> tuple[list[Tensor], BlockParameters]:
    tensors = [leaf(t, torch.float64) for t in flat_parameters(parameters)]
    return [leaf(x, torch.float64) for x in features], rebuild_parameters(parameters, tensors)


def block_gradients(
    outs: Sequence[Tensor],
    features: Sequence[Tensor],
    parameters: BlockParameters,
    rounded_to: torch.dtype = torch.float64,
) -> list[Tensor]:
    """Of everything, zeros for what takes no part: the other branches of a single level."""
    cotangents = [t.to(rounded_to).to(out) for t, out in zip(random_like(*outs), outs, strict=True)]
    inputs = [*features, *flat_parameters(parameters)]
    return list(torch.autograd.grad(outs, inputs, cotangents, materialize_grads=True))


def check_block(
    block: Block,
    dtype: torch.dtype = torch.float64,
    parameter_dtype: torch.dtype | None = None,
    smooth: bool = False,
) -> None:
    features, parameters = block.tensors(dtype, parameter_dtype)
    if smooth:
        make_smooth(parameters)
    exact_features, exact_parameters = in_double(features, parameters)
    actual = block.run(block.device, features, parameters)
    expected = block.run("reference", exact_features, exact_parameters)
    assert [x.dtype for x in actual] == [dtype] * len(features)
    assert all(x.is_contiguous() for x in (*features, *actual))
    assert_close(actual, expected, dtype)
    grads = block_gradients(actual, features, parameters, dtype)
    inputs = [*features, *flat_parameters(parameters)]
    assert [g.dtype for g in grads] == [t.dtype for t in inputs]
    if dtype.itemsize > 2 or smooth:
        expected_grads = block_gradients(expected, exact_features, exact_parameters, dtype)
        # Those of the gates, and of a norm of one pixel, are sums that cancel.
        assert_gradients_close(grads, expected_grads, dtype, floor=2e-2)


def make_smooth(parameters: BlockParameters) -> None:
    """No pixel of a block is near a kink, which a rounding of 2^-9 would cross for some pixels.

    A sample that crosses a pixel's border has another slope, and so has the dynamic ReLU where the
    other of its lines is the larger one: offsets are those of the bias, and the lines parallel.
    """
    with torch.no_grad():
        parameters.offset_weight.zero_()
    keep_lines_apart(parameters.fc2_weight, parameters.fc2_bias)
