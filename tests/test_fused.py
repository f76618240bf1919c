"""Both forms of the head on the compiled operators, against the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dyhead_cuda import UnifiedDyHead, backend, functional, library
from dyhead_cuda.backends import Backend
from dyhead_cuda.pyramid import HIGH_OFFSETS, UPSAMPLES, HighOffset, Upsample
from dyhead_cuda.reference import UnifiedParameters
from tests.helpers.blocks import BLOCKS, Block, block_gradients, check_block
from tests.helpers.compare import (
    TOLERANCE,
    assert_close,
    assert_gradients_close,
    gradients,
    leaf,
)
from tests.helpers.devices import Device, each_device
from tests.helpers.inputs import (
    halving_sizes,
    random_pyramid,
)
from tests.helpers.unified import attend, random_parameters, unified_inputs

library.require("cpu")

Size = tuple[int, int]
COMPARED: tuple[Backend, Backend] = ("cpu", "reference")


# --- the published block --------------------------------------------------------------------------


@each_device
@pytest.mark.parametrize("high_offset", HIGH_OFFSETS)
@pytest.mark.parametrize("name", BLOCKS)
def test_block_equals_the_reference_with_all_gradients(
    name: str, high_offset: HighOffset, device: Device
) -> None:
    check_block(replace(BLOCKS[name], high_offset=high_offset, device=device))


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


@each_device
@pytest.mark.parametrize("high_offset", HIGH_OFFSETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_block_in_other_types(dtype: torch.dtype, high_offset: HighOffset, device: Device) -> None:
    block = Block(
        sizes=tuple(halving_sizes(17, 22, 3)),
        in_channels=24,
        out_channels=32,
        high_offset=high_offset,
        device=device,
    )
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


@each_device
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("high_offset", HIGH_OFFSETS)
def test_empty_batch(high_offset: HighOffset, dtype: torch.dtype, device: Device) -> None:
    block = Block(batch=0, high_offset=high_offset, device=device)
    features, parameters = block.tensors(dtype)
    outs = block.run(device, features, parameters)
    assert [x.shape for x in outs] == [(0, 8, *size) for size in block.sizes]
    grads = block_gradients(outs, features, parameters)
    assert all((g == 0).all() for g in grads)


@each_device
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("high_offset", HIGH_OFFSETS)
@pytest.mark.parametrize("size", [(0, 6), (5, 0), (0, 0)])
def test_levels_without_pixels(
    size: Size, high_offset: HighOffset, dtype: torch.dtype, device: Device
) -> None:
    block = Block(sizes=tuple(halving_sizes(*size, 3)), high_offset=high_offset, device=device)
    features, parameters = block.tensors(dtype)
    outs = block.run(device, features, parameters)
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


@pytest.mark.parametrize("value", [1e30, -1e30])
def test_far_offsets(value: float) -> None:
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


@each_device
@pytest.mark.parametrize("targets", ["all", "median"])
@pytest.mark.parametrize("with_gates", [True, False])
@pytest.mark.parametrize(("channels", "out_channels"), [(20, 9), (24, 16)])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_spatial_attention(
    dtype: torch.dtype,
    channels: int,
    out_channels: int,
    with_gates: bool,
    targets: str,
    device: Device,
) -> None:
    tensors = unified_inputs((2, 3, channels, 13, 15), out_channels, dtype, device)
    exact = [leaf(t, torch.float64) for t in tensors]
    used = 5 if with_gates else 4
    actual = attend(device, tensors, targets=targets, gates=tensors[4] if with_gates else None)
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


@pytest.mark.parametrize("high_offset", ["flat", "aligned"])
def test_more_levels_than_one_call_of_the_coefficients_takes(high_offset: HighOffset) -> None:
    sizes = halving_sizes(9, 7, 44)
    if high_offset == "aligned":
        sizes = [(1 + i % 4, 1 + i % 3) for i in range(44)]
    check_block(Block(sizes=tuple(sizes), high_offset=high_offset))


def test_a_bias_of_some_branches() -> None:
    block = Block()
    features, parameters = block.tensors()
    some = parameters._replace(mid=parameters.mid._replace(bias=None))
    assert_close(block.run("cpu", features, some), block.run("reference", features, some))
