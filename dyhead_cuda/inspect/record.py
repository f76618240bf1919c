"""What a block of the published head decides on its way: gates, offsets, modulation, switches."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from dyhead_cuda import checks, reference
from dyhead_cuda.modules import DyHead, DyHeadBlock
from dyhead_cuda.pyramid import (
    HIGH_OFFSETS,
    OFFSET_CHANNELS,
    TAPS,
    BlockParameters,
    Features,
    HighOffset,
    halved,
    unpack,
)

BRANCHES = ("low", "mid", "high")


@dataclass(frozen=True)
class BlockRun:
    """One block on the reference, with what is between its attentions. Levels finest first."""

    inputs: list[Tensor]  # [N, C_in, H_l, W_l]
    gates: list[dict[str, Tensor]]  # per level: branch name to [N]
    combined: list[Tensor]  # after spatial and scale attention, [N, C, H_l, W_l]
    outputs: list[Tensor]  # after the dynamic ReLU, in the dtype of the inputs


@dataclass(frozen=True)
class LevelRecord:
    """What a block does at one level of the first image of a batch."""

    gates: dict[str, float]  # branch name to its scale-aware gate, 0 to 1
    offset: Tensor  # [9, 2, H, W], dy before dx, in pixels of this level
    modulation: Tensor  # [9, H, W], 0 to 1
    coefficients: Tensor  # [4, C]: a1, b1, a2 and b2 of max(a1 x + b1, a2 x + b2)
    share: Tensor  # [C]: of the pixels, those for which a1 x + b1 is the larger of the two
    energy_input: Tensor  # [H, W]: L2 norm over the channels of what comes in,
    energy_combined: Tensor  # ... after spatial and scale attention,
    energy_output: Tensor  # ... and after the dynamic ReLU


@dataclass(frozen=True)
class Samples:
    """Where one branch reads for one pixel, and with what weight.

    The branch is there, up to its normalisation, the sum over P of weight . W[tap] . value, with
    the 3x3 convolution's W and the bilinearly interpolated value at the position.
    """

    level: int  # the one that is read
    taps: Tensor  # [P], 0 to 8, row by row
    grid: Tensor  # [P, 2] float64: y and x before the offset, in pixels of the level that is read
    positions: Tensor  # [P, 2] float64: y and x after it
    weights: Tensor  # [P] float64: the modulation, and for "high" its share in the upsampled pixel


def record(head: DyHead, features: Features) -> list[list[LevelRecord]]:
    """What every block of a head does with the first image of a batch.

    Args:
        head: any head; computed on the reference, in the dtype of the features.
        features: levels [N, C_in, H_l, W_l], finest first, as ``head`` takes them.

    Returns:
        Per block, per level: what :func:`describe` returns.
    """
    levels = [x[:1] for x in unpack(features)]
    blocks = []
    with torch.no_grad():
        for block in blocks_of(head):
            run = run_block(block, levels)
            blocks.append(describe(block, run))
            levels = run.outputs
    return blocks


def blocks_of(head: DyHead) -> list[DyHeadBlock]:
    """The blocks, first to last."""
    return cast(list[DyHeadBlock], list(head.blocks))


def run_block(block: DyHeadBlock, features: Sequence[Tensor]) -> BlockRun:
    """The block on the reference; ``outputs`` are those of :func:`reference.pyramid_block`.

    Args:
        block: the block; float16 and bfloat16 compute in float32, as everywhere.
        features: levels [N, C_in, H_l, W_l], finest first.
    """
    dtype = features[0].dtype
    if dtype in (torch.float16, torch.bfloat16):
        block = copy.deepcopy(block).float()
    parameters = block.parameters_tuple()
    inputs = [x.to(parameters.offset_weight.dtype) for x in features]
    gates, combined = [], []
    for branches in reference.branch_maps(
        inputs,
        parameters,
        high_offset=block.high_offset,
        num_groups=block.num_groups,
        eps=block.eps,
    ):
        level_gates, total = {}, torch.zeros_like(branches["mid"])
        for name, branch in branches.items():
            gate = reference.branch_gate(branch, parameters.gate_weight, parameters.gate_bias)
            level_gates[name] = gate
            total = total + gate.view(-1, 1, 1, 1) * branch
        gates.append(level_gates)
        combined.append(total / len(branches))
    outputs = [reference.dynamic_relu(x, *parameters[-4:]).to(dtype) for x in combined]
    return BlockRun(inputs, gates, combined, outputs)


def describe(block: DyHeadBlock, run: BlockRun) -> list[LevelRecord]:
    """What the block did in ``run``, level by level, as tensors on the CPU."""
    compute = run.inputs[0].dtype
    parameters = block.parameters_tuple()
    weight, bias = parameters.offset_weight.to(compute), parameters.offset_bias.to(compute)
    levels = []
    for x, gates, combined, output in zip(
        run.inputs, run.gates, run.combined, run.outputs, strict=True
    ):
        offset_mask = F.conv2d(x[:1], weight, bias, padding=1)[0]
        coefficients = _coefficients(parameters, combined[0])
        levels.append(
            LevelRecord(
                gates={name: float(gate[0]) for name, gate in gates.items()},
                offset=offset_mask[:OFFSET_CHANNELS].unflatten(0, (TAPS, 2)).cpu(),
                modulation=offset_mask[OFFSET_CHANNELS:].sigmoid().cpu(),
                coefficients=coefficients.cpu(),
                share=_share_of_first(coefficients, combined[0]).cpu(),
                energy_input=_energy(x),
                energy_combined=_energy(combined),
                energy_output=_energy(output),
            )
        )
    return levels


def _energy(x: Tensor) -> Tensor:
    return x[0].float().norm(dim=0).cpu()


def _coefficients(parameters: BlockParameters, x: Tensor) -> Tensor:
    """a1, b1, a2 and b2 of the dynamic ReLU on one image's x [C, H, W], as [4, C]."""
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = (t.to(x) for t in parameters.task)
    hidden = F.relu(F.linear(x.mean((1, 2)), fc1_weight, fc1_bias))
    logits = F.linear(hidden, fc2_weight, fc2_bias)
    a1, b1, a2, b2 = (2 * reference.hsigmoid(logits) - 1).chunk(4)
    return torch.stack([1 + a1, b1 / 2, a2, b2 / 2])


def _share_of_first(coefficients: Tensor, x: Tensor) -> Tensor:
    a1, b1, a2, b2 = coefficients[:, :, None, None]
    return (a1 * x + b1 >= a2 * x + b2).to(x.dtype).mean((1, 2))


def samples(
    levels: Sequence[LevelRecord], level: int, row: int, column: int, high_offset: HighOffset
) -> dict[str, Samples]:
    """Where the branches of one block read for the pixel (row, column) of a level.

    Args:
        levels: all levels of one block, as :func:`describe` returns them.
        level, row, column: the pixel.
        high_offset: the block's; see :func:`dyhead_cuda.reference.pyramid_block`.

    Returns:
        Branch name to 9 samples; the branch on the coarser level has up to 36 unless "aligned": it
        is computed there and upsampled, so that up to four of its pixels make one.

    Raises:
        ValueError: no such level or pixel, an unknown ``high_offset``.
    """
    checks.one_of("high_offset", high_offset, HIGH_OFFSETS)
    if not 0 <= level < len(levels):
        raise ValueError(f"expected a level from 0 to {len(levels) - 1}, got {level}")
    here = levels[level]
    height, width = _size(here)
    if not (0 <= row < height and 0 <= column < width):
        raise ValueError(
            f"expected a pixel of level {level}, which is {height} x {width}, got row {row} and "
            f"column {column}"
        )
    own = (here.offset[:, :, row, column], here.modulation[:, row, column])
    found = {"mid": _read(level, (row, column), *own, (height, width), (height, width))}
    if level > 0:
        finer = _size(levels[level - 1])
        # As the reference does: resized only where half of the finer level is another size.
        read = finer if halved(finer) == (height, width) else (2 * height, 2 * width)
        found["low"] = _read(level - 1, (2 * row, 2 * column), *own, read, finer)
    if level + 1 < len(levels):
        coarser = _size(levels[level + 1])
        if high_offset == "aligned":
            found["high"] = _read(level + 1, (row, column), *own, (height, width), coarser)
        else:
            found["high"] = _read_upsampled(level + 1, here, row, column, coarser, high_offset)
    return found


def _size(level: LevelRecord) -> tuple[int, int]:
    height, width = level.modulation.shape[-2:]
    return height, width


def _ratio(size: int, resized: int) -> float:
    """Pixels of a map per pixel of it resized with align_corners."""
    return (size - 1) / (resized - 1) if resized > 1 else 0.0


def _read(
    level: int,
    centre: tuple[int, int],
    offset: Tensor,
    modulation: Tensor,
    read: tuple[int, int],
    size: tuple[int, int],
) -> Samples:
    """The nine taps around ``centre`` of a level of ``size`` that is resized to ``read`` first."""
    taps = torch.arange(TAPS)
    grid = torch.stack([taps // 3 - 1, taps % 3 - 1], 1).double() + torch.tensor(centre)
    positions = grid + offset.double()
    inside = ((positions > -1) & (positions < torch.tensor(read))).all(1)
    ratio = torch.tensor([_ratio(*s) for s in zip(size, read, strict=True)], dtype=torch.float64)
    weights = torch.where(inside, modulation.double(), 0)
    return Samples(level, taps, grid * ratio, positions * ratio, weights)


def _read_upsampled(
    level: int,
    finer: LevelRecord,
    row: int,
    column: int,
    size: tuple[int, int],
    high_offset: HighOffset,
) -> Samples:
    """The taps of those up to four pixels of the coarser level that are blended into one."""
    predictions = finer.offset.flatten(0, 1)[None], finer.modulation[None]
    offset, mask = reference.high_offset_and_mask(*predictions, size, high_offset)
    offset, mask = offset[0].unflatten(0, (TAPS, 2)), mask[0]
    finer_size = _size(finer)
    corners = [
        _corners(index * _ratio(small, large), small)
        for index, small, large in zip((row, column), size, finer_size, strict=True)
    ]
    parts = [
        (share_y * share_x, _read(level, (y, x), offset[:, :, y, x], mask[:, y, x], size, size))
        for y, share_y in corners[0]
        for x, share_x in corners[1]
    ]
    return Samples(
        level,
        torch.cat([part.taps for _, part in parts]),
        torch.cat([part.grid for _, part in parts]),
        torch.cat([part.positions for _, part in parts]),
        torch.cat([share * part.weights for share, part in parts]),
    )


def _corners(position: float, size: int) -> list[tuple[int, float]]:
    """The one or two pixels beside a position and their shares of it."""
    first = min(int(position), size - 1)
    rest = position - first
    pairs = [(first, 1 - rest), (min(first + 1, size - 1), rest)]
    return [(index, share) for index, share in pairs if share > 0]
