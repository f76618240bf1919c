"""The reference of the published block, against one built layer by layer on other operators."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import deform_conv2d

from dyhead_cuda import reference
from dyhead_cuda.pyramid import (
    HIGH_OFFSETS,
    UPSAMPLES,
    BlockParameters,
    BranchParameters,
    HighOffset,
    Upsample,
)
from dyhead_cuda.reference import Activation
from tests.helpers.compare import assert_close, assert_gradients_close, gradients, leaf
from tests.helpers.inputs import (
    flat_parameters,
    halving_sizes,
    random_block_parameters,
    random_pyramid,
    rebuild_parameters,
)

Sizes = Sequence[tuple[int, int]]

modes = pytest.mark.parametrize("high_offset", HIGH_OFFSETS)


# --- the same block, one layer after the other ----------------------------------------------------


def hard_sigmoid(x: Tensor) -> Tensor:
    return (x + 3).clamp(0, 6) / 6


def read_flat(t: Tensor, height: int, width: int) -> Tensor:
    """Value k at pixel p of the small level is value i = k * h * w + p of the large one's image."""
    n, taps, large_height, large_width = t.shape
    i = torch.arange(taps * height * width)
    pixel = i % (large_height * large_width)
    values = t[:, i // (large_height * large_width), pixel // large_width, pixel % large_width]
    return values.view(n, taps, height, width)


def upsampled(x: Tensor, size: Sequence[int], mode: str = "bilinear") -> Tensor:
    if mode == "nearest":
        return F.interpolate(x, tuple(size))
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=True)


def normalised(x: Tensor, groups: int, p: BranchParameters) -> Tensor:
    # Not F.group_norm, which refuses one value per group.
    values = x.reshape(x.shape[0], groups, -1)
    centred = values - values.mean(2, keepdim=True)
    values = centred / (centred.square().mean(2, keepdim=True) + 1e-5).sqrt()
    return values.view_as(x) * p.norm_weight.view(-1, 1, 1) + p.norm_bias.view(-1, 1, 1)


def layerwise_block(
    features: Sequence[Tensor], p: BlockParameters, high_offset: str, upsample: str, groups: int
) -> list[Tensor]:
    outputs = []
    for level, x in enumerate(features):
        height, width = x.shape[-2:]
        offset_mask = F.conv2d(x, p.offset_weight, p.offset_bias, padding=1)
        offset, mask = offset_mask[:, :18].contiguous(), offset_mask[:, 18:].sigmoid()

        def deform(
            source: Tensor, branch: BranchParameters, offset: Tensor, mask: Tensor, stride: int
        ) -> Tensor:
            y = deform_conv2d(
                source, offset, branch.weight, branch.bias, stride, padding=1, mask=mask
            )
            return normalised(y, groups, branch)

        branches = [deform(x, p.mid, offset, mask, 1)]
        if level > 0:
            finer = features[level - 1]
            if -(-finer.shape[-2] // 2) != height or -(-finer.shape[-1] // 2) != width:
                finer = upsampled(finer, (2 * height, 2 * width))
            branches.append(deform(finer, p.low, offset, mask, 2))
        if level + 1 < len(features):
            coarser = features[level + 1]
            h, w = coarser.shape[-2:]
            if high_offset == "aligned":
                whole = upsampled(coarser, x.shape[-2:], upsample)
                branches.append(deform(whole, p.high, offset, mask, 1))
            else:
                crops = offset[..., :h, :w].contiguous(), mask[..., :h, :w].contiguous()
                read_offset = crops[0] if high_offset == "crop" else read_flat(offset, h, w)
                read_mask = read_flat(mask, h, w) if high_offset == "flat" else crops[1]
                y = deform(coarser, p.high, read_offset, read_mask, 1)
                branches.append(upsampled(y, x.shape[-2:], upsample))
        gated = []
        for branch in branches:
            logit = F.conv2d(
                F.adaptive_avg_pool2d(branch, 1), p.gate_weight.view(1, -1, 1, 1), p.gate_bias
            )
            gated.append(branch * hard_sigmoid(logit.relu()))
        y = torch.stack(gated).mean(0)
        hidden = (y.mean((2, 3)) @ p.fc1_weight.t() + p.fc1_bias).relu()
        t = hard_sigmoid(hidden @ p.fc2_weight.t() + p.fc2_bias)[:, :, None, None]
        a1, b1, a2, b2 = t.split(y.shape[1], dim=1)
        first = y * ((a1 - 0.5) * 2 + 1) + (b1 - 0.5)
        outputs.append(torch.maximum(first, y * ((a2 - 0.5) * 2) + (b2 - 0.5)))
    return outputs


def with_gradients(
    features: Sequence[Tensor], parameters: BlockParameters
) -> tuple[list[Tensor], BlockParameters, list[Tensor]]:
    levels = [leaf(x) for x in features]
    tensors = [leaf(t) for t in flat_parameters(parameters)]
    return levels, rebuild_parameters(parameters, tensors), [*levels, *tensors]


def check_block(
    sizes: Sizes,
    high_offset: HighOffset,
    *,
    batch: int = 2,
    channels: tuple[int, int] = (6, 8),
    groups: int = 2,
    bias: bool = True,
    upsample: Upsample = "bilinear",
    seed: int = 0,
) -> None:
    """Outputs and all gradients equal those of the layer-by-layer block."""
    features, parameters, inputs = with_gradients(
        random_pyramid(batch, channels[0], sizes, seed=seed),
        random_block_parameters(*channels, bias=bias, seed=seed + 1),
    )
    expected = layerwise_block(features, parameters, high_offset, upsample, groups)
    actual = reference.pyramid_block(
        features, parameters, high_offset=high_offset, upsample=upsample, num_groups=groups
    )
    assert_close(actual, expected)
    # Parameters of branches that a pyramid of one level does not have get zeros.
    cotangents = [torch.randn_like(x) for x in expected]
    want = torch.autograd.grad(expected, inputs, cotangents, materialize_grads=True)
    got = torch.autograd.grad(actual, inputs, cotangents, materialize_grads=True)
    assert_gradients_close(got, want)


# --- the block ------------------------------------------------------------------------------------


@modes
@pytest.mark.parametrize("upsample", UPSAMPLES)
@pytest.mark.parametrize(
    "sizes",
    [
        halving_sizes(13, 9, 3),
        halving_sizes(8, 12, 4),
        halving_sizes(5, 1, 4),  # 5x1, 3x1, 2x1, 1x1
        halving_sizes(1, 1, 3),
        halving_sizes(7, 6, 2),
        halving_sizes(5, 7, 1),
        halving_sizes(1, 1, 1),
    ],
    ids=str,
)
def test_block_equals_layer_by_layer(
    sizes: Sizes, upsample: Upsample, high_offset: HighOffset
) -> None:
    check_block(sizes, high_offset, upsample=upsample)


@modes
@pytest.mark.parametrize("groups", [1, 4, 16])
@pytest.mark.parametrize("bias", [True, False])
def test_groups_bias_and_channels(groups: int, bias: bool, high_offset: HighOffset) -> None:
    sizes = halving_sizes(6, 5, 3)
    check_block(sizes, high_offset, channels=(5, 16), groups=groups, bias=bias, batch=1)


def test_as_many_channels_out_as_in() -> None:
    check_block(halving_sizes(6, 5, 2), "flat", channels=(8, 8), groups=2)


@pytest.mark.parametrize(
    "sizes",
    [
        [(7, 5), (6, 6), (2, 9)],
        [(3, 4), (9, 9)],
        [(9, 9), (9, 9), (4, 4)],
        [(4, 6), (1, 2), (3, 1)],
    ],
    ids=str,
)
def test_aligned_takes_any_sizes(sizes: Sizes) -> None:
    check_block(sizes, "aligned")


@settings(max_examples=15)
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 4),
    st.sampled_from(HIGH_OFFSETS),
    st.integers(0, 10**6),
)
def test_random_pyramids(
    height: int, width: int, levels: int, high_offset: HighOffset, seed: int
) -> None:
    check_block(halving_sizes(height, width, levels), high_offset, seed=seed)


def test_the_four_readings_differ() -> None:
    features = random_pyramid(1, 4, halving_sizes(7, 9, 2))
    parameters = random_block_parameters(4, 4)
    outs = [
        reference.pyramid_block(features, parameters, high_offset=mode, num_groups=2)  # type: ignore[arg-type]
        for mode in HIGH_OFFSETS
    ]
    for i in range(len(outs)):
        for j in range(i):
            assert (outs[i][0] - outs[j][0]).abs().max() > 1e-2
            assert torch.equal(outs[i][1], outs[j][1])  # the coarsest level has no high branch


def test_high_offset_and_mask_by_hand() -> None:
    offset = torch.arange(18 * 4 * 5).double().view(1, 18, 4, 5).repeat(2, 1, 1, 1)
    offset[1] += 1000
    mask = torch.arange(9 * 4 * 5).double().view(1, 9, 4, 5).repeat(2, 1, 1, 1) + 5000
    flat, flat_mask = reference.high_offset_and_mask(offset, mask, (2, 3), "flat")
    assert flat.flatten(1).tolist() == [list(range(108)), list(range(1000, 1108))]
    assert flat_mask[0].flatten().tolist() == list(range(5000, 5054))
    crop, crop_mask = reference.high_offset_and_mask(offset, mask, (2, 3), "crop")
    assert torch.equal(crop, offset[:, :, :2, :3])
    assert torch.equal(crop_mask, mask[:, :, :2, :3])
    main, main_mask = reference.high_offset_and_mask(offset, mask, (2, 3), "mmdet_main")
    assert torch.equal(main, flat)
    assert torch.equal(main_mask, crop_mask)


@modes
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_empty_batch(levels: int, high_offset: HighOffset) -> None:
    sizes = halving_sizes(6, 5, levels)
    features, parameters, inputs = with_gradients(
        random_pyramid(0, 4, sizes), random_block_parameters(4, 6)
    )
    outs = reference.pyramid_block(features, parameters, high_offset=high_offset, num_groups=2)
    assert [x.shape for x in outs] == [(0, 6, *size) for size in sizes]
    total = torch.stack([x.sum() for x in outs]).sum()
    for grad, x in zip(torch.autograd.grad(total, inputs, allow_unused=True), inputs, strict=True):
        assert grad is None or (grad.shape == x.shape and (grad == 0).all())


@modes
def test_gradcheck_and_gradgradcheck(high_offset: HighOffset) -> None:
    features, parameters, inputs = with_gradients(
        random_pyramid(1, 2, halving_sizes(3, 2, 2)), random_block_parameters(2, 4)
    )

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        levels, tensors = values[: len(features)], values[len(features) :]
        p = rebuild_parameters(parameters, tensors)
        return tuple(reference.pyramid_block(levels, p, high_offset=high_offset, num_groups=2))

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    if high_offset in ("flat", "aligned"):  # the two code paths; a second derivative takes seconds
        assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


# --- types, layouts, autocast ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@modes
def test_precision_and_dtype(dtype: torch.dtype, high_offset: HighOffset) -> None:
    sizes = halving_sizes(13, 10, 3)
    features = random_pyramid(2, 16, sizes, dtype)
    parameters = random_block_parameters(16, 16, dtype=dtype)
    levels, p, inputs = with_gradients(features, parameters)
    exact_levels, exact_p, exact_inputs = with_gradients(
        [x.double() for x in features],
        rebuild_parameters(parameters, [t.double() for t in flat_parameters(parameters)]),
    )
    actual = reference.pyramid_block(levels, p, high_offset=high_offset, num_groups=4)
    expected = reference.pyramid_block(exact_levels, exact_p, high_offset=high_offset, num_groups=4)
    assert {x.dtype for x in actual} == {dtype}
    assert_close(actual, expected, dtype)
    grads = gradients(actual, inputs, dtype)
    assert {g.dtype for g in grads} == {dtype}
    assert_close(grads, gradients(expected, exact_inputs, dtype), dtype, factor=2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_types_are_rounded_once(dtype: torch.dtype) -> None:
    features = random_pyramid(1, 4, halving_sizes(6, 5, 2), dtype)
    parameters = random_block_parameters(4, 4, dtype=dtype)
    wide = rebuild_parameters(parameters, [t.float() for t in flat_parameters(parameters)])
    actual = reference.pyramid_block(features, parameters, num_groups=2)
    expected = reference.pyramid_block([x.float() for x in features], wide, num_groups=2)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e.to(dtype))
    combined = reference.combine_branches(features, parameters, num_groups=2)
    assert {x.dtype for x in combined} == {torch.float32}


def test_parameters_of_another_type_than_the_features() -> None:
    features, parameters, inputs = with_gradients(
        random_pyramid(1, 4, halving_sizes(6, 5, 2), torch.float32),
        random_block_parameters(4, 4, dtype=torch.float64),
    )
    outs = reference.pyramid_block(features, parameters, num_groups=2)
    assert {x.dtype for x in outs} == {torch.float32}
    assert [g.dtype for g in gradients(outs, inputs)] == [x.dtype for x in inputs]


@modes
@pytest.mark.parametrize("layout", ["channels_last", "sliced", "expanded"])
def test_layout_does_not_matter(layout: str, high_offset: HighOffset) -> None:
    features = random_pyramid(2, 6, halving_sizes(7, 9, 3))
    if layout == "expanded":
        features = [x[:1].expand(2, -1, -1, -1) for x in features]
    parameters = random_block_parameters(6, 8)
    strange = {
        "channels_last": [x.contiguous(memory_format=torch.channels_last) for x in features],
        "sliced": [torch.cat([x, x * 7, x], 1)[:, :6] for x in features],
        "expanded": features,
    }[layout]
    assert not strange[0].is_contiguous()
    plain = [x.contiguous() for x in features]
    expected = reference.pyramid_block(plain, parameters, high_offset=high_offset, num_groups=4)
    actual = reference.pyramid_block(strange, parameters, high_offset=high_offset, num_groups=4)
    assert_close(actual, expected)


@pytest.mark.parametrize("autocast_to", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_not_change_it(autocast_to: torch.dtype, dtype: torch.dtype) -> None:
    features, parameters, inputs = with_gradients(
        random_pyramid(1, 8, halving_sizes(6, 7, 3), dtype),
        random_block_parameters(8, 8, dtype=torch.float32),
    )
    expected = reference.pyramid_block(features, parameters, num_groups=2)
    with torch.autocast("cpu", autocast_to):
        actual = reference.pyramid_block(features, parameters, num_groups=2)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == dtype
        assert torch.equal(a, e)
    for a, e in zip(gradients(actual, inputs), gradients(expected, inputs), strict=True):
        assert torch.equal(a, e)


def test_meta_tensors_give_shapes() -> None:
    features = [x.to("meta") for x in random_pyramid(2, 4, halving_sizes(6, 5, 3))]
    parameters = random_block_parameters(4, 6)
    parameters = rebuild_parameters(parameters, [t.to("meta") for t in flat_parameters(parameters)])
    outs = reference.pyramid_block(features, parameters, num_groups=2)
    assert [x.shape for x in outs] == [(2, 6, 6, 5), (2, 6, 3, 3), (2, 6, 2, 2)]


# --- dynamic ReLU and gates by their formulas -----------------------------------------------------


@pytest.mark.parametrize("activation", ["hsigmoid", "sigmoid"])
@pytest.mark.parametrize("trailing", [(), (7,), (3, 5), (2, 3, 4)])
def test_dynamic_relu_formula(activation: Activation, trailing: tuple[int, ...]) -> None:
    x = 2 * torch.randn(3, 8, *trailing, dtype=torch.float64) + 1
    p = random_block_parameters(4, 8)
    out = reference.dynamic_relu(
        x, p.fc1_weight, p.fc1_bias, p.fc2_weight, p.fc2_bias, activation=activation
    )
    saturated = 0
    for n in range(3):
        mean = x[n].reshape(8, -1).mean(1)
        logits = p.fc2_weight @ (p.fc1_weight @ mean + p.fc1_bias).clamp(min=0) + p.fc2_bias
        for c in range(8):
            t = []
            for logit in logits[c::8].tolist():
                saturated += abs(logit) > 3
                gate = torch.tensor(logit, dtype=torch.float64)
                gate = gate.sigmoid() if activation == "sigmoid" else hard_sigmoid(gate)
                t.append(2 * float(gate) - 1)
            expected = torch.maximum((1 + t[0]) * x[n, c] + t[1] / 2, t[2] * x[n, c] + t[3] / 2)
            assert_close(out[n, c], expected)
    assert trailing or saturated > 0


def test_branch_gate_formula() -> None:
    branch = torch.randn(5, 4, 3, 6).double() + torch.randn(5, 4, 1, 1).double()
    weight, bias = 4 * torch.randn(4, dtype=torch.float64), torch.tensor([0.5]).double()
    logits = [float(b.mean((1, 2)) @ weight + bias) for b in branch]
    expected = torch.tensor([min(max(x, 0) + 3, 6) / 6 for x in logits], dtype=torch.float64)
    assert_close(reference.branch_gate(branch, weight, bias), expected)
    assert min(logits) < 0 < max(logits)  # both sides of the ReLU


def test_hsigmoid() -> None:
    x = torch.tensor([-4, -3, -1.5, 0, 1.5, 3, 4], dtype=torch.float64)
    expected = torch.tensor([0, 0, 0.25, 0.5, 0.75, 1, 1], dtype=torch.float64)
    assert torch.equal(reference.hsigmoid(x), expected)


# --- errors and compilation -----------------------------------------------------------------------


@pytest.mark.parametrize("high_offset", ["flat", "crop", "mmdet_main"])
@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([(25, 25), (12, 13)], r"level 1 of size 13x13 \(half of level 0's 25x25.*got 12x13"),
        ([(8, 8), (4, 4), (3, 2)], r"level 2 of size 2x2 \(half of level 1's 4x4.*got 3x2"),
        ([(4, 4), (8, 8)], r"level 1 of size 2x2 .*got 8x8; the finest level comes first"),
        ([(8, 8), (4, 5)], r"level 1 of size 4x4 .*got 4x5"),
    ],
)
def test_wrong_sizes_are_named(high_offset: HighOffset, sizes: Sizes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        reference.pyramid_block(
            random_pyramid(1, 4, sizes),
            random_block_parameters(4, 4),
            high_offset=high_offset,
            num_groups=2,
        )
    assert '"aligned"' in str(error.value)


def test_two_levels_are_captured_in_one_graph() -> None:
    features = random_pyramid(1, 4, halving_sizes(4, 5, 2))
    parameters = random_block_parameters(4, 4)

    def run(features: list[Tensor]) -> list[Tensor]:
        return reference.pyramid_block(features, parameters, num_groups=2)

    torch._dynamo.reset()
    with torch.no_grad():
        assert_close(torch.compile(run, fullgraph=True, backend="eager")(features), run(features))


def test_pieces_compile_in_one_graph() -> None:
    p = random_block_parameters(4, 8)
    offset, mask, y = torch.randn(2, 18, 5, 4), torch.rand(2, 9, 5, 4), torch.randn(2, 8, 5, 4)
    relu = [p.fc1_weight, p.fc1_bias, p.fc2_weight, p.fc2_bias]

    def run(offset: Tensor, mask: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return (
            *reference.high_offset_and_mask(offset, mask, (3, 2), "flat"),
            reference.branch_gate(y, p.gate_weight, p.gate_bias),
            reference.dynamic_relu(y, *relu),
        )

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    inputs = [leaf(offset.double()), leaf(mask.double()), leaf(y.double())]
    actual, expected = compiled(*inputs), run(*inputs)
    assert_close(actual, expected)
    assert_close(gradients(actual, inputs), gradients(expected, inputs), factor=2)
