"""What a block of the published head decides on its way: gates, offsets, modulation, switches."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dyhead_cuda import reference
from dyhead_cuda.modules import DyHeadBlock
from dyhead_cuda.pyramid import OFFSET_CHANNELS, TAPS, BlockParameters

BRANCHES = ("low", "mid", "high")


@dataclass(frozen=True)
class BlockRun:
    """One block on the reference, with what is between its attentions. Levels finest first."""

    inputs: list[Tensor]  # [N, C_in, H_l, W_l]
    gates: list[dict[str, Tensor]]  # per level: branch name to [N]
    combined: list[Tensor]  # after spatial and scale attention, [N, C, H_l, W_l]
    outputs: list[Tensor]  # after the dynamic ReLU, in the dtype of the inputs


@dataclass(frozen=True)
class LevelTrace:
    """What a block does at one level of the first image of a batch."""

    gates: dict[str, float]  # branch name to its scale-aware gate, 0 to 1
    offset: Tensor  # [9, 2, H, W], dy before dx, in pixels of this level
    modulation: Tensor  # [9, H, W], 0 to 1
    slopes: Tensor  # [2, C]: a1 and a2 of the dynamic ReLU
    energy_input: Tensor  # [H, W]: L2 norm over the channels of what comes in,
    energy_combined: Tensor  # ... after spatial and scale attention,
    energy_output: Tensor  # ... and after the dynamic ReLU


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


def describe(block: DyHeadBlock, run: BlockRun) -> list[LevelTrace]:
    """What the block did in ``run``, level by level, as tensors on the CPU."""
    compute = run.inputs[0].dtype
    parameters = block.parameters_tuple()
    weight, bias = parameters.offset_weight.to(compute), parameters.offset_bias.to(compute)
    levels = []
    for x, gates, combined, output in zip(
        run.inputs, run.gates, run.combined, run.outputs, strict=True
    ):
        offset_mask = F.conv2d(x[:1], weight, bias, padding=1)[0]
        levels.append(
            LevelTrace(
                gates={name: float(gate[0]) for name, gate in gates.items()},
                offset=offset_mask[:OFFSET_CHANNELS].unflatten(0, (TAPS, 2)).cpu(),
                modulation=offset_mask[OFFSET_CHANNELS:].sigmoid().cpu(),
                slopes=_slopes(parameters, combined[0]).cpu(),
                energy_input=_energy(x),
                energy_combined=_energy(combined),
                energy_output=_energy(output),
            )
        )
    return levels


def _energy(x: Tensor) -> Tensor:
    return x[0].float().norm(dim=0).cpu()


def _slopes(parameters: BlockParameters, x: Tensor) -> Tensor:
    """a1 and a2 of the dynamic ReLU on one image's x [C, H, W], as [2, C]."""
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = (t.to(x) for t in parameters[-4:])
    hidden = F.relu(F.linear(x.mean((1, 2)), fc1_weight, fc1_bias))
    logits = F.linear(hidden, fc2_weight, fc2_bias)
    a1, _, a2, _ = (2 * reference.hsigmoid(logits) - 1).chunk(4)
    return torch.stack([1 + a1, a2])
