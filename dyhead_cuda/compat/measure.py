"""Measuring which fused variant a foreign block computes, instead of trusting its names.

A copy of the block with random parameters runs once, in float64, on a tiny random pyramid; so does
the fused block with the same parameters, in each variant until one agrees. Random parameters show
differences that a fresh block hides: mmdet starts with all offsets at zero, for one.
"""

from __future__ import annotations

import copy
import math
import random
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from dyhead_cuda import functional
from dyhead_cuda.compat import structure
from dyhead_cuda.compat.names import MMDET, ULTRALYTICS, CodeBase
from dyhead_cuda.pyramid import HIGH_OFFSETS, UPSAMPLES, HighOffset, Upsample

LIMIT = 1e-9  # relative L2 error; rounding of float64 gives about 1e-15, another formula over 1e-2
_IMAGES = 2
# Odd sizes first: they tell more variants apart. Some forks only take sizes that halve evenly.
_PYRAMIDS = (((9, 7), (5, 4), (3, 2)), ((8, 12), (4, 6), (2, 3)))

Levels = list[Tensor]


class Variant(NamedTuple):
    """How the branch on the coarser level gets its offsets and its size."""

    high_offset: HighOffset
    upsample: Upsample

    def __str__(self) -> str:
        resized = "" if self.upsample == "bilinear" else f', upsample "{self.upsample}"'
        return f'high_offset "{self.high_offset}"{resized}'


class Measurement(NamedTuple):
    """The variant that came closest, and its relative L2 error over all levels."""

    variant: Variant
    error: float

    @property
    def agrees(self) -> bool:
        return self.error <= LIMIT


class CannotMeasureError(Exception):
    """Why a block could not be run for comparison."""


def variants(first: Variant, high_offset: str | None, upsample: str | None) -> list[Variant]:
    """All variants, ``first`` in front; only those that have what is not None."""
    every = [
        Variant(cast(HighOffset, h), cast(Upsample, u)) for u, h in product(UPSAMPLES, HIGH_OFFSETS)
    ]
    return [
        variant
        for variant in sorted(every, key=lambda variant: variant != first)
        if high_offset in (None, variant.high_offset) and upsample in (None, variant.upsample)
    ]


def _random(shape: Sequence[int], generator: torch.Generator, device: torch.device) -> Tensor:
    values = torch.randn(tuple(shape), generator=generator, dtype=torch.float64, device="cpu")
    return values.to(device)


def _parameter(name: str, parameter: Tensor, generator: torch.Generator) -> nn.Parameter:
    """A random float64 parameter that keeps activations around one and gates off their limits."""
    scale = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.3
    value = scale * _random(parameter.shape, generator, parameter.device)
    if parameter.dim() == 1 and not name.endswith("bias"):
        value += 1  # of a norm
    return nn.Parameter(value, requires_grad=False)


def _twin(block: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy without hooks, with random float64 parameters; ``block`` is only read."""
    memo: dict[int, Any] = {}
    for module in block.modules():
        for name, value in vars(module).items():
            if name.endswith("_hooks") and isinstance(value, dict):
                memo[id(value)] = OrderedDict()
    for name, parameter in block.named_parameters():
        memo[id(parameter)] = _parameter(name, parameter, generator)
    for buffer in block.buffers():
        twin = buffer.detach().clone()
        memo[id(buffer)] = twin.double() if twin.is_floating_point() else twin
    return copy.deepcopy(block, memo)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160]}" if text else type(error).__name__


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """No gradients, no autocast, no warnings; all random states are restored."""
    states = random.getstate(), np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    try:
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=devices),
            torch.autocast(device.type, enabled=False),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _visual(levels: Levels) -> Any:
    return {"visual": levels, "lang": None}


def _named(levels: Levels) -> Any:
    return {f"p{level + 3}": x for level, x in enumerate(levels)}


def _tensors(result: Any) -> Levels:
    """The levels in what a public block returned."""
    if isinstance(result, dict):
        result = result["visual"] if "visual" in result else list(result.values())
    return list(result)


def _run_own(twin: nn.Module, code_base: CodeBase, levels: Levels) -> Levels:
    """The levels that the block's own forward gives, in whichever container it takes."""
    containers: tuple[Callable[[Levels], Any], ...] = (_visual, list, _named)
    if code_base in (MMDET, ULTRALYTICS):
        containers = (list,)
    finished: list[nn.Module] = []
    for module in twin.modules():
        if module is not twin:
            module.register_forward_hook(lambda inner, *_: finished.append(inner))
    failures: list[tuple[int, str]] = []
    for container in containers:
        finished.clear()
        try:
            return _tensors(twin(container([x.clone() for x in levels])))
        except Exception as error:
            failures.append((len(finished), _first_line(error)))
    # A wrong container fails before any layer has run; what came furthest met the operator.
    furthest, reason = max(failures, key=lambda failure: failure[0])
    if not furthest:
        raise structure.UnsupportedError(
            "its forward takes no list or dict of levels that a public block takes, and goes on "
            f"with what it takes ({reason})"
        )
    raise CannotMeasureError(f"its own forward does not run here: {reason}")


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Any error inside as a :class:`CannotMeasureError` that begins with ``what``."""
    try:
        yield
    except (CannotMeasureError, structure.UnsupportedError):
        raise
    except Exception as error:
        raise CannotMeasureError(f"{what}: {_first_line(error)}") from error


def _error(found: Levels, expected: Levels) -> float:
    """Relative L2 error over all levels; infinite for other shapes and for NaN."""
    if [x.shape for x in found] != [x.shape for x in expected]:
        return float("inf")
    wanted = torch.cat([y.double().flatten() for y in expected])
    got = torch.cat([x.double().flatten() for x in found])
    error = float((got - wanted).norm() / wanted.norm())
    return float("inf") if math.isnan(error) else error


def _own(
    twin: nn.Module, code_base: CodeBase, channels: int, generator: torch.Generator
) -> tuple[Levels, Levels]:
    """A random pyramid that the block's own forward takes, and what it gives for it."""
    device = next(twin.parameters()).device
    for sizes in _PYRAMIDS:
        levels = [_random((_IMAGES, channels, *size), generator, device) for size in sizes]
        try:
            return levels, _run_own(twin, code_base, levels)
        except CannotMeasureError:
            if sizes is _PYRAMIDS[-1]:
                raise
    raise AssertionError  # the last pyramid has returned or raised


def measure(block: nn.Module, code_base: CodeBase, candidates: Sequence[Variant]) -> Measurement:
    """Compare the forward of ``block`` with the fused one, variant by variant.

    Args:
        block: of a supported structure; it is only read.
        code_base: whose names its parameters have.
        candidates: the variants to try, in this order; the first that agrees ends the search.

    Returns:
        The variant that agrees, or else the closest one, with its relative L2 error.

    Raises:
        CannotMeasureError: the block cannot be copied or run here, with the reason.
        structure.UnsupportedError: its forward takes something else than levels.
    """
    device = next(block.parameters()).device
    if device.type == "meta":
        raise CannotMeasureError("its parameters are on the meta device")
    with _undisturbed(device), _explained("the fused block does not run here in float64"):
        with _explained("it cannot be copied in float64"):
            generator = torch.Generator().manual_seed(0)
            twin = _twin(block, generator)
        parameters = structure.block_parameters(twin, code_base)
        levels, expected = _own(twin, code_base, parameters.mid.weight.shape[1], generator)
        norm, tried = structure.norm_of(twin, code_base), []
        for variant in candidates:
            ours = functional.pyramid_block(
                levels,
                parameters,
                high_offset=variant.high_offset,
                upsample=variant.upsample,
                num_groups=norm.num_groups,
                eps=norm.eps,
            )
            tried.append(Measurement(variant, _error(ours, expected)))
            if tried[-1].agrees:
                break
    return min(tried, key=lambda measurement: measurement.error)
