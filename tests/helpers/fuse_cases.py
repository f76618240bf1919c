"""Inputs of ``dyhead::fuse_branches`` and its formula in plain PyTorch, for its tests."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from dyhead_cuda.ops.fuse_branches import fuse_branches, fuse_tables
from dyhead_cuda.ops.jobs import UpsampleMode, map_rows
from tests.helpers.compare import assert_close, assert_gradients_close, leaf, random_like
from tests.helpers.inputs import halving_sizes
from tests.helpers.resizing import resized

Size = tuple[int, int]
NEAREST = UpsampleMode.NEAREST


@dataclass(frozen=True)
class Case:
    """Levels, each with its size and the sizes of its branches."""

    levels: tuple[tuple[Size, tuple[Size, ...]], ...]
    images: int = 2
    channels: int = 5
    reversed_maps: bool = False  # whether the branches' maps lie in the opposite order
    up_mode: UpsampleMode = UpsampleMode.BILINEAR
    seed: int = 0

    def plan(self) -> dict[str, Any]:
        """The arguments of the operator that are not tensors."""
        sizes = list(chain.from_iterable(branches for _, branches in self.levels))
        order = list(range(len(sizes)))
        if self.reversed_maps:
            order.reverse()
        levels, used = [], 0
        for size, branches in self.levels:
            levels.append((size, [order[used + b] for b in range(len(branches))]))
            used += len(branches)
        return {
            "images": self.images,
            "branches": [sizes[i] for i in order],
            "levels": levels,
            "up_mode": self.up_mode,
        }

    def tables(self) -> tuple[Any, ...]:
        """The plan as the operator's integers and lists of them."""
        return fuse_tables(**self.plan())

    def tensors(self, dtype: torch.dtype = torch.float64, device: str = "cpu") -> list[Tensor]:
        """y, scale, shift and coefficients, which are of the accumulation type."""
        source = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=source, dtype=torch.float64)

        plan = self.plan()
        n, c = self.images, self.channels
        rows = sum(map_rows(plan["branches"], n))
        count = len(self.levels)
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        return [
            leaf(normal(rows, c).to(device), dtype),
            *(
                leaf(normal(*shape, c).to(device), compute)
                for shape in ((len(plan["branches"]), n), (count, n), (count, n, 4))
            ),
        ]

    def run(self, tensors: list[Tensor]) -> Tensor:
        y, scale, shift, coefficients = tensors
        return fuse_branches(y, scale, shift, coefficients, **self.plan())

    def reference(self, tensors: list[Tensor]) -> Tensor:
        """The same in float64, with autograd."""
        return torch.maximum(*self.lines(tensors))

    def cotangent(self, tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
        """A random gradient of the result, in float64 with the values of ``dtype``.

        Where the dynamic ReLU's lines all but meet, rounding decides which of them takes the
        gradient: it is zero there.
        """
        with torch.no_grad():
            first, second = self.lines(tensors)
            values = random_like(first)[0].to(dtype).to(first)
            return torch.where((first - second).abs() < 1e-4, 0, values)

    def lines(self, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
        """a1 . z + b1 and a2 . z + b2."""
        y, scale, shift, coefficients = (t.double() for t in tensors)
        plan = self.plan()
        first, second = [y.new_empty(0, self.channels)], [y.new_empty(0, self.channels)]
        parts = y.split(map_rows(plan["branches"], self.images))
        for level, (size, branches) in enumerate(plan["levels"]):
            z = shift[level][:, None, None]
            if 0 in size:
                continue
            for j in branches:
                branch = plan["branches"][j]
                values = parts[j].view(self.images, *branch, self.channels)
                if self.images == 0:
                    values = values.reshape(0, *size, self.channels)
                elif branch != size:
                    values = resized(values.permute(0, 3, 1, 2), size, self.up_mode)
                    values = values.permute(0, 2, 3, 1)
                z = z + scale[j][:, None, None] * values
            a1, b1, a2, b2 = coefficients[level][:, :, None, None].unbind(1)
            first.append((a1 * z + b1).reshape(-1, self.channels))
            second.append((a2 * z + b2).reshape(-1, self.channels))
        return torch.cat(first), torch.cat(second)


def check(case: Case, tensors: list[Tensor]) -> None:
    """Result and all gradients against the formula in float64."""
    dtype = tensors[0].dtype
    exact = [leaf(t, torch.float64) for t in tensors]
    actual, expected = case.run(tensors), case.reference(exact)
    assert actual.dtype == dtype
    assert_close(actual, expected, dtype)
    cotangent = case.cotangent(exact, dtype)
    grads = torch.autograd.grad(actual, tensors, cotangent.to(dtype))
    assert [g.dtype for g in grads] == [t.dtype for t in tensors]
    if case.images == 0:
        assert [g.shape for g in grads] == [t.shape for t in tensors]
    else:
        wanted = torch.autograd.grad(expected, exact, cotangent)
        assert_gradients_close(grads, wanted, dtype)


def block_case(sizes: list[Size], *, aligned: bool = False, **options: Any) -> Case:
    """The branches of the published block: mid, low, and high, which is of the coarser size."""
    levels = []
    for i, size in enumerate(sizes):
        high = sizes[i + 1 : i + 2]
        low = [size] if i > 0 else []
        levels.append((size, (size, *low, *([size] if aligned and high else high))))
    return Case(tuple(levels), **options)


CASES = {
    "one level": block_case([(5, 7)]),
    "two levels": block_case(halving_sizes(9, 6, 2)),
    "three levels, odd": block_case(halving_sizes(13, 21, 3)),
    "five levels": block_case(halving_sizes(25, 42, 5), images=1),
    "five levels to 1x1": block_case(halving_sizes(11, 16, 5), images=3),
    "aligned": block_case(halving_sizes(9, 14, 3), aligned=True),
    "one channel": block_case(halving_sizes(9, 14, 3), channels=1),
    "many channels": block_case(halving_sizes(9, 14, 3), channels=67),
    "reversed maps": block_case(halving_sizes(9, 14, 3), reversed_maps=True),
    "rows wider than a task": block_case([(3, 150), (2, 75)]),
    "from and to 1x1": Case((((1, 1), ((3, 4), (1, 1), (1, 3))), ((4, 3), ((1, 1), (4, 1))))),
    "three upsampled": Case((((9, 8), ((5, 4), (2, 8), (9, 3))),)),
    "smaller levels": Case((((4, 5), ((9, 11), (4, 17), (13, 5))),)),
    "nearest, odd": block_case(halving_sizes(13, 21, 3), up_mode=NEAREST),
    "nearest, even": block_case(halving_sizes(16, 24, 4), up_mode=NEAREST, images=1),
    "nearest, from and to 1x1": Case(
        (((1, 1), ((3, 4), (1, 1), (1, 3))), ((4, 3), ((1, 1), (4, 1)))), up_mode=NEAREST
    ),
    "nearest, three upsampled": Case((((29, 31), ((5, 4), (2, 30), (13, 7))),), up_mode=NEAREST),
    "nearest, smaller levels": Case((((4, 5), ((9, 11), (4, 17), (13, 5))),), up_mode=NEAREST),
}

sizes = st.tuples(st.integers(1, 12), st.integers(1, 12))
RANDOM_CASES = st.builds(
    Case,
    levels=st.lists(
        st.tuples(sizes, st.lists(sizes, min_size=1, max_size=3).map(tuple)),
        min_size=1,
        max_size=5,
    ).map(tuple),
    images=st.integers(0, 3),
    channels=st.integers(1, 40),
    reversed_maps=st.booleans(),
    up_mode=st.sampled_from(UpsampleMode),
    seed=st.integers(0, 10**6),
)
