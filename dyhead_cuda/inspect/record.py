"""What a block of the published head decides on its way: gates, offsets, modulation, switches.

Example:
    >>> import torch, dyhead_cuda
    >>> from dyhead_cuda.inspect import record
    >>> head = dyhead_cuda.DyHead(16, 16, num_blocks=2)
    >>> blocks = record.record(head, [torch.randn(1, 16, side, side) for side in (8, 4)])
    >>> len(blocks), sorted(blocks[0][0].gates), blocks[0][0].offset.shape
    (2, ['high', 'mid'], torch.Size([9, 2, 8, 8]))
"""

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
    UPSAMPLES,
    BlockParameters,
    Features,
    HighOffset,
    Upsample,
    halved,
    unpack,
)

BRANCHES = ("low", "mid", "high")


@dataclass(frozen=True)
class BlockRun:
    """One block on the reference, with what is between its attentions. Levels finest first.

    Args:
        inputs: levels [N, C_in, H_l, W_l], in the dtype that is computed in.
        gates: per level, branch name to the gate of each image, [N].
        combined: after spatial and scale attention, [N, C, H_l, W_l].
        outputs: after the dynamic ReLU, [N, C, H_l, W_l], in the dtype of the features.
    """

    inputs: list[Tensor]
    gates: list[dict[str, Tensor]]
    combined: list[Tensor]
    outputs: list[Tensor]


@dataclass(frozen=True)
class LevelRecord:
    """What a block does at one level of the first image of a batch, as tensors on the CPU.

    Args:
        gates: branch name to its scale-aware gate, 0 to 1.
        offset: [9, 2, H, W], dy before dx, in pixels of this level.
        modulation: [9, H, W], 0 to 1.
        coefficients: [4, C]: a1, b1, a2 and b2 of max(a1 x + b1, a2 x + b2).
        share: [C], of the pixels, those for which a1 x + b1 is the larger of the two, 0 to 1.
        energy_input: [H, W] float32, the L2 norm over the channels of what comes in.
        energy_combined: the same after spatial and scale attention.
        energy_output: the same after the dynamic ReLU.
    """

    gates: dict[str, float]
    offset: Tensor
    modulation: Tensor
    coefficients: Tensor
    share: Tensor
    energy_input: Tensor
    energy_combined: Tensor
    energy_output: Tensor


@dataclass(frozen=True)
class Samples:
    """Where one branch reads for one pixel, and with what weight.

    The branch is there, up to its normalisation, the sum over P of weight . W[tap] . value, with
    the 3x3 convolution's W and the bilinearly interpolated value at the position.

    Args:
        level: the one that is read.
        taps: [P], 0 to 8, row by row.
        grid: [P, 2] float64, y and x before the offset, in pixels of the level that is read.
        positions: [P, 2] float64, y and x after it.
        weights: [P] float64, the modulation, and for "high" its share in the upsampled pixel.
    """

    level: int
    taps: Tensor
    grid: Tensor
    positions: Tensor
    weights: Tensor


def record(head: DyHead, features: Features) -> list[list[LevelRecord]]:
    """What every block of a head does with the first image of a batch.

    Args:
        head: any head; computed on the reference, in the dtype of the features.
        features: levels [N, C_in, H_l, W_l], finest first, as ``head`` takes them.

    Returns:
        Per block, per level: what :func:`describe` returns.

    Raises:
        TypeError: no head, or features that are no list, tuple or dict of tensors.
        ValueError: features that do not fit; a block that is not what its parameters say, because
            of hooks or adapters on its inner modules.

    Example:
        >>> import torch, dyhead_cuda
        >>> head = dyhead_cuda.DyHead(16, 16, num_blocks=1)
        >>> ((level,),) = record(head, [torch.randn(1, 16, 8, 8)])
        >>> level.coefficients.shape
        torch.Size([4, 16])
    """
    of_head = blocks_of(head)
    levels = unpack(features)
    checks.pyramid(levels, of_head[0].in_channels, of_head[0].high_offset)
    _check_an_image(levels)
    levels = [x[:1] for x in levels]
    blocks = []
    with torch.no_grad():
        for block in of_head:
            run = run_block(block, levels)
            blocks.append(describe(block, run))
            levels = run.outputs
    return blocks


def _check_an_image(levels: Sequence[Tensor]) -> None:
    for x in levels:
        if x.numel() == 0:
            raise ValueError(f"expected levels of an image and of pixels, got {list(x.shape)}")


def blocks_of(head: DyHead) -> list[DyHeadBlock]:
    """The blocks of a head.

    Args:
        head: any.

    Returns:
        The blocks, first to last.

    Raises:
        TypeError: no head.

    Example:
        >>> import dyhead_cuda
        >>> len(blocks_of(dyhead_cuda.DyHead(16, 16, num_blocks=2)))
        2
    """
    checks.instance("head", head, DyHead)
    return cast(list[DyHeadBlock], list(head.blocks))


def run_block(block: DyHeadBlock, features: Sequence[Tensor]) -> BlockRun:
    """The block on the reference; ``outputs`` are those of :func:`reference.pyramid_block`.

    Args:
        block: the block; float16 and bfloat16 compute in float32, as everywhere.
        features: levels [N, C_in, H_l, W_l], finest first.

    Returns:
        What is between its attentions.

    Raises:
        TypeError: no block, or features that are no list or tuple of tensors.
        ValueError: features that do not fit; the block is not what its parameters say, because of
            hooks or adapters on its inner modules.

    Example:
        >>> import torch, dyhead_cuda
        >>> run = run_block(dyhead_cuda.DyHeadBlock(8, 16), [torch.randn(2, 8, 6, 6)])
        >>> run.combined[0].shape, run.gates[0]["mid"].shape
        (torch.Size([2, 16, 6, 6]), torch.Size([2]))
    """
    checks.instance("block", block, DyHeadBlock)
    checks.pyramid(features, block.in_channels, block.high_offset)
    reason = block.unfused_reason()
    if reason is not None:
        raise ValueError(
            "expected a block that its parameters describe: what is recorded is computed from "
            f"them, and in this one {reason}; remove that, or record the block before it is added"
        )
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
        upsample=block.upsample,
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
    """What a block did, level by level, as tensors on the CPU.

    Args:
        block: the block.
        run: what :func:`run_block` returned for it.

    Returns:
        A record of each level, finest first.

    Raises:
        TypeError: no block, or no run.
        ValueError: a run of no image, or with a level of no pixels.

    Example:
        >>> import torch, dyhead_cuda
        >>> block = dyhead_cuda.DyHeadBlock(8, 16)
        >>> (level,) = describe(block, run_block(block, [torch.randn(2, 8, 6, 6)]))
        >>> level.modulation.shape
        torch.Size([9, 6, 6])
    """
    checks.instance("block", block, DyHeadBlock)
    checks.instance("run", run, BlockRun, "run_block(block, features) returns one")
    _check_an_image(run.inputs)
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
                gates={name: float(gate[0].detach()) for name, gate in gates.items()},
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
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = (t.to(x) for t in parameters.task())
    hidden = F.relu(F.linear(x.mean((1, 2)), fc1_weight, fc1_bias))
    logits = F.linear(hidden, fc2_weight, fc2_bias)
    a1, b1, a2, b2 = (2 * reference.hsigmoid(logits) - 1).chunk(4)
    return torch.stack([1 + a1, b1 / 2, a2, b2 / 2])


def _share_of_first(coefficients: Tensor, x: Tensor) -> Tensor:
    a1, b1, a2, b2 = coefficients[:, :, None, None]
    return (a1 * x + b1 >= a2 * x + b2).to(x.dtype).mean((1, 2))


def samples(
    levels: Sequence[LevelRecord],
    level: int,
    row: int,
    column: int,
    high_offset: HighOffset,
    upsample: Upsample = "bilinear",
) -> dict[str, Samples]:
    """Where the branches of one block read for the pixel (row, column) of a level.

    Args:
        levels: all levels of one block, as :func:`describe` returns them.
        level: which of them.
        row: of the pixel.
        column: of the pixel.
        high_offset: the block's; see :func:`dyhead_cuda.reference.pyramid_block`.
        upsample: the block's, "bilinear" or, unless "aligned", "nearest".

    Returns:
        Branch name to 9 samples; the branch on the coarser level has up to 36 unless "aligned": it
        is computed there and upsampled, so that up to four of its pixels make one (one, for
        "nearest").

    Raises:
        TypeError: no records of levels, or indices that are no integers.
        ValueError: no such level or pixel, an unknown name, "aligned" with "nearest".

    Example:
        >>> import torch, dyhead_cuda
        >>> head = dyhead_cuda.DyHead(16, 16, num_blocks=1)
        >>> (levels,) = record(head, [torch.randn(1, 16, side, side) for side in (8, 4)])
        >>> samples(levels, 0, 3, 5, "flat")["mid"].positions.shape
        torch.Size([9, 2])
    """
    checks.one_of("high_offset", high_offset, HIGH_OFFSETS)
    checks.one_of("upsample", upsample, UPSAMPLES)
    if high_offset == "aligned" and upsample == "nearest":
        raise ValueError(
            'expected upsample="bilinear" with high_offset="aligned": a sample between two pixels '
            "of a level that was resized by repeating them is at no one place of it"
        )
    if not isinstance(levels, list | tuple):
        raise TypeError(f"expected a list of LevelRecord, got {type(levels).__name__}")
    for record_of_level in levels:
        checks.instance("a level", record_of_level, LevelRecord, "record(head, features) has them")
    checks.integers(level=level, row=row, column=column)
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
            found["high"] = _read_upsampled(
                level + 1, here, (row, column), coarser, high_offset, upsample
            )
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
    pixel: tuple[int, int],
    size: tuple[int, int],
    high_offset: HighOffset,
    upsample: Upsample,
) -> Samples:
    """The taps of those up to four pixels of the coarser level that are blended into one."""
    predictions = finer.offset.flatten(0, 1)[None], finer.modulation[None]
    offset, mask = reference.high_offset_and_mask(*predictions, size, high_offset)
    offset, mask = offset[0].unflatten(0, (TAPS, 2)), mask[0]
    finer_size = _size(finer)
    corners = [
        [(index * small // large, 1.0)]
        if upsample == "nearest"
        else _corners(index * _ratio(small, large), small)
        for index, small, large in zip(pixel, size, finer_size, strict=True)
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
    fraction = position - first
    pairs = [(first, 1 - fraction), (min(first + 1, size - 1), fraction)]
    return [(index, share) for index, share in pairs if share > 0]
