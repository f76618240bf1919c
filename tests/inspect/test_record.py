"""What is read off a block: the numbers that it uses, at the places that it reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dyhead_cuda import backend, reference
from dyhead_cuda.inspect import record
from dyhead_cuda.inspect.record import Samples
from dyhead_cuda.modules import ATTENTIONS, DyHead, DyHeadBlock
from dyhead_cuda.pyramid import HIGH_OFFSETS, HighOffset, Upsample, halved


def _features(channels: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    sizes = [(15, 18), (8, 9), (4, 5)]
    return [torch.randn(2, channels, *size, dtype=dtype) for size in sizes]


def _block(head: DyHead) -> DyHeadBlock:
    (block,) = record.blocks_of(head)
    return block


@pytest.mark.parametrize("high_offset", HIGH_OFFSETS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_recorded_block_is_the_reference(high_offset: HighOffset, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    head = DyHead(24, 32, 1, high_offset=high_offset, deform_bias=False).to(dtype)
    features = _features(24, dtype)
    with torch.no_grad(), backend("reference"):
        expected = head(features)
        run = record.run_block(_block(head), features)
    for ours, theirs in zip(run.outputs, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def test_the_record_tells_what_the_block_did() -> None:
    torch.manual_seed(1)
    head = DyHead(32, 32, 1).double()
    block = _block(head)
    features = _features(32, torch.float64)
    with torch.no_grad():
        run = record.run_block(block, features)
        levels = record.describe(block, run)
    branch_names = [{"mid", "high"}, {"low", "mid", "high"}, {"low", "mid"}]
    assert [set(level.gates) for level in levels] == branch_names
    for level, x, combined, output in zip(levels, features, run.combined, run.outputs, strict=True):
        height, width = x.shape[-2:]
        assert all(0.5 <= gate <= 1 for gate in level.gates.values())
        assert level.offset.shape == (9, 2, height, width)
        assert level.modulation.shape == (9, height, width)
        torch.testing.assert_close(level.energy_input, x[0].norm(dim=0).float())
        torch.testing.assert_close(level.energy_combined, combined[0].norm(dim=0).float())
        torch.testing.assert_close(level.energy_output, output[0].norm(dim=0).float())
        assert not torch.equal(level.coefficients[0], level.coefficients[2])
        assert ((level.coefficients[0] >= 0) & (level.coefficients[0] <= 2)).all()
        assert (level.coefficients[1:].abs() <= 1).all()


def test_slopes_are_those_of_the_dynamic_relu() -> None:
    torch.manual_seed(2)
    block = _block(DyHead(32, 32, 1).double())
    features = _features(32, torch.float64)
    with torch.no_grad():
        run = record.run_block(block, features)
        levels = record.describe(block, run)
    for level, combined, output in zip(levels, run.combined, run.outputs, strict=True):
        x, y = combined[0].flatten(1), output[0].flatten(1)
        order = x.argsort(dim=1)
        x, y = x.gather(1, order), y.gather(1, order)
        slopes = (y[:, 1:] - y[:, :-1]) / (x[:, 1:] - x[:, :-1])
        steepest, flattest = slopes[:, -1], slopes[:, 0]
        torch.testing.assert_close(steepest, level.coefficients[::2].amax(0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(flattest, level.coefficients[::2].amin(0), rtol=1e-4, atol=1e-4)


SIZES = [(13, 18), (7, 9), (4, 5), (2, 3), (1, 2)]
ODD_SIZES = [(12, 17), (7, 10), (3, 4)]


def _head(high_offset: HighOffset, blocks: int = 1, **options: Any) -> DyHead:
    torch.manual_seed(3)
    head = DyHead(8, 8, blocks, high_offset=high_offset, num_groups=2, **options).double()
    with torch.no_grad():
        for block in record.blocks_of(head):
            gains = {"offset_conv.weight": 4, "scale_gate.weight": 30, "dynamic_relu.fc2.weight": 8}
            for name, parameter in block.named_parameters():
                parameter.mul_(gains.get(name, 1))
    return head


def _pyramid(sizes: list[tuple[int, int]]) -> list[Tensor]:
    torch.manual_seed(4)
    return [torch.randn(2, 8, *size, dtype=torch.float64) for size in sizes]


@pytest.mark.parametrize("left_out", [None, *ATTENTIONS])
@pytest.mark.parametrize("high_offset", HIGH_OFFSETS)
def test_gates_and_coefficients_make_the_outputs_of_every_block(
    high_offset: HighOffset, left_out: str | None
) -> None:
    head = _head(high_offset, 2, attentions=[a for a in ATTENTIONS if a != left_out])
    features = _pyramid(SIZES)
    for block, levels in zip(record.blocks_of(head), record.record(head, features), strict=True):
        with torch.no_grad(), backend("reference"):
            outputs = block(features)
            maps = reference.branch_maps(
                features, block.parameters_tuple(), high_offset=high_offset, num_groups=2
            )
        gates = [gate for level in levels for gate in level.gates.values()]
        assert (set(gates) == {1.0}) == (left_out == "scale")
        for level, branches, output in zip(levels, maps, outputs, strict=True):
            assert level.gates.keys() == branches.keys()
            x = sum(level.gates[name] * branches[name][0] for name in branches) / len(branches)
            a1, b1, a2, b2 = level.coefficients[:, :, None, None]
            first, second = a1 * x + b1, a2 * x + b2
            torch.testing.assert_close(torch.maximum(first, second), output[0], rtol=0, atol=1e-10)
            share = (first >= second).double().mean((1, 2))
            torch.testing.assert_close(level.share, share, rtol=0, atol=0.5 / first[0].numel())
        features = outputs


@pytest.mark.parametrize(
    ("high_offset", "sizes", "upsample"),
    [
        *((high_offset, SIZES, "bilinear") for high_offset in HIGH_OFFSETS),
        ("aligned", ODD_SIZES, "bilinear"),
        *((high_offset, SIZES, "nearest") for high_offset in ("flat", "crop")),
    ],
)
def test_samples_make_every_branch(
    high_offset: HighOffset, sizes: list[tuple[int, int]], upsample: Upsample
) -> None:
    """What is read at the samples is the branch before its normalisation.

    That is one affine function for each channel, the same for all pixels of the level.
    """
    (block,) = record.blocks_of(_head(high_offset, upsample=upsample))
    features = _pyramid(sizes)
    with torch.no_grad():
        run = record.run_block(block, features)
        for ours, theirs in zip(run.outputs, block(features), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
        levels = record.describe(block, run)
        parameters = block.parameters_tuple()
        maps = reference.branch_maps(
            features, parameters, high_offset=high_offset, upsample=upsample, num_groups=2
        )
    for index, branches in enumerate(maps[:3]):
        height, width = sizes[index]
        for name, branch in branches.items():
            weight, bias = getattr(parameters, name)[:2]
            assert weight is not None
            pixels = [(y, x) for y in range(height) for x in range(width)]
            found = [record.samples(levels, index, *p, high_offset, upsample)[name] for p in pixels]
            read = _read_size(sizes, index, name) if high_offset == "aligned" else None
            sums = [_weighted_sum(features, s, weight.detach(), read) for s in found]
            ours = torch.stack(sums, dim=1) + bias.detach()[:, None]
            theirs = branch[0].flatten(1)
            centred, expected = ours - ours.mean(1, True), theirs - theirs.mean(1, True)
            slope = (centred * expected).sum(1, True) / centred.square().sum(1, True)
            assert (slope > 1e-3).all()
            torch.testing.assert_close(slope * centred, expected, rtol=0, atol=1e-10)


def _read_size(sizes: list[tuple[int, int]], level: int, name: str) -> tuple[int, int] | None:
    """To what the paper's formula resizes the level that a branch reads, if at all."""
    height, width = sizes[level]
    if name == "high":
        return height, width
    if name == "low" and halved(sizes[level - 1]) != (height, width):
        return 2 * height, 2 * width
    return None


def _weighted_sum(
    features: list[Tensor], samples: Samples, weight: Tensor, read: tuple[int, int] | None
) -> Tensor:
    source = features[samples.level][:1]
    size = torch.tensor(source.shape[-2:])
    positions = samples.positions
    if read is not None:
        source = F.interpolate(source, read, mode="bilinear", align_corners=True)
        positions = positions / (size - 1) * (torch.tensor(read) - 1)
        size = torch.tensor(read)
    grid = (2 * positions / (size - 1) - 1).flip(1)[None, None]
    values = F.grid_sample(source, grid, align_corners=True)[0, :, 0]  # [C, P]
    taps = weight.flatten(2)[:, :, samples.taps]  # [C_out, C, P]
    return torch.einsum("ocp,cp,p->o", taps, values, samples.weights)


def test_without_spatial_attention_the_samples_are_the_regular_grid() -> None:
    features = _pyramid(SIZES)
    (levels,) = record.record(_head("crop", attentions=["scale", "task"]), features)
    found = record.samples(levels, 1, 3, 5, "crop")
    assert list(found) == ["mid", "low", "high"]
    assert [found[name].level for name in found] == [1, 0, 2]
    expected = [(float(y), float(x)) for y in (2, 3, 4) for x in (4, 5, 6)]
    assert list(map(tuple, found["mid"].positions.tolist())) == expected
    assert found["mid"].weights.tolist() == [1.0] * 9
    # Around the pixel of the finer level that stride 2 begins at.
    assert found["low"].positions.mean(0).tolist() == [6.0, 10.0]
    # 3 of 0..6 is 1.5 of 0..3, 5 of 0..8 is 2.5 of 0..4: four pixels, a quarter each.
    assert found["high"].weights.tolist() == [0.25] * 36
    assert found["high"].positions.mean(0).tolist() == [1.5, 2.5]


def test_samples_outside_the_level_weigh_nothing() -> None:
    features = _pyramid(SIZES)
    (levels,) = record.record(_head("flat", attentions=["task"]), features)
    corner = record.samples(levels, 0, 0, 0, "flat")["mid"]
    assert corner.weights.tolist() == [0.0] * 4 + [1.0] * 2 + [0.0] + [1.0] * 2


@pytest.mark.parametrize(
    ("level", "row", "column", "message"),
    [
        (5, 0, 0, "expected a level from 0 to 4, got 5"),
        (1, 7, 0, "expected a pixel of level 1, which is 7 x 9, got row 7 and column 0"),
        (1, 0, -1, "got row 0 and column -1"),
    ],
)
def test_pixels_that_there_are_not(level: int, row: int, column: int, message: str) -> None:
    (levels,) = record.record(_head("flat"), _pyramid(SIZES))
    with pytest.raises(ValueError, match=message):
        record.samples(levels, level, row, column, "flat")


def test_what_cannot_be_recorded() -> None:
    head, features = _head("aligned"), _pyramid(SIZES)
    (levels,) = record.record(head, features)
    with pytest.raises(ValueError, match='expected upsample="bilinear" with high_offset="aligned"'):
        record.samples(levels, 0, 0, 0, "aligned", "nearest")
    (block,) = record.blocks_of(head)
    block.dynamic_relu.fc2.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"in this one dynamic_relu\.fc2 has hooks.*remove that"):
        record.record(head, features)
