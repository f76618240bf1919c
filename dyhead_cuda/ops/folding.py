"""vmap over an operator as one call: the batch becomes part of the images.

An operator treats its images alike and apart, so B calls with N images are one with B * N, where
all that differs between the calls has images. Tensors such as gates have a dimension for them. In
a matrix of rows the images of a map follow each other, map by map: there the rows of each map are
brought together, and the result's rows apart, which costs a copy unless there is one map only.

Weights have no images. With a batch of weights (an ensemble) an operator runs once for each element
of the batch. The gradient of weights is a sum over images: where each element of the batch is to
have its own (per-sample gradients), that gradient alone is computed element by element.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dyhead_cuda.ops.jobs import map_rows

Arguments = dict[str, Any]  # of an operator, by their names in its schema


class Images(NamedTuple):
    """A tensor with a dimension of images."""

    dim: int


class Rows(NamedTuple):
    """Rows of maps; ``sizes`` names the argument with their heights and widths, or the maps."""

    sizes: str


class Summed(NamedTuple):
    """A result that is a sum over images."""


Kind = Images | Rows | Summed


class Folding(NamedTuple):
    """Where the images of an operator's tensors are.

    Args:
        arguments: the tensors, and lists of tensors, that have images. No other may have a batch.
        results: in order. An operator that returns a list has one kind, of all that are in it.
    """

    arguments: Mapping[str, Images | Rows]
    results: tuple[Kind, ...]


_foldings: dict[str, Folding] = {}


def register_folding(name: str, arguments: Mapping[str, Images | Rows], *results: Kind) -> None:
    """Say where the images of ``dyhead::name``'s tensors are; see :class:`Folding`."""
    _foldings[name] = Folding(arguments, results)


def _counts(kind: Rows, arguments: Arguments, images: int) -> list[int]:
    """The rows of each map, with all its images."""
    sizes = arguments[kind.sizes]
    if isinstance(sizes[0], Tensor):
        sizes = [size for level in sizes for size in level.shape[-2:]]
    return map_rows(list(zip(sizes[::2], sizes[1::2], strict=True)), images)


def _fold(t: Tensor, kind: Kind, arguments: Arguments, images: int) -> Tensor:
    """From [B, ...], for each element of the batch, to one argument with B times the images."""
    if isinstance(kind, Images):
        return t.movedim(0, kind.dim).flatten(kind.dim, kind.dim + 1).contiguous()
    assert isinstance(kind, Rows)
    rows = [part.flatten(0, 1) for part in t.split(_counts(kind, arguments, images), 1)]
    return torch.cat(rows) if len(rows) > 1 else rows[0].contiguous()


def _unfold(t: Tensor, kind: Kind, arguments: Arguments, shape: tuple[int, int]) -> Tensor:
    """From a result with B times the images to [B, ...]; ``shape`` is (B, images)."""
    if isinstance(kind, Images):
        return t.unflatten(kind.dim, shape).movedim(kind.dim, 0)
    assert isinstance(kind, Rows)
    counts = _counts(kind, arguments, shape[1])
    parts = t.split([shape[0] * count for count in counts])
    rows = [part.unflatten(0, (shape[0], count)) for part, count in zip(parts, counts, strict=True)]
    return torch.cat(rows, 1) if len(rows) > 1 else rows[0]


def _has_batch(dims: Any) -> bool:
    return any(map(_has_batch, dims)) if isinstance(dims, (list, tuple)) else dims is not None


def _map(function: Callable[[Tensor, int | None], Tensor], argument: Any, dims: Any) -> Any:
    """The function of a tensor and its batch dimension, or of each of a list; else the argument."""
    if isinstance(argument, (list, tuple)):
        return [_map(function, one, dim) for one, dim in zip(argument, dims, strict=True)]
    return function(argument, dims) if isinstance(argument, Tensor) else argument


class Batched(NamedTuple):
    """A call of an operator under vmap.

    Args:
        name: of the operator.
        arguments: all of them, with batch dimensions.
        dims: where these are, in the same structure; None where there is none.
        size: of the batch.
        run: calls the operator with such arguments.
    """

    name: str
    arguments: Arguments
    dims: Arguments
    size: int
    run: Callable[[Arguments], Any]

    def results(self) -> Any:
        """What the operator returns, each tensor with the batch in dimension 0."""
        folding = _foldings[self.name]
        weights = [dims for key, dims in self.dims.items() if key not in folding.arguments]
        if _has_batch(weights):
            return self._one_by_one(self.arguments)
        sums = [int(isinstance(kind, Summed)) for kind in folding.results]
        if not any(sums):
            return self._at_once(self.arguments)
        wanted = self.arguments["wanted"]
        apart = [want * is_sum for want, is_sum in zip(wanted, sums, strict=True)]
        together = [want - is_apart for want, is_apart in zip(wanted, apart, strict=True)]
        if not any(apart):
            return self._at_once(self.arguments)
        one_by_one = self._one_by_one({**self.arguments, "wanted": apart})
        if not any(together):
            return one_by_one
        at_once = self._at_once({**self.arguments, "wanted": together})
        chosen = zip(one_by_one, at_once, sums, strict=True)
        return tuple(one if is_sum else all_ for one, all_, is_sum in chosen)

    def _at_once(self, arguments: Arguments) -> Any:
        folding = _foldings[self.name]
        folded = dict(arguments)
        images = arguments.get("images")
        for key, kind in folding.arguments.items():

            def fold(t: Tensor, dim: int | None, kind: Kind = kind) -> Tensor:
                nonlocal images
                front = t.expand(self.size, *t.shape) if dim is None else t.movedim(dim, 0)
                if images is None and isinstance(kind, Images):
                    images = front.shape[kind.dim + 1]
                assert images is not None
                return _fold(front, kind, arguments, images)

            folded[key] = _map(fold, arguments[key], self.dims[key])
        assert images is not None
        if "images" in arguments:
            folded["images"] = images * self.size
        results = self.run(folded)
        shape = (self.size, images)
        if isinstance(results, Tensor):
            return _unfold(results, folding.results[0], folded, shape)
        kinds = folding.results if len(folding.results) > 1 else folding.results * len(results)
        wanted = arguments.get("wanted", [1] * len(results))
        return tuple(
            _unfold(t, kind, folded, shape) if want else t.expand(self.size, *t.shape)
            for t, kind, want in zip(results, kinds, wanted, strict=True)
        )

    def _one_by_one(self, arguments: Arguments) -> Any:
        if self.size == 0:
            raise RuntimeError(
                f"expected a batch of at least one element where vmap of dyhead::{self.name} has a "
                "batch of weights, or of their gradients, got none; skip the call where the batch "
                'is empty (backend("reference") takes no empty batch of convolutions, either)'
            )
        results = []
        for i in range(self.size):

            def part(t: Tensor, dim: int | None, i: int = i) -> Tensor:
                return t if dim is None else t.select(dim, i).contiguous()

            results.append(
                self.run({key: _map(part, t, self.dims[key]) for key, t in arguments.items()})
            )
        if isinstance(results[0], Tensor):
            return torch.stack(results)
        return tuple(torch.stack(group) for group in zip(*results, strict=True))
