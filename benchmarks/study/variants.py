"""What the study compares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dyhead_cuda.modules import ATTENTIONS, Attention, Init, WithoutTask
from dyhead_cuda.pyramid import HIGH_OFFSETS, HighOffset


@dataclass(frozen=True)
class Variant:
    """A detector of the study; :class:`~benchmarks.study.setup.Setup` has what all share.

    Attributes:
        label: in tables and plots.
        blocks, convs, shared_tower, attentions, without_task, high_offset, init: see
            :class:`~dyhead_cuda.detection.ModelConfig`. 0 blocks are a plain head.
    """

    label: str
    blocks: int = 0
    convs: int | None = None
    shared_tower: bool = False
    attentions: tuple[Attention, ...] = ATTENTIONS
    without_task: WithoutTask = "identity"
    high_offset: HighOffset = "flat"
    init: Init = "mmdet"

    def settings(self) -> dict[str, Any]:
        """Of :class:`~dyhead_cuda.detection.ModelConfig`, as JSON has them."""
        values = asdict(self)
        del values["label"]
        return {**values, "attentions": list(self.attentions)}


@dataclass(frozen=True)
class Table:
    """Variants that are compared with each other; differences are to the first."""

    title: str
    variants: tuple[str, ...]


SEEDS = 3  # of each row
DEPTHS = (1, 2, 4, 6)
# Initialisations beside the one that all other rows have.
INITS: tuple[Init, ...] = ("local", "microsoft")
# Blocks of the variants that differ in something else than the number of blocks.
_BLOCKS = 2
_WHOLE = f"dyhead-{_BLOCKS}"


def _plain(convs: int) -> Variant:
    return Variant(f"plain, two towers of {convs}", convs=convs)


def _shared(convs: int) -> Variant:
    return Variant(f"plain, one tower of {convs}", convs=convs, shared_tower=True)


def _dyhead(blocks: int) -> Variant:
    return Variant(f"DyHead, {blocks} block{'s' * (blocks > 1)}", blocks)


def _towers(convs: int) -> Variant:
    label = f"{_dyhead(_BLOCKS).label}, then two towers of {convs}"
    return Variant(label, _BLOCKS, convs=convs)


def _with(*attentions: Attention) -> Variant:
    # A head whose task attention is the identity has no activation at all: it is linear.
    label = " + ".join(attentions) or "no attention"
    without_task: WithoutTask = "identity" if "task" in attentions else "relu"
    return Variant(label, _BLOCKS, attentions=attentions, without_task=without_task)


def _inits(init: Init) -> dict[str, Variant]:
    return {
        f"dyhead-{n}-{init}": Variant(f'{_dyhead(n).label}, init="{init}"', n, init=init)
        for n in (2, 6, 4, 1)
    }


# In the order of the runs: what carries the conclusion comes first.
VARIANTS: dict[str, Variant] = {
    "plain": _plain(4),
    **{f"dyhead-{blocks}": _dyhead(blocks) for blocks in (4, 2, 6, 1)},
    **_inits("local"),
    "shared-8": _shared(8),
    "shared-4": _shared(4),
    "dyhead-2-towers-2": _towers(2),
    "none": _with(),
    "spatial": _with("spatial"),
    "task": _with("task"),
    "scale": _with("scale"),
    "scale-spatial": _with("scale", "spatial"),
    **_inits("microsoft"),
    "plain-2": _plain(2),
    "plain-6": _plain(6),
    "dyhead-2-towers-1": _towers(1),
    **{
        name.replace("_", "-"): Variant(f'high_offset="{name}"', _BLOCKS, high_offset=name)  # type: ignore[arg-type]
        for name in HIGH_OFFSETS
        if name != "flat"
    },
}

_DEPTH_ROWS = tuple(f"dyhead-{blocks}" for blocks in DEPTHS)

TABLES: dict[str, Table] = {
    "heads": Table(
        "Head",
        (
            "plain",
            "plain-2",
            "plain-6",
            "shared-4",
            "shared-8",
            *_DEPTH_ROWS,
            "dyhead-2-towers-1",
            "dyhead-2-towers-2",
        ),
    ),
    "inits": Table(
        'Initialisation (the others: "mmdet")',
        ("plain", *_DEPTH_ROWS, *(f"dyhead-{n}-{init}" for init in INITS for n in DEPTHS)),
    ),
    "attentions": Table(
        f"Attentions, {_BLOCKS} blocks",
        ("none", "scale", "spatial", "task", "scale-spatial", _WHOLE),
    ),
    "high_offset": Table(
        f"Offsets of the coarser branch, {_BLOCKS} blocks",
        (_WHOLE, "crop", "mmdet-main", "aligned"),
    ),
}


def chosen(only: Sequence[str]) -> list[str]:
    """The variants of these names, all without any, in the order of :data:`VARIANTS`."""
    return [name for name in VARIANTS if not only or name in only]
