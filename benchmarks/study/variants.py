"""What the study compares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dyhead_cuda.modules import ATTENTIONS, Attention
from dyhead_cuda.pyramid import HIGH_OFFSETS, HighOffset


@dataclass(frozen=True)
class Variant:
    """A detector of the study; :class:`~benchmarks.study.setup.Setup` has what all share.

    Attributes:
        label: in tables and plots.
        blocks: of the Dynamic Head; 0 is the plain head, two towers of four convolutions.
        attentions, high_offset: see :class:`dyhead_cuda.DyHead`.
    """

    label: str
    blocks: int
    attentions: tuple[Attention, ...] = ATTENTIONS
    high_offset: HighOffset = "flat"


@dataclass(frozen=True)
class Table:
    """Variants that are compared with each other; differences are to the first."""

    title: str
    variants: tuple[str, ...]


# Blocks of the variants that differ in something else than the number of blocks.
_BLOCKS = 2
_WHOLE = f"dyhead-{_BLOCKS}"


def _with(*attentions: Attention) -> Variant:
    return Variant(" + ".join(attentions) or "no attention", _BLOCKS, attentions)


VARIANTS: dict[str, Variant] = {
    "plain": Variant("plain head", 0),
    **{f"dyhead-{n}": Variant(f"DyHead, {n} block{'s' * (n > 1)}", n) for n in (1, 2, 4, 6)},
    "none": _with(),
    "scale": _with("scale"),
    "spatial": _with("spatial"),
    "task": _with("task"),
    "scale-spatial": _with("scale", "spatial"),
    **{
        name.replace("_", "-"): Variant(f'high_offset="{name}"', _BLOCKS, high_offset=name)  # type: ignore[arg-type]
        for name in HIGH_OFFSETS
        if name != "flat"
    },
}

TABLES: dict[str, Table] = {
    "depth": Table("Blocks", ("plain", "dyhead-1", "dyhead-2", "dyhead-4", "dyhead-6")),
    "attentions": Table(
        f"Attentions, {_BLOCKS} blocks",
        ("none", "scale", "spatial", "task", "scale-spatial", _WHOLE),
    ),
    "high_offset": Table(
        f"Offsets of the coarser branch, {_BLOCKS} blocks",
        (_WHOLE, "crop", "mmdet-main", "aligned"),
    ),
}


def variants_of(tables: Sequence[str]) -> list[str]:
    """The variants in some tables, each once."""
    return list(dict.fromkeys(name for table in tables for name in TABLES[table].variants))
