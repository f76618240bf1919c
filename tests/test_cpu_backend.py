"""Both forms of the head on the compiled CPU operators, against the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dyhead_cuda import UnifiedDyHead, backend, functional, library
from dyhead_cuda.backends import Backend
from dyhead_cuda.pyramid import HIGH_OFFSETS, UPSAMPLES, BlockParameters, HighOffset, Upsample
from dyhead_cuda.reference import UnifiedParameters
from tests.helpers.compare import (
    TOLERANCE,
    assert_close,
    assert_gradients_close,
    gradients,
    leaf,
    random_like,
)
from tests.helpers.inputs import (
    flat_parameters,
    halving_sizes,
    random_block_parameters,
    random_pyramid,
    rebuild_parameters,
)
from tests.test_unified import random_parameters

library.require("cpu")

Size = tuple[int, int]
COMPARED: tuple[Backend, Backend] = ("cpu", "reference")


# --- the published block --------------------------------------------------------------------------


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
    device: Literal["cpu", "cuda"] = "cpu"  # whose backend is compared with the reference

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
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in actual)
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
    channels = parameters.gate_weight.shape[0]
    with torch.no_grad():
        parameters.offset_weight.zero_()
        parameters.fc2_weight.mul_(0.01)
        t = torch.tensor([-0.5, 0.5, 0.5, -0.5]).repeat_interleave(channels)
        parameters.fc2_bias.copy_(3 * t)


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


@pytest.mark.parametrize("high_offset", HIGH_OFFSETS)
@pytest.mark.parametrize("name", BLOCKS)
def test_block_equals_the_reference_with_all_gradients(name: str, high_offset: HighOffset) -> None:
    check_block(replace(BLOCKS[name], high_offset=high_offset))


@pytest.mark.parametrize("high_offset", HIGH_OFFSETS)
@pytest.mark.parametrize("name", BLOCKS)
def test_nearest_equals_the_reference_with_all_gradients(
    name: str, high_offset: HighOffset
) -> None:
    check_block(replace(BLOCKS[name], high_offset=high_offset, upsample="nearest"))


@settings(max_examples=25)
@given(
    st.builds(
        Block,
        sizes=st.builds(
            lambda h, w, n: tuple(halving_sizes(h, w, n)),
            st.integers(1, 24),
            st.integers(1, 24),
            st.integers(1, 5),
        ),
        batch=st.integers(1, 3),
        in_channels=st.integers(1, 9),
        # A group of one value has no spread: its gradients are nothing but rounding.
        out_channels=st.sampled_from([8, 12, 20]),
        num_groups=st.sampled_from([1, 2, 4]),
        bias=st.booleans(),
        high_offset=st.sampled_from(HIGH_OFFSETS),
        upsample=st.sampled_from(UPSAMPLES),
        offset_scale=st.sampled_from([0.1, 1.0, 10.0]),
        seed=st.integers(0, 10**6),
    )
)
def test_random_blocks(block: Block) -> None:
    check_block(block)


@settings(max_examples=15)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 15), st.integers(1, 15)), min_size=2, max_size=4),
    upsample=st.sampled_from(UPSAMPLES),
    seed=st.integers(0, 10**6),
)
def test_aligned_takes_any_sizes(sizes: list[Size], upsample: Upsample, seed: int) -> None:
    check_block(Block(sizes=tuple(sizes), high_offset="aligned", upsample=upsample, seed=seed))


@pytest.mark.parametrize("high_offset", HIGH_OFFSETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_block_in_other_types(dtype: torch.dtype, high_offset: HighOffset) -> None:
    sizes = tuple(halving_sizes(17, 22, 3))
    block = Block(sizes=sizes, in_channels=24, out_channels=32, high_offset=high_offset)
    check_block(block, dtype)
    check_block(block, dtype, smooth=True)
    check_block(block, dtype, torch.float32, smooth=True)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": lambda x: torch.cat([x, x + 1e3], 3)[..., : x.shape[3]],
    "channels of more": lambda x: torch.cat([x + 1e3, x], 1)[:, x.shape[1] :],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "rows of another": lambda x: x.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_does_not_matter(layout: str) -> None:
    block = Block()
    features, parameters = block.tensors()
    strange = [LAYOUTS[layout](x.detach()).requires_grad_() for x in features]
    actual = block.run("cpu", strange, parameters)
    expected = block.run("cpu", features, parameters)
    assert_close(actual, expected)
    assert_close(gradients(actual, strange), gradients(expected, features), factor=2)


def test_one_image_expanded_to_a_batch() -> None:
    block = Block(batch=1)
    features, parameters = block.tensors()
    shared = [x.expand(3, *x.shape[1:]) for x in features]
    actual, expected = (block.run(name, shared, parameters) for name in COMPARED)
    assert_close(actual, expected)
    assert_gradients_close(gradients(actual, features), gradients(expected, features))


@pytest.mark.parametrize("high_offset", HIGH_OFFSETS)
def test_empty_batch(high_offset: HighOffset) -> None:
    block = Block(batch=0, high_offset=high_offset)
    features, parameters = block.tensors()
    outs = block.run("cpu", features, parameters)
    assert [x.shape for x in outs] == [(0, 8, *size) for size in block.sizes]
    grads = block_gradients(outs, features, parameters)
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("high_offset", HIGH_OFFSETS)
@pytest.mark.parametrize("size", [(0, 6), (5, 0), (0, 0)])
def test_levels_without_pixels(size: Size, high_offset: HighOffset) -> None:
    block = Block(sizes=tuple(halving_sizes(*size, 3)), high_offset=high_offset)
    features, parameters = block.tensors()
    outs = block.run("cpu", features, parameters)
    assert [x.shape for x in outs] == [(2, 8, *size) for size in block.sizes]
    assert all(g.isfinite().all() for g in block_gradients(outs, features, parameters))


@pytest.mark.parametrize("place", range(8))
def test_a_level_without_pixels_among_others(place: int) -> None:
    sizes = halving_sizes(9, 7, 8)
    sizes[place] = (0, 3)
    block = Block(sizes=tuple(sizes), high_offset="aligned")
    features, parameters = block.tensors()
    actual, expected = (block.run(name, features, parameters) for name in COMPARED)
    assert_close(actual, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_extreme_offsets(value: float) -> None:
    # The offset convolution's bias puts two of the nine taps beyond every border.
    block = Block()
    features, parameters = block.tensors()
    with torch.no_grad():
        parameters.offset_bias[2:5] = value
    actual, expected = (block.run(name, features, parameters) for name in COMPARED)
    assert all(x.isfinite().all() for x in actual)
    assert_close(actual, expected)
    assert_gradients_close(
        block_gradients(actual, features, parameters),
        block_gradients(expected, features, parameters),
    )


# --- the paper's form -----------------------------------------------------------------------------


def unified_inputs(
    shape: Sequence[int],
    out_channels: int,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> list[Tensor]:
    """features, weight, offset_weight, offset_bias, gates."""
    n, levels, channels, _, _ = shape
    p = random_parameters(levels, channels, out_channels)
    features = torch.randn(tuple(shape), dtype=torch.float64)
    gates = torch.randn(n, levels, dtype=torch.float64)
    tensors = [features, p.spatial_weight, p.offset_weight, p.offset_bias, gates]
    return [leaf(t.to(device), dtype) for t in tensors]


def attend(name: Backend, tensors: Sequence[Tensor], **options: Any) -> Tensor:
    with backend(name):
        return functional.spatial_attention(*tensors[:4], **options)


@pytest.mark.parametrize("targets", ["all", "median"])
@pytest.mark.parametrize("with_gates", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_spatial_attention(targets: str, with_gates: bool, dtype: torch.dtype) -> None:
    tensors = unified_inputs((2, 3, 20, 13, 15), 9, dtype)
    exact = [leaf(t, torch.float64) for t in tensors]
    used = 5 if with_gates else 4
    actual = attend("cpu", tensors, targets=targets, gates=tensors[4] if with_gates else None)
    expected = attend("reference", exact, targets=targets, gates=exact[4] if with_gates else None)
    assert actual.dtype == dtype
    assert_close(actual, expected, dtype)
    assert_gradients_close(
        gradients(actual, tensors[:used], dtype), gradients(expected, exact[:used], dtype), dtype
    )


@settings(max_examples=15)
@given(
    shape=st.tuples(
        st.integers(0, 3), st.integers(1, 5), st.integers(1, 20), st.integers(0, 9),
        st.integers(0, 9),
    ),
    out_channels=st.integers(1, 20),
    targets=st.sampled_from(["all", "median"]),
)  # fmt: skip
def test_random_spatial_attention(shape: tuple[int, ...], out_channels: int, targets: str) -> None:
    tensors = unified_inputs(shape, out_channels)
    actual, expected = (
        attend(name, tensors, targets=targets, gates=tensors[4]) for name in COMPARED
    )
    assert_close(actual, expected)
    if tensors[0].numel() > 0:
        assert_gradients_close(gradients(actual, tensors), gradients(expected, tensors))


def test_more_images_than_the_backward_of_the_gates_takes_at_once() -> None:
    # It holds 24 MiB of derivatives: here 4 uses x 8000 pixels x 27 x 8 bytes an image.
    tensors = unified_inputs((5, 2, 1, 80, 100), 1)
    actual, expected = (attend(name, tensors, gates=tensors[4]) for name in COMPARED)
    assert_gradients_close(gradients(actual, tensors), gradients(expected, tensors))


@pytest.mark.parametrize("targets", ["all", "median"])
def test_unified_block(targets: Any) -> None:
    features = leaf(torch.randn(2, 3, 8, 5, 6, dtype=torch.float64))
    parameters = UnifiedParameters(*(leaf(t) for t in random_parameters(3, 8, 8)))
    with backend("cpu"):
        actual = functional.unified_block(features, parameters, targets)
    with backend("reference"):
        expected = functional.unified_block(features, parameters, targets)
    assert_close(actual, expected)
    inputs = [features, *parameters]
    assert_gradients_close(gradients(actual, inputs), gradients(expected, inputs))


def test_unified_head_of_a_pyramid() -> None:
    head = UnifiedDyHead(3, 8, 2).double()
    features = [leaf(x) for x in random_pyramid(2, 8, halving_sizes(9, 11, 3))]
    with backend("cpu"):
        actual = head(features)
    with backend("reference"):
        expected = head(features)
    assert_close(actual, expected)
    inputs = [*features, *head.parameters()]
    assert_gradients_close(gradients(actual, inputs), gradients(expected, inputs))
