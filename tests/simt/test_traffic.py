"""The kernels access no more than the committed bounds allow: counts, not times."""

from __future__ import annotations

import json

import pytest

from . import traffic
from .build import counted, mutate

# Another compiler joins or hoists a few accesses differently.
SLACK = 1.01

pytestmark = [pytest.mark.spawns, pytest.mark.usefixtures("simt")]


def grown(found: dict[str, dict[str, int]], bounds: dict[str, dict[str, int]]) -> list[str]:
    """What exceeds its bound or has none, one line each."""
    lines = []
    for kernel, counts in found.items():
        if kernel not in bounds:
            lines.append(f"{kernel}: no bounds for this kernel")
            continue
        for name, number in counts.items():
            bound = bounds[kernel].get(name, 0)
            if number > SLACK * bound:
                lines.append(f"{kernel}: {name} {number:,}, at most {bound:,} expected")
    return lines


def test_traffic_is_within_bounds() -> None:
    found = traffic.by_kernel(traffic.small_problem())
    lines = grown(found, json.loads(traffic.BOUNDS.read_text()))
    assert not lines, (
        "\n".join(lines) + "\nIf that is meant, or another count fell in return, make the counts "
        f"the new bounds: {traffic.UPDATE}\nWhere in a kernel they come from: "
        "python -m tests.simt.traffic --places KERNEL"
    )


@pytest.mark.parametrize(
    ("file", "permuted", "source", "kernel"),
    [
        ("tile/tile_gemm.cuh", "row", "deform_conv_fwd_bfloat16", "deform_fwd_kernel"),
        ("deform_conv/plain_conv_fwd.cuh", "x", "plain_conv_fwd_bfloat16", "plain_fwd_kernel"),
    ],
)
def test_more_traffic_is_noticed(file: str, permuted: str, source: str, kernel: str) -> None:
    """Rows of a tile without their permutation conflict in the banks."""
    planted = mutate(
        f"csrc/cuda/{file}",
        f"((unit ^ ({permuted} & 7)) << 4)",
        "(unit << 4)",
        kernel=source,
        count=True,
    )
    forward = "traffic.run_block(simt, step, [(8, 8)], forward_only=True)"
    found = traffic.by_kernel(traffic.count_steps(forward, kernels=planted))
    lines = grown(found, traffic.by_kernel(traffic.count_steps(forward)))
    assert any(f"{kernel}: shared_wavefronts" in line for line in lines), lines


OF_ONE = """
import torch
from tests.helpers.fuse_cases import block_case

case = block_case([(8, 8), (4, 4)], channels=64)
for name, wanted in ("y", 0), ("scale", 1):
    tensors = [t.detach() for t in case.tensors(torch.float32)]
    tensors[wanted].requires_grad_()
    with traffic.Steps(simt, lambda _: None, 132):
        case.run(tensors).sum().backward()
    step(name)
"""


def test_what_nobody_wants_is_not_written() -> None:
    fuse = counted("fuse_branches_fwd", "fuse_branches_bwd")
    for name, counts in traffic.count_steps(OF_ONE, kernels=fuse).items():
        kernels = [k["arrays"] for k in counts.kernels.values()]
        written = {array for arrays in kernels for array in arrays if arrays[array]["stores"]}
        expected = {"y": {"out", "grad_z", "grad_y"}, "scale": {"out", "partial", "grad_scale"}}
        assert written == expected[name]


def test_frozen_parameters_take_no_launch() -> None:
    code = "traffic.run_block(simt, step, [(8, 8)], channels=64, frozen={})"
    for frozen, launches in (False, 2), (True, 1):
        steps = traffic.count_steps(code.format(frozen))
        assert len(steps["coefficients bwd"].kernels) == launches


def test_bounds() -> None:
    bounds = {"fwd: k": {"load_sectors": 100}}
    assert not grown({"fwd: k": {"load_sectors": 100}}, bounds)
    assert grown({"fwd: k": {"load_sectors": 102}}, bounds)
    assert grown({"fwd: k": {"atomic_sectors": 1}}, bounds)
    assert grown({"fwd: other": {}}, bounds)


def test_a_sample_stands_for_the_whole() -> None:
    """The tiles of one map of whole patches do the same work, but at its borders."""
    options = "processors=1, sampled=True, forward_only=True"  # no blocks that share tiles
    code = f"traffic.run_block(simt, step, [(32, 32)], 64, 2, {options})"
    # What each block counts, times the number of blocks.
    whole, sample = (
        traffic.count_steps(code, sampled_blocks=sampled)["convolutions fwd"] for sampled in (0, 4)
    )
    for name, launched in whole.kernels.items():
        assert launched["sampled_blocks"] == launched["blocks"]
        scale = launched["blocks"] / sample.kernels[name]["sampled_blocks"]
        assert sample.kernels[name]["blocks"] == launched["blocks"]
        if "deform_fwd" in name:
            assert scale > 1
            assert scale * sample.total("flop", name) == whole.total("flop", name)
            for number, access in (("sectors", "global load"), ("wavefronts", "shared store")):
                found = scale * sample.total(number, name, access)
                assert found == pytest.approx(whole.total(number, name, access), rel=0.15)
