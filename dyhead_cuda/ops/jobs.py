"""Jobs and plans: what deformable work is, and the integer tables that describe it.

A map has a size; maps of a matrix of rows lie one after the other, each with all its images: pixel
p of image n is row ``first_row + n * height * width + p``. A job computes one output map: for each
of its terms, the taps of a source map are sampled where the job's predictions say and multiplied
with the term's weights; the terms are added. The published block has a job per branch and level,
with one term; the paper's spatial attention a job per target level, with a term per level; a plain
convolution is one job. ``csrc/common/deform_jobs.h`` says the same in C++, and
``csrc/host/tables.h`` reads the tables.

Sizes and the number of images may be symbolic, where torch.compile or torch.export traces: one
graph serves all of them. Everything else in a table is constant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import chain
from typing import NamedTuple

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


SIZE_FIELDS = ("height", "width")
GEOMETRY_FIELDS = (
    "groups", "deform_groups", "kernel_h", "kernel_w", "pad_h", "pad_w", "dilation_h", "dilation_w",
)  # fmt: skip
TERM_FIELDS = ("source", "weight")
JOB_FIELDS = (
    "predictions", "offset_rule", "mask_rule", "stride_h", "stride_w", "first_term", "terms",
    "up_mode",
)  # fmt: skip
LEVEL_FIELDS = ("branch_0", "branch_1", "branch_2")
MAX_BRANCHES = len(LEVEL_FIELDS)  # of a level

# What the library calls the same tables: a library that reads others is not used.
TABLES = "; ".join(
    " ".join((name, *fields))
    for name, fields in (
        ("size", SIZE_FIELDS),
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


def size_numbers(sizes: Sequence[Size]) -> list[int]:
    """The table of maps of the given sizes."""
    return list(chain.from_iterable(sizes))


def pixels_of(sizes: Sequence[int]) -> int:
    """The pixels of all maps of a table of sizes."""
    return sum(h * w for h, w in zip(sizes[::2], sizes[1::2], strict=True))


def map_rows(sizes: Sequence[Size], images: int) -> list[int]:
    """The rows of maps of the given sizes."""
    return [images * height * width for height, width in sizes]


@dataclass(frozen=True)
class Job:
    """One output map: which maps it reads with which weights, and where its predictions are."""

    out: Size
    predictions: int | None  # index of a prediction map; None: a plain convolution
    terms: Sequence[tuple[int, int]]  # source map, weight matrix
    stride: Size = (1, 1)
    offset_rule: ReadRule = ReadRule.SAME
    mask_rule: ReadRule = ReadRule.SAME
    upsampled: Size | None = None  # size for the mean after upsampling
    up_mode: UpsampleMode = UpsampleMode.BILINEAR

    def numbers(self, first_term: int) -> list[int]:
        """The record of a table of jobs; ``first_term`` is the place of its terms in theirs."""
        plain = self.predictions is None
        return _record(
            JOB_FIELDS,
            {
                "predictions": -1 if self.predictions is None else self.predictions,
                "offset_rule": int(ReadRule.NONE if plain else self.offset_rule),
                "mask_rule": int(ReadRule.NONE if plain else self.mask_rule),
                "stride_h": self.stride[0],
                "stride_w": self.stride[1],
                "first_term": first_term,
                "terms": len(self.terms),
                "up_mode": int(self.up_mode),
            },
        )


class DeformTables(NamedTuple):
    """The integer arguments of ``dyhead::deform_conv_fwd`` that describe its work, in order."""

    images: int
    source_sizes: list[int]
    prediction_sizes: list[int]
    out_sizes: list[int]  # of each job
    up_sizes: list[int]  # of each job
    geometry: list[int]
    terms: list[int]
    jobs: list[int]


@dataclass(frozen=True)
class Plan:
    """A list of jobs, the maps that they read, and the geometry that they share."""

    images: int
    sources: Sequence[Size]
    predictions: Sequence[Size]
    jobs: Sequence[Job]
    kernel: Size = (3, 3)
    padding: Size = (1, 1)
    dilation: Size = (1, 1)
    groups: int = 1
    deform_groups: int = 1
    mask_logits: bool = True
    tables: DeformTables = field(init=False)

    def __post_init__(self) -> None:
        geometry = _record(
            GEOMETRY_FIELDS,
            {
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
        terms: list[int] = []
        jobs: list[int] = []
        for job in self.jobs:
            jobs += job.numbers(len(terms) // len(TERM_FIELDS))
            for source, weight in job.terms:
                terms += _record(TERM_FIELDS, {"source": source, "weight": weight})
        tables = DeformTables(
            self.images,
            size_numbers(self.sources),
            size_numbers(self.predictions),
            size_numbers([job.out for job in self.jobs]),
            size_numbers([job.upsampled or job.out for job in self.jobs]),
            geometry,
            terms,
            jobs,
        )
        object.__setattr__(self, "tables", tables)


def level_numbers(branches: Sequence[int]) -> list[int]:
    """The record of a table of levels: the indices of a level's branches' maps."""
    if not 1 <= len(branches) <= MAX_BRANCHES:
        raise ValueError(f"expected a level of 1 to {MAX_BRANCHES} branches, got {len(branches)}")
    return [*branches, *[-1] * (MAX_BRANCHES - len(branches))]
