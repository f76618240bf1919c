"""Maps, jobs and plans: what deformable work is, and the integer tables that describe it.

A job computes one output map: for each of its terms, the taps of a source map are sampled where the
job's predictions say and multiplied with the term's weights; the terms are added. The published
block has a job per branch and level, with one term; the paper's spatial attention a job per target
level, with a term per level; a plain convolution is one job. ``csrc/common/deform_jobs.h`` says the
same in C++, and ``csrc/host/tables.h`` reads the tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import chain

from dyhead_cuda import library

Size = tuple[int, int]


class ReadRule(IntEnum):
    """How an output pixel finds its prediction on a map of another size; see ReadRule in C++."""

    SAME = 0  # the same pixel of a map of the same size
    CROP = 1  # the same y and x: the map's upper left part
    FLAT = 2  # the first K * h * w values of the map's [K, H, W], read as [K, h, w]
    NONE = 3  # there is none: a plain convolution


class UpsampleMode(IntEnum):
    """How a branch is resized to its level; see csrc/common/upsample.h."""

    BILINEAR = 0  # with align_corners=True
    NEAREST = 1  # as torch's "nearest"


MAP_FIELDS = ("first_row", "height", "width")
GEOMETRY_FIELDS = (
    "images", "groups", "deform_groups", "kernel_h", "kernel_w", "pad_h", "pad_w",
    "dilation_h", "dilation_w",
)  # fmt: skip
TERM_FIELDS = ("source", "weight")
JOB_FIELDS = (
    "out_first_row", "out_height", "out_width",
    "predictions_first_row", "predictions_height", "predictions_width",
    "offset_rule", "mask_rule", "stride_h", "stride_w", "first_term", "terms",
    "up_height", "up_width", "up_mode",
)  # fmt: skip
LEVEL_FIELDS = (
    "first_row", "height", "width", "branches", "branch_0", "branch_1", "branch_2", "up_mode",
)  # fmt: skip
MAX_BRANCHES = sum(name.startswith("branch_") for name in LEVEL_FIELDS)  # of a level

# What the library calls the same tables: a library that reads others is not used.
TABLES = "; ".join(
    " ".join((name, *fields))
    for name, fields in (
        ("map", MAP_FIELDS),
        ("geometry", GEOMETRY_FIELDS),
        ("term", TERM_FIELDS),
        ("job", JOB_FIELDS),
        ("level", LEVEL_FIELDS),
        ("rule", [rule.name.capitalize() for rule in sorted(ReadRule)]),
        ("upsample", [mode.name.capitalize() for mode in sorted(UpsampleMode)]),
    )
)
library.expect_tables(TABLES)


def _record(fields: Sequence[str], values: Mapping[str, int]) -> list[int]:
    """The values in the order of the fields: all of them, and no others."""
    if values.keys() != set(fields):
        raise ValueError(f"expected the fields {', '.join(fields)}, got {', '.join(values)}")
    return [values[name] for name in fields]


@dataclass(frozen=True)
class Map:
    """Pixel p of image n is row ``first_row + n * height * width + p`` of a matrix of rows."""

    first_row: int
    height: int
    width: int

    @property
    def pixels(self) -> int:
        return self.height * self.width

    def fields(self, prefix: str = "") -> dict[str, int]:
        """The numbers of a table's record, by the names of their fields."""
        numbers = (self.first_row, self.height, self.width)
        return {prefix + name: number for name, number in zip(MAP_FIELDS, numbers, strict=True)}

    def numbers(self) -> list[int]:
        """The record of a table of maps."""
        return _record(MAP_FIELDS, self.fields())


NO_MAP = Map(0, 0, 0)


def stack_maps(sizes: Sequence[Size], images: int) -> list[Map]:
    """Maps of the given sizes, one after the other, each with its images."""
    maps, row = [], 0
    for height, width in sizes:
        maps.append(Map(row, height, width))
        row += images * height * width
    return maps


@dataclass(frozen=True)
class Job:
    """One output map: which maps it reads with which weights, and where its predictions are."""

    out: Map
    predictions: Map  # NO_MAP with the rules NONE: a plain convolution
    terms: list[tuple[int, int]]  # source map, weight matrix
    stride: Size = (1, 1)
    offset_rule: ReadRule = ReadRule.SAME
    mask_rule: ReadRule = ReadRule.SAME
    upsampled: Size | None = None  # size for the mean after upsampling
    up_mode: UpsampleMode = UpsampleMode.BILINEAR

    def numbers(self, first_term: int) -> list[int]:
        """The record of a table of jobs; ``first_term`` is the place of its terms in theirs."""
        up_height, up_width = self.upsampled or (self.out.height, self.out.width)
        return _record(
            JOB_FIELDS,
            {
                **self.out.fields("out_"),
                **self.predictions.fields("predictions_"),
                "offset_rule": int(self.offset_rule),
                "mask_rule": int(self.mask_rule),
                "stride_h": self.stride[0],
                "stride_w": self.stride[1],
                "first_term": first_term,
                "terms": len(self.terms),
                "up_height": max(up_height, 1),
                "up_width": max(up_width, 1),
                "up_mode": int(self.up_mode),
            },
        )


@dataclass(frozen=True)
class Plan:
    """A list of jobs and the geometry that they share, as the operator's integer tables."""

    images: int
    sources: list[Map]
    jobs: list[Job]
    kernel: Size = (3, 3)
    padding: Size = (1, 1)
    dilation: Size = (1, 1)
    groups: int = 1
    deform_groups: int = 1
    mask_logits: bool = True
    tables: tuple[list[int], list[int], list[int], list[int]] = field(init=False)

    def __post_init__(self) -> None:
        geometry = _record(
            GEOMETRY_FIELDS,
            {
                "images": self.images,
                "groups": self.groups,
                "deform_groups": self.deform_groups,
                "kernel_h": self.kernel[0],
                "kernel_w": self.kernel[1],
                "pad_h": self.padding[0],
                "pad_w": self.padding[1],
                "dilation_h": self.dilation[0],
                "dilation_w": self.dilation[1],
            },
        )
        sources = list(chain.from_iterable(m.numbers() for m in self.sources))
        terms: list[int] = []
        jobs: list[int] = []
        for job in self.jobs:
            jobs += job.numbers(len(terms) // len(TERM_FIELDS))
            for source, weight in job.terms:
                terms += _record(TERM_FIELDS, {"source": source, "weight": weight})
        object.__setattr__(self, "tables", (geometry, sources, terms, jobs))

    @property
    def out_rows(self) -> int:
        """Rows of all output maps."""
        return sum(self.images * job.out.pixels for job in self.jobs)


def level_numbers(
    out: Map, branches: Sequence[int], up_mode: UpsampleMode = UpsampleMode.BILINEAR
) -> list[int]:
    """The record of a table of levels: its map, the indices of its branches' maps, their mode."""
    if not 1 <= len(branches) <= MAX_BRANCHES:
        raise ValueError(f"expected a level of 1 to {MAX_BRANCHES} branches, got {len(branches)}")
    indices = [*branches, *[-1] * (MAX_BRANCHES - len(branches))]
    return _record(
        LEVEL_FIELDS,
        {
            **out.fields(),
            "branches": len(branches),
            **{f"branch_{i}": index for i, index in enumerate(indices)},
            "up_mode": int(up_mode),
        },
    )
