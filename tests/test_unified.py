"""The paper's form on one tensor F [N, L, C, H, W], against its formulas written as loops."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dyhead_cuda import UnifiedDyHead, functional, reference
from dyhead_cuda.modules import UnifiedDyHeadBlock
from dyhead_cuda.reference import ResizeMode, Targets, UnifiedParameters
from tests.helpers.compare import TOLERANCE, assert_close, gradients, leaf
from tests.helpers.inputs import random_pyramid
from tests.helpers.unified import normal, random_parameters

targets_both = pytest.mark.parametrize("targets", ["all", "median"])


def spatial_arguments(levels: int, channels: int, out_channels: int) -> list[Tensor]:
    p = random_parameters(levels, channels, out_channels)
    return [p.spatial_weight, p.offset_weight, p.offset_bias]


# --- scale-aware ----------------------------------------------------------------------------------


def test_scale_gate_formula() -> None:
    features, weight, bias = normal(4, 3, 2, 3, 5) + normal(4, 3, 1, 1, 1), normal(3, 3), normal(3)
    gates = reference.scale_gates(features, weight, bias)
    clipped = set()
    for n, level in itertools.product(range(4), range(3)):
        means = [float(features[n, other].mean()) for other in range(3)]
        linear = sum(float(weight[level, i]) * means[i] for i in range(3)) + float(bias[level])
        expected = max(0.0, min(1.0, (linear + 1) / 2))
        clipped.add(expected in (0.0, 1.0))
        assert float(gates[n, level]) == pytest.approx(expected, rel=1e-12, abs=1e-14)
    assert clipped == {True, False}
    out = reference.scale_attention(features, weight, bias)
    assert_close(out, features * gates.reshape(4, 3, 1, 1, 1))


def test_a_level_of_gate_zero_is_switched_off() -> None:
    features = normal(1, 2, 3, 4, 4)
    bias = torch.tensor([-1e3, 1e3], dtype=torch.float64)
    out = reference.scale_attention(features, normal(2, 2), bias)
    assert (out[:, 0] == 0).all()
    assert torch.equal(out[:, 1], features[:, 1])


# --- spatial-aware --------------------------------------------------------------------------------


def sampled(image: list[list[float]], y: float, x: float) -> float:
    """Bilinear value with zeros beyond the border."""
    height, width = len(image), len(image[0])
    if not (-1 < y < height and -1 < x < width):
        return 0.0
    value, top, left = 0.0, math.floor(y), math.floor(x)
    for row, column in itertools.product((top, top + 1), (left, left + 1)):
        if 0 <= row < height and 0 <= column < width:
            value += image[row][column] * (1 - abs(y - row)) * (1 - abs(x - column))
    return value


def slow_spatial_attention(features: Tensor, arguments: list[Tensor], targets: str) -> Tensor:
    """Equation 4, one addition at a time."""
    weight, offset_weight, offset_bias = arguments
    batch, levels, channels, height, width = features.shape
    values, w = features.tolist(), weight.tolist()
    chosen = list(range(levels)) if targets == "all" else [levels // 2]
    out = torch.zeros(batch, len(chosen), weight.shape[1], height, width, dtype=torch.float64)
    for n, (i, t) in itertools.product(range(batch), enumerate(chosen)):
        predicted = F.conv2d(features[n, t][None], offset_weight, offset_bias, padding=1)[0]
        for row, column in itertools.product(range(height), range(width)):
            p = predicted[:, row, column].tolist()
            for tap in range(9):
                y = row + tap // 3 - 1 + p[2 * tap]
                x = column + tap % 3 - 1 + p[2 * tap + 1]
                modulation = 1 / (1 + math.exp(-p[18 + tap]))
                for level, c in itertools.product(range(levels), range(channels)):
                    sample = sampled(values[n][level][c], y, x) * modulation
                    for o in range(weight.shape[1]):
                        term = w[level][o][c][tap // 3][tap % 3] * sample / levels
                        out[n, i, o, row, column] += term
    return out


@targets_both
@pytest.mark.parametrize(("levels", "size"), [(1, (3, 2)), (2, (3, 4)), (3, (2, 3)), (4, (1, 2))])
def test_spatial_attention_formula(targets: Targets, levels: int, size: tuple[int, int]) -> None:
    features = normal(2, levels, 2, *size)
    arguments = spatial_arguments(levels, 2, 3)
    out = reference.spatial_attention(features, *arguments, targets=targets)
    assert out.shape == (2, levels if targets == "all" else 1, 3, *size)
    assert_close(out, slow_spatial_attention(features, arguments, targets))


def test_the_median_target_is_one_of_all() -> None:
    for levels in range(1, 5):
        features, arguments = normal(1, levels, 2, 3, 4), spatial_arguments(levels, 2, 3)
        everything = reference.spatial_attention(features, *arguments, targets="all")
        only = reference.spatial_attention(features, *arguments, targets="median")
        assert_close(only[:, 0], everything[:, levels // 2])


def test_gates_fold_into_the_sampling_weights() -> None:
    # Sampling is linear in F: with the same offsets, scaling a level scales its weight.
    features, gates = normal(1, 3, 4, 5, 6), torch.rand(3, dtype=torch.float64)
    weight, offset_weight, offset_bias = spatial_arguments(3, 4, 2)
    offset_weight = torch.zeros_like(offset_weight)  # offsets that do not see the gates
    gated = features * gates.view(1, 3, 1, 1, 1)
    folded = weight * gates.view(3, 1, 1, 1, 1)
    assert_close(
        reference.spatial_attention(gated, weight, offset_weight, offset_bias),
        reference.spatial_attention(features, folded, offset_weight, offset_bias),
    )


def test_the_gates_of_spatial_attention_scale_the_levels() -> None:
    features, gates = normal(2, 3, 4, 3, 5), torch.rand(2, 3, dtype=torch.float64)
    arguments = spatial_arguments(3, 4, 2)
    gated = features * gates.view(2, 3, 1, 1, 1)
    for targets in ("all", "median"):
        assert_close(
            reference.spatial_attention(features, *arguments, targets=targets, gates=gates),
            slow_spatial_attention(gated, arguments, targets),
        )
    with pytest.raises(ValueError, match=r"gates \[2, 3\].*got \[2, 2\]"):
        reference.spatial_attention(features, *arguments, gates=gates[:, :2])


def test_spatial_attention_is_linear_in_the_weights_and_sums_over_levels() -> None:
    features = normal(1, 3, 4, 5, 6)
    weight, *offsets = spatial_arguments(3, 4, 2)
    parts = []
    for level in range(3):
        alone = torch.zeros_like(weight)
        alone[level] = weight[level]
        parts.append(reference.spatial_attention(features, alone, *offsets))
    whole = reference.spatial_attention(features, weight, *offsets)
    assert_close(torch.stack(parts).sum(0), whole)
    assert_close(reference.spatial_attention(features, 3 * weight, *offsets), 3 * whole)


# --- task-aware -----------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["sigmoid", "hsigmoid", None])
@pytest.mark.parametrize("module", [reference, functional])
def test_task_attention_formula(activation: str | None, module: object) -> None:
    features = normal(2, 3, 8, 2, 5) + 0.3
    p = random_parameters(3, 4, 8)
    fc = [p.fc1_weight, p.fc1_bias, p.fc2_weight, p.fc2_bias]
    mean = features.mean((1, 3, 4))  # over L and S together
    logits = F.linear(F.linear(mean, *fc[:2]).relu(), *fc[2:])
    gate = (logits + 3).clamp(0, 6) / 6 if activation == "hsigmoid" else 1 / (1 + (-logits).exp())
    a1, b1, a2, b2 = ((2 * gate - 1)[:, None, :, None, None]).split(8, dim=2)
    expected = torch.maximum((1 + a1) * features + b1 / 2, a2 * features + b2 / 2)
    settings = {"activation": activation} if activation else {}  # the default is the paper's
    assert_close(module.task_attention(features, *fc, **settings), expected)  # type: ignore[attr-defined]


# --- the pyramid as one tensor --------------------------------------------------------------------


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5])
def test_the_median_level(levels: int) -> None:
    # The coarser one of the two in the middle.
    assert reference.median_level(levels) == [0, 1, 1, 2, 2][levels - 1]
    sizes = [(16 >> i, 20 >> i) for i in range(levels)]
    stacked = reference.stack_pyramid(random_pyramid(2, 3, sizes))
    assert stacked.shape == (2, levels, 3, *sizes[levels // 2])


@pytest.mark.parametrize("mode", ["bilinear", "nearest", "max"])
def test_stack_pyramid_modes(mode: ResizeMode) -> None:
    # 8x8 -> 4x4 and 2x2 -> 4x4, by hand.
    levels = random_pyramid(2, 3, [(8, 8), (4, 4), (2, 2)])
    stacked = reference.stack_pyramid(levels, mode=mode)
    windows = levels[0].unflatten(3, (4, 2)).unflatten(2, (4, 2))  # [N, C, 4, 2, 4, 2]
    finest = {
        "bilinear": windows.mean((3, 5)),
        "nearest": windows[:, :, :, 0, :, 0],
        "max": windows.amax((3, 5)),
    }[mode]
    assert_close(stacked[:, 0], finest)
    assert torch.equal(stacked[:, 1], levels[1])
    if mode == "bilinear":
        # align_corners=False: half-pixel centres at -0.25, 0.25, 0.75, 1.25, clamped.
        matrix = torch.tensor([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]], dtype=torch.float64)
        coarsest = matrix @ levels[2] @ matrix.t()
    else:
        coarsest = levels[2].repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert_close(stacked[:, 2], coarsest)


@pytest.mark.parametrize("mode", ["bilinear", "nearest", "max"])
def test_stack_pyramid_of_any_sizes(mode: ResizeMode) -> None:
    levels = random_pyramid(1, 2, [(9, 4), (5, 7), (3, 8), (1, 1)])
    stacked = reference.stack_pyramid(levels, mode=mode)
    assert stacked.shape == (1, 4, 2, 3, 8)
    assert stacked.isfinite().all()
    assert torch.equal(stacked[:, 2], levels[2])
    assert_close(stacked[:, 3], levels[3].expand(1, 2, 3, 8))
    given_size = reference.stack_pyramid(levels, mode=mode, size=(5, 7))
    assert given_size.shape == (1, 4, 2, 5, 7)
    assert torch.equal(given_size[:, 1], levels[1])


def test_stack_pyramid_of_an_empty_batch() -> None:
    levels = random_pyramid(0, 2, [(4, 4), (2, 2)])
    assert reference.stack_pyramid(levels).shape == (0, 2, 2, 2, 2)


# --- blocks and stacks ----------------------------------------------------------------------------


@targets_both
def test_block_is_the_three_attentions_in_turn(targets: Targets) -> None:
    features, p = normal(2, 3, 4, 3, 5) + 0.5, random_parameters(3, 4, 8)
    scaled = features * reference.scale_gates(features, p.scale_weight, p.scale_bias).view(
        2, 3, 1, 1, 1
    )
    spatial = slow_spatial_attention(
        scaled, [p.spatial_weight, p.offset_weight, p.offset_bias], targets
    )
    expected = reference.task_attention(spatial, *p[5:])
    assert_close(reference.unified_block(features, p, targets=targets), expected)
    assert_close(functional.unified_block(features, p, targets=targets), expected)


def test_a_stack_is_its_blocks_in_turn() -> None:
    head = UnifiedDyHead(levels=3, channels=8, num_blocks=3).double()
    features = leaf(normal(2, 3, 8, 4, 5))
    expected = features
    for block in head.blocks:
        assert isinstance(block, UnifiedDyHeadBlock)
        expected = reference.unified_block(expected, block.parameters_tuple())
    actual = head(features)
    assert actual.shape == features.shape
    assert_close(actual, expected)
    inputs = [features, *head.parameters()]
    assert_close(gradients(actual, inputs), gradients(expected, inputs), factor=10)


@pytest.mark.parametrize("container", [list, tuple, dict])
@pytest.mark.parametrize("resize", ["bilinear", "nearest", "max"])
def test_head_on_a_pyramid(container: type, resize: ResizeMode) -> None:
    head = UnifiedDyHead(levels=3, channels=8, num_blocks=1, resize=resize).double()
    levels = random_pyramid(2, 8, [(9, 8), (5, 4), (3, 2)])
    features = (
        container(zip("abc", levels, strict=True)) if container is dict else container(levels)
    )
    assert_close(head(features), head(reference.stack_pyramid(levels, mode=resize)))


def test_median_targets_give_one_level() -> None:
    head = UnifiedDyHead(levels=4, channels=8, num_blocks=1, targets="median").double()
    features = normal(2, 4, 8, 3, 3)
    out = head(features)
    assert out.shape == (2, 1, 8, 3, 3)
    block = head.blocks[0]
    assert isinstance(block, UnifiedDyHeadBlock)
    assert_close(out, reference.unified_block(features, block.parameters_tuple(), targets="median"))


def test_empty_batch() -> None:
    out = UnifiedDyHead(levels=2, channels=4, num_blocks=2)(torch.randn(0, 2, 4, 3, 3))
    assert out.shape == (0, 2, 4, 3, 3)


def test_gradcheck_and_gradgradcheck() -> None:
    features = leaf(normal(1, 2, 2, 2, 3))
    inputs = [features, *map(leaf, random_parameters(2, 2, 3))]

    def run(features: Tensor, *parameters: Tensor) -> Tensor:
        return reference.unified_block(features, UnifiedParameters(*parameters))

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("name", ["scale_attention", "spatial_attention", "task_attention"])
def test_gradcheck_of_each_attention(name: str) -> None:
    p = random_parameters(2, 2, 2)
    arguments = {
        "scale_attention": [p.scale_weight, p.scale_bias],
        "spatial_attention": [p.spatial_weight[:, :1], p.offset_weight, p.offset_bias],
        "task_attention": list(p[5:]),
    }[name]
    inputs = [leaf(normal(2, 2, 2, 2, 2)), *map(leaf, arguments)]
    run = getattr(reference, name)
    assert torch.autograd.gradcheck(run, inputs, fast_mode=name == "spatial_attention")
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["scale_attention", "spatial_attention", "task_attention"])
def test_precision_and_dtype(dtype: torch.dtype, name: str) -> None:
    p = UnifiedParameters(*(t.to(dtype) for t in random_parameters(3, 8, 8)))
    arguments = {
        "scale_attention": [p.scale_weight, p.scale_bias],
        "spatial_attention": [p.spatial_weight, p.offset_weight, p.offset_bias],
        "task_attention": list(p[5:]),
    }[name]
    inputs = [leaf((normal(2, 3, 8, 6, 7) + 0.2).to(dtype)), *map(leaf, arguments)]
    exact = [leaf(t, torch.float64) for t in inputs]
    run = getattr(reference, name)
    actual, expected = run(*inputs), run(*exact)
    assert actual.dtype == dtype
    assert_close(actual, expected, dtype)
    assert_close(gradients(actual, inputs, dtype), gradients(expected, exact, dtype), dtype, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["scale_attention", "spatial_attention", "task_attention"])
def test_small_types_are_rounded_once(dtype: torch.dtype, name: str) -> None:
    p = random_parameters(3, 8, 8)
    arguments = {
        "scale_attention": [p.scale_weight, p.scale_bias],
        "spatial_attention": [p.spatial_weight, p.offset_weight, p.offset_bias],
        "task_attention": list(p[5:]),
    }[name]
    inputs = [t.to(dtype) for t in (normal(2, 3, 8, 6, 7), *arguments)]
    run = getattr(reference, name)
    assert torch.equal(run(*inputs), run(*[t.float() for t in inputs]).to(dtype))


def test_autocast_does_not_change_it() -> None:
    p = UnifiedParameters(*(t.float() for t in random_parameters(2, 4, 4)))
    features = normal(1, 2, 4, 3, 5).float()
    with torch.autocast("cpu", torch.bfloat16):
        actual = reference.unified_block(features, p)
    assert torch.equal(actual, reference.unified_block(features, p))


def test_layout_does_not_matter() -> None:
    features, p = normal(2, 3, 4, 3, 5), random_parameters(3, 4, 8)
    strange = features.permute(1, 3, 4, 2, 0).contiguous().permute(4, 0, 3, 1, 2)
    assert not strange.is_contiguous()
    assert_close(reference.unified_block(strange, p), reference.unified_block(features, p))
    assert_close(functional.unified_block(strange, p), functional.unified_block(features, p))


def test_tolerances_are_the_projects() -> None:
    assert TOLERANCE[torch.float64] == 1e-12
    assert TOLERANCE[torch.float32] == 2e-6


# --- errors ---------------------------------------------------------------------------------------


def test_more_blocks_than_the_median_can_stack() -> None:
    with pytest.raises(
        ValueError, match=r'num_blocks 1 with targets "median".*got 2.*targets="all"'
    ):
        UnifiedDyHead(levels=3, channels=4, num_blocks=2, targets="median")


def test_errors_of_the_head() -> None:
    with pytest.raises(ValueError, match=r"num_blocks.*got 0"):
        UnifiedDyHead(3, 4, 0)
    with pytest.raises(ValueError, match=r"resize to be one of.*'area'"):
        UnifiedDyHead(3, 4, 1, resize="area")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"targets to be one of.*'some'"):
        UnifiedDyHead(3, 4, 1, targets="some")  # type: ignore[arg-type]
    head = UnifiedDyHead(3, 4, 1)
    with pytest.raises(ValueError, match=r"\[N, L, C, H, W\], got \[2, 4, 3, 3\]"):
        head(torch.randn(2, 4, 3, 3))
    with pytest.raises(ValueError, match=r"features \[N, 3, 4, H, W\], got \["):
        head(torch.randn(1, 2, 4, 3, 3))
    with pytest.raises(ValueError, match=r"\[1, 3, 5, 3, 3\]"):
        head(torch.randn(1, 3, 5, 3, 3))
    with pytest.raises(ValueError, match=r"at least one level"):
        head([])
    with pytest.raises(ValueError, match=r"level 1 \[1, 4, H, W\] \(as level 0\), got \[1, 5, 3"):
        head([torch.randn(1, 4, 6, 6), torch.randn(1, 5, 3, 3), torch.randn(1, 4, 2, 2)])
    with pytest.raises(TypeError, match=r"list, tuple or dict.*str"):
        head("features")


def test_errors_of_the_functions() -> None:
    features, p = normal(1, 3, 4, 3, 3), random_parameters(3, 4, 4)
    with pytest.raises(ValueError, match=r"bias \[3\] for 3 levels, got \[4\]"):
        reference.scale_attention(features, p.scale_weight, torch.zeros(4))
    with pytest.raises(ValueError, match=r"targets to be one of.*'last'"):
        reference.spatial_attention(
            features,
            p.spatial_weight,
            p.offset_weight,
            p.offset_bias,
            targets="last",  # type: ignore[arg-type]
        )
    with pytest.raises(ValueError, match=r"weight \[3, C_out, 4, 3, 3\].*got \[3, 4, 3, 3, 3\]"):
        reference.spatial_attention(
            features, p.spatial_weight[:, :, :3], p.offset_weight, p.offset_bias
        )
    with pytest.raises(ValueError, match=r"offset_weight \[27, 4, 3, 3\]"):
        reference.spatial_attention(features, p.spatial_weight, p.offset_weight[:18], p.offset_bias)
    with pytest.raises(ValueError, match=r"fc2_weight \[16, 1\]"):
        reference.task_attention(features, *p[5:7], p.fc2_weight[:8], p.fc2_bias)
    with pytest.raises(ValueError, match=r"\[N, L, C, H, W\]"):
        functional.task_attention(features[0], *p[5:])
    with pytest.raises(ValueError, match=r"mode to be one of.*'area'"):
        reference.stack_pyramid([features[:, 0]], mode="area")  # type: ignore[arg-type]
