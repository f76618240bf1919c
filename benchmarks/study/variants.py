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
# Blocks of the variants that differ in something else than the number of blocks, and where they
# start from: published first weights learn too slowly to tell the variants apart.
_BLOCKS = 2
_INIT: Init = "local"
_WHOLE = f"dyhead-{_BLOCKS}-{_INIT}"


def _plain(convs: int) -> Variant:
    return Variant(f"plain, two towers of {convs}", convs=convs)


def _shared(convs: int) -> Variant:
    return Variant(f"plain, one tower of {convs}", convs=convs, shared_tower=True)


def _dyhead(blocks: int, init: Init = "mmdet") -> Variant:
    label = f"DyHead, {blocks} block{'s' * (blocks > 1)}"
    return Variant(label if init == "mmdet" else f'{label}, init="{init}"', blocks, init=init)


def _towers(convs: int) -> Variant:
    label = f"{_dyhead(_BLOCKS, _INIT).label}, then two towers of {convs}"
    return Variant(label, _BLOCKS, convs=convs, init=_INIT)


def _with(*attentions: Attention) -> Variant:
    # A head whose task attention is the identity has no activation at all: it is linear.
    label = " + ".join(attentions) or "no attention"
    without_task: WithoutTask = "identity" if "task" in attentions else "relu"
    return Variant(label, _BLOCKS, attentions=attentions, without_task=without_task, init=_INIT)


def _reading(high_offset: HighOffset) -> Variant:
    label = f'high_offset="{high_offset}"'
    return Variant(label, _BLOCKS, high_offset=high_offset, init=_INIT)


# In the order of the runs: what carries the conclusion comes first.
VARIANTS: dict[str, Variant] = {
    "plain": _plain(4),
    "dyhead-2-local": _dyhead(2, "local"),
    "dyhead-2": _dyhead(2),
    "shared-4": _shared(4),
    "dyhead-4-local": _dyhead(4, "local"),
    "dyhead-4": _dyhead(4),
    "dyhead-6-local": _dyhead(6, "local"),
    "dyhead-6": _dyhead(6),
    "shared-8": _shared(8),
    "dyhead-1-local": _dyhead(1, "local"),
    "dyhead-1": _dyhead(1),
    "dyhead-2-towers-2": _towers(2),
    "none": _with(),
    "spatial": _with("spatial"),
    "task": _with("task"),
    "scale": _with("scale"),
    "scale-spatial": _with("scale", "spatial"),
    "dyhead-2-microsoft": _dyhead(2, "microsoft"),
    **{
        name.replace("_", "-"): _reading(name)  # type: ignore[arg-type]
        for name in HIGH_OFFSETS
        if name != "flat"
    },
}

_LOCAL_ROWS = tuple(f"dyhead-{blocks}-local" for blocks in DEPTHS)
_PUBLISHED_ROWS = tuple(f"dyhead-{blocks}" for blocks in DEPTHS)

TABLES: dict[str, Table] = {
    "heads": Table("Head", ("plain", "shared-4", "shared-8", *_LOCAL_ROWS, "dyhead-2-towers-2")),
    "inits": Table(
        "First weights", ("plain", *_LOCAL_ROWS, *_PUBLISHED_ROWS, "dyhead-2-microsoft")
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
