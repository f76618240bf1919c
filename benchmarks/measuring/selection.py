"""The settings that a run measures: those selected, or a default set for the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.cases.heads import CASES, STACKED
from benchmarks.cases.problems import DIRECTIONS, FAMILIES, Setting
from benchmarks.cases.shapes import SHAPE_SETS, SMALL_BATCH, SMALL_LEVELS


@dataclass(frozen=True)
class Entry:
    """One setting and what to do with it.

    Attributes:
        setting: the case and its size.
        precisions, directions: all combinations are measured.
        families: the implementations beside ours.
        real_check: compare with the reference at this very size, not only at a small one.
    """

    setting: Setting
    precisions: tuple[str, ...]
    directions: tuple[str, ...] = DIRECTIONS
    families: tuple[str, ...] = FAMILIES
    real_check: bool = True


@dataclass(frozen=True)
class Selection:
    """What the command line asks for; an empty tuple leaves the choice to the device."""

    cases: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    batches: tuple[int, ...] = ()
    blocks: tuple[int, ...] = ()
    precisions: tuple[str, ...] = ()
    directions: tuple[str, ...] = ()
    families: tuple[str, ...] | None = None
    quick: bool = False


DEFAULT_PRECISIONS = {
    "cpu": ("float32", "bfloat16"),
    "cuda": ("bfloat16", "float16", "tf32", "float32"),
}
DEFAULT_BATCHES = {"cpu": (1,), "cuda": (8, 1)}
# On a CPU the peers take minutes for a head of six blocks, so it is measured only on request.
DEFAULT_CASES = {
    "cpu": tuple(case for case in CASES if case not in (*STACKED, "branches")),
    "cuda": ("head", *(case for case in CASES if case != "head")),
}
# Cases that torch.compile is measured on: compiling takes about a minute each on a CPU.
COMPILED_CASES = {"cpu": ("block",), "cuda": tuple(CASES)}
# Shapes and batches of a block that show how time grows with pixels and batch.
SWEEP = (("glip", 2), ("glip", 8), ("yolo", 1), ("mmdet", 1), ("swin", 1), ("masa", 1))
SWEEP_FAMILIES: dict[str, tuple[str, ...]] = {"cpu": (), "cuda": ("torchvision",)}
SWEEP_PRECISION = {"cpu": "float32", "cuda": "bfloat16"}


def entries(selection: Selection, device: str) -> list[Entry]:
    """What a run measures on a "cpu" or "cuda" device, most important first."""
    if selection == Selection():
        return [*_product(selection, device), *_sweep(device)]
    if selection.quick:
        selection = replace(selection, shapes=selection.shapes or ("tiny",))
    return _product(selection, device)


def _product(selection: Selection, device: str) -> list[Entry]:
    """All combinations of what was selected."""
    directions = selection.directions or DIRECTIONS
    precisions = selection.precisions or DEFAULT_PRECISIONS[device]
    batches = selection.batches or DEFAULT_BATCHES[device]
    return [
        Entry(
            Setting(case, SHAPE_SETS[name], batch, blocks),
            precisions,
            directions,
            _families(selection, case, device),
        )
        for case in selection.cases or DEFAULT_CASES[device]
        for name in selection.shapes or ("glip",)
        for blocks in _blocks(case, name, selection.blocks)
        for batch in batches
    ]


def _families(selection: Selection, case: str, device: str) -> tuple[str, ...]:
    """Those selected, or all; without torch.compile where that would take too long."""
    chosen = FAMILIES if selection.families is None else selection.families
    by_default = selection.families is None and case not in COMPILED_CASES[device]
    if selection.quick or by_default:
        return tuple(name for name in chosen if name != "compile")
    return chosen


def _sweep(device: str) -> list[Entry]:
    """A block at the sizes of ``SWEEP``, checked at a small size only."""
    return [
        Entry(
            Setting("block", SHAPE_SETS[name], batch),
            (SWEEP_PRECISION[device],),
            families=SWEEP_FAMILIES[device],
            real_check=False,
        )
        for name, batch in SWEEP
    ]


def _blocks(case: str, shapes: str, asked: Sequence[int]) -> Sequence[int]:
    if case not in STACKED:
        return (1,)
    return asked or (SHAPE_SETS[shapes].blocks,)


def small(setting: Setting) -> Setting:
    """The same case at a size where the reference is quick: few pixels, at most two blocks."""
    shapes = replace(setting.shapes, levels=SMALL_LEVELS)
    return Setting(setting.case, shapes, SMALL_BATCH, min(setting.blocks, 2))
