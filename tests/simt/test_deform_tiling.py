"""How a call of deform_conv is cut into launches and tiles."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from dyhead_cuda.fused import BlockPlan, predict_plan
from dyhead_cuda.ops.jobs import Job, Plan, Size

# 800 x 1344 pixels, padded to multiples of 32.
PYRAMID = ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))
SMALL_PYRAMID = ((25, 42), (13, 21), (7, 11), (4, 6), (2, 3))  # 200 x 336 pixels
KILOBYTE = 1024


def tiling(
    simt: Any,
    plan: Plan,
    channels: int = 256,
    out_channels: int = 256,
    *,
    dtype: str = "bfloat16",
    processors: int = 132,
    shared_bytes: int = 227 * KILOBYTE,
    **options: bool,
) -> Any:
    device = simt.deform_conv.DeviceLimits(processors, shared_bytes)
    return simt.deform_conv.tiling(
        plan.tables, dtype, channels, out_channels, device=device, **options
    )


def test_worked_example(simt: Any) -> None:
    """The numbers that the comment of forward_tiling gives."""
    one = BlockPlan(PYRAMID, 1, "flat").deform
    assert tiling(simt, one) == (128, 256, [(13, 281)])
    small = BlockPlan(SMALL_PYRAMID, 1, "flat").deform
    assert tiling(simt, small) == (64, 256, [(13, 44)])
    eight = BlockPlan(PYRAMID, 8, "flat").deform
    assert tiling(simt, eight) == (128, 256, [(13, 2248)])


def test_a_block_is_one_launch_up_to_eight_levels(simt: Any) -> None:
    sizes = tuple((2**i, 2**i) for i in range(8, 0, -1))
    for rule in ("flat", "crop", "aligned", "mmdet_main"):
        _, _, launches = tiling(simt, BlockPlan(sizes, 2, rule).deform)
        assert len(launches) == 1


@pytest.mark.parametrize(
    ("out_channels", "options", "expected"),
    [
        (27, {}, (128, 32)),
        (96, {}, (128, 128)),
        (256, {"dtype": "float32"}, (128, 128)),
        (256, {"dtype": "float32", "allow_tf32": True}, (128, 256)),
        (256, {"dtype": "float64"}, (128, 32)),
        (256, {"vectors": False}, (128, 32)),
        (512, {}, (128, 256)),
    ],
)
def test_outputs_and_arithmetic(
    simt: Any, out_channels: int, options: dict[str, Any], expected: tuple[int, int]
) -> None:
    plan = BlockPlan(PYRAMID, 8, "flat").deform
    assert tiling(simt, plan, 256, out_channels, **options)[:2] == expected


def test_small_shared_memory_takes_small_tiles(simt: Any) -> None:
    plan = BlockPlan(PYRAMID, 8, "flat").deform
    assert tiling(simt, plan, shared_bytes=99 * KILOBYTE)[:2] == (64, 256)


def test_patches_or_stretches(simt: Any) -> None:
    """Patches of 8 x 16 pixels unless stretches of 128 pixels are a good deal fewer."""
    for size, tiles in {(80, 160): 100, (7, 11): 1, (13, 21): 3, (1, 1000): 8, (9, 17): 2}.items():
        plan = Plan(1, [size], [size], [Job(size, 0, [(0, 0)])])
        assert tiling(simt, plan, 256, 27) == (128, 32, [(1, tiles)]), size


def takes_plain_kernel(
    simt: Any,
    plan: Plan,
    channels: int = 256,
    out_channels: int = 27,
    *,
    dtype: str = "bfloat16",
    shared_bytes: int = 227 * KILOBYTE,
    **options: bool,
) -> bool:
    device = simt.deform_conv.DeviceLimits(132, shared_bytes)
    found: bool = simt.deform_conv.takes_plain_kernel(
        plan.tables, dtype, channels, out_channels, device=device, **options
    )
    return found


def plain_plan(
    *sizes: Size, stride: Size = (1, 1), predictions: int | None = None, **geometry: Any
) -> Plan:
    jobs = [Job(size, predictions, [(i, 0)], stride) for i, size in enumerate(sizes)]
    return Plan(1, sizes, sizes, jobs, **geometry)


def test_plain_kernel(simt: Any) -> None:
    """It predicts the offsets of every pyramid, on small devices too."""
    for sizes in (PYRAMID, SMALL_PYRAMID, [(2**i, 2**i) for i in range(8, -1, -1)]):
        plan = predict_plan(sizes, 2)
        for dtype in ("bfloat16", "float16"):
            assert takes_plain_kernel(simt, plan, dtype=dtype, shared_bytes=99 * KILOBYTE)
        assert takes_plain_kernel(simt, plan, dtype="float32", allow_tf32=True)
        for dtype in ("float32", "float64"):
            assert not takes_plain_kernel(simt, plan, dtype=dtype)
    # The coarser maps would be runs; here all are patches.
    assert tiling(simt, predict_plan(PYRAMID, 1), 256, 27) == (128, 32, [(5, 202)])
    assert tiling(simt, predict_plan(PYRAMID, 1), 256, 27, sums_only=False)[2] == [(5, 189)]


@pytest.mark.parametrize(
    ("plan", "options", "expected"),
    [
        (plain_plan((9, 17)), {}, True),
        (plain_plan((9, 17)), {"vectors": False}, False),
        (plain_plan((9, 17)), {"sums_only": False}, False),
        (plain_plan((9, 17)), {"shared_bytes": 64 * KILOBYTE}, False),
        (plain_plan((9, 17)), {"out_channels": 32}, True),
        (plain_plan((9, 17)), {"out_channels": 33}, False),
        (plain_plan((9, 17), groups=2), {"out_channels": 64}, True),
        (plain_plan((9, 17), (3, 4), predictions=0), {}, False),
        (plain_plan((9, 17), stride=(1, 2)), {}, False),
        (plain_plan((9, 17), stride=(2, 1)), {}, False),
        (plain_plan((9, 17), dilation=(1, 2)), {}, False),
        (plain_plan((9, 17), dilation=(2, 1)), {}, False),
        (plain_plan((9, 17), kernel=(3, 1)), {}, False),
        (plain_plan((9, 17), kernel=(5, 3)), {}, False),
        (plain_plan((9, 17), padding=(0, 3)), {}, True),
        (plain_plan((9, 17), deform_groups=2), {}, False),
        (Plan(1, [(3, 4)], [], [Job((3, 4), None, [(0, 0), (0, 0)])]), {}, False),
        # 63 patches for 24 and for 8 runs.
        (plain_plan((3, 1000)), {}, True),
        (plain_plan((1, 1000)), {}, False),
        (plain_plan((1, 1000), (100, 168)), {}, True),
    ],
)
def test_what_the_plain_kernel_takes(
    simt: Any, plan: Plan, options: dict[str, Any], expected: bool
) -> None:
    assert takes_plain_kernel(simt, plan, **options) == expected


def test_more_jobs_than_a_table_holds(simt: Any) -> None:
    outs = [(4, 4)] * 50
    plan = Plan(1, outs, outs, [Job(out, i, [(i, 0)]) for i, out in enumerate(outs)])
    _, _, launches = tiling(simt, plan)
    assert [jobs for jobs, _ in launches] == [24, 24, 2]
    assert sum(tiles for _, tiles in launches) == 50


def test_no_images_take_no_tiles(simt: Any) -> None:
    assert tiling(simt, BlockPlan(PYRAMID, 0, "flat").deform)[2] == [(13, 0)]


def test_tiles_of_the_input_kernel(simt: Any) -> None:
    """Large ones for half types, where they fit and make fewer rounds."""

    def rows(
        dtype: str = "bfloat16",
        *,
        sizes: tuple[tuple[int, int], ...] = PYRAMID,
        kilobytes: int = 227,
        vectors: bool = True,
    ) -> int:
        found: int = simt.deform_conv.input_tiling(
            BlockPlan(sizes, 1, "flat").deform.tables,
            dtype,
            256,
            256,
            vectors=vectors,
            device=simt.deform_conv.DeviceLimits(132, kilobytes * KILOBYTE),
        )[0]
        return found

    assert rows() == rows("float16") == 128
    assert rows(sizes=SMALL_PYRAMID) == 64
    assert rows(kilobytes=163) == 64
    assert rows(vectors=False) == 64
    assert rows("float32") == 64


@pytest.mark.parametrize(
    ("size", "channels", "problem"),
    [
        ((1, 2**31 - 8), 1, None),
        ((1, 2**31 - 4), 1, "expected source maps of (height + 1) * (width + 1) < 2^32"),
        ((1, 2**31 - 8), 64, "expected source maps of less than 64 GiB per image"),
    ],
)
def test_maps_too_large_for_the_kernels(
    simt: Any, size: tuple[int, int], channels: int, problem: str | None
) -> None:
    tables = Plan(1, [size], [(4, 4)], [Job((4, 4), 0, [(0, 0)])]).tables
    assert simt.deform_conv.problem(tables, "bfloat16", channels, 8) == problem


def test_split_as_documented(simt: Any) -> None:
    split = partial(simt.deform_conv.split_tiles, taps=9, steps=4, at_once=132)
    assert split(281) == (264, 5, 2 * 36 + 14)
    assert split(545) == (528, 5, 4 * 36 + 14)
    assert split(27) == (0, 3, 12 + 4)
    assert split(44) == (0, 3, 12 + 4)
    assert split(264) == (264, 1, 2 * 36)
    # Two blocks each for more than half of the processors would take another round.
    assert split(132 + 67) == (132 + 67, 1, 2 * 36)
    assert split(0) == (0, 1, 0)
    assert split(5, taps=1) == (5, 1, 4)


@pytest.mark.parametrize("taps", [1, 2, 9, 25])
def test_splits_fill_one_round_and_pay(simt: Any, taps: int) -> None:
    for tiles in range(1, 60):
        for at_once in (1, 4, 7, 20):
            whole, parts, steps = simt.deform_conv.split_tiles(
                tiles, taps=taps, steps=2, at_once=at_once
            )
            shared = tiles - whole
            assert 1 <= parts <= taps
            assert shared * parts <= at_once
            assert whole % at_once == 0 or (parts, shared) == (1, 0)
            assert steps <= -(-tiles // at_once) * taps * 2
