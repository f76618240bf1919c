"""Which implementation runs: the reference, the compiled kernels of a library, or ONNX nodes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Literal, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dyhead_cuda import checks, library, older_torch

Backend = Literal["auto", "reference", "cpu", "cuda"]
BACKENDS = ("auto", "reference", "cpu", "cuda")

_log = logging.getLogger("dyhead_cuda")
_requested: ContextVar[str] = ContextVar("dyhead_cuda.backend", default="auto")
# What was requested last in any thread: torch.compile cannot read a context variable, but it does
# notice when a global changes.
_last_requested: str = "auto"


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Run everything inside the ``with`` block on one backend.

    It holds for this thread, or this asyncio task and what it starts; others keep their own. A new
    thread starts with "auto". In code that ``torch.compile`` made, which cannot see this, it is the
    one that was entered or left last in any thread.

    Args:
        name: "auto" (the default: the compiled library of the input's device, or the reference
            where that is not there or was not built for that GPU), "reference" (plain PyTorch on
            any device), "cpu" or "cuda" (compiled kernels, or an error that says why they cannot
            run).

    Returns:
        A context manager, which also decorates functions.

    Raises:
        ValueError: an unknown name.

    Example:
        >>> import torch, dyhead_cuda
        >>> head = dyhead_cuda.DyHead(16, 16, num_blocks=1)
        >>> with dyhead_cuda.backend("reference"):
        ...     levels = head([torch.randn(1, 16, 8, 8), torch.randn(1, 16, 4, 4)])
    """
    global _last_requested
    checks.one_of("backend", name, BACKENDS)
    previous = _requested.get()
    _requested.set(name)
    _last_requested = name
    try:
        yield
    finally:
        _requested.set(previous)
        _last_requested = previous


def current() -> Backend:
    """The backend asked for: "auto" unless inside a :func:`backend` block."""
    if torch.compiler.is_dynamo_compiling():
        return cast(Backend, _last_requested)
    return cast(Backend, _requested.get())


def _needs_the_reference() -> bool:
    """Whether derivatives are taken forward, or of derivatives, by a transform of torch.func.

    The compiled operators have no rules for those; plain PyTorch has them all.
    """
    if forward_ad._current_level >= 0:
        return True
    if torch.compiler.is_dynamo_compiling():
        return False  # torch.func inside torch.compile: the operators themselves raise
    stack = torch._C._functorch.get_interpreter_stack() or []
    return sum(level.key() == torch._C._functorch.TransformType.Grad for level in stack) > 1


@torch.compiler.assume_constant_result
def _is_in_onnx_export() -> bool:
    """As torch.onnx says; called here while dynamo traces too, where it would be taken as False."""
    return torch.onnx.is_in_onnx_export()


def _is_exporting_onnx(requested: Backend) -> bool:
    """Whether ``torch.onnx.export`` traces this call for a graph of standard operators.

    Raises:
        RuntimeError: nothing here can be exported in the way that was asked for.
    """
    if not _is_in_onnx_export():
        return False
    older_torch.require("torch.onnx.export of a Dynamic Head", (2, 7))
    if not older_torch.is_exporting():
        raise RuntimeError(
            "expected torch.onnx.export(..., dynamo=True), got dynamo=False, whose exporter has no "
            "deformable convolution"
        )
    if requested != "auto":
        raise RuntimeError(
            f'backend "{requested}" has no ONNX operators; use backend("auto"), which exports '
            "standard ones"
        )
    return True


@torch.compiler.assume_constant_result
def _why_not_on_gpu(index: int | None) -> str:
    """Why the kernels cannot run on a GPU, and what to do; "" if they can.

    Args:
        index: of the GPU; None for the current one.
    """
    return _examine_gpu(index)


@cache
def _examine_gpu(index: int | None) -> str:
    if not torch.cuda.is_available():
        return ""  # a tensor without memory, which stands for one on another machine
    return library.lacks_code_for(torch.cuda.get_device_capability(index))


def select(x: Tensor) -> Literal["reference", "cpu", "cuda", "onnx"]:
    """The backend that runs the operators on ``x``.

    Args:
        x: any of the inputs; its device decides where nothing was asked for.

    Returns:
        "reference", "cpu" or "cuda"; "onnx" while ``torch.onnx.export`` traces.

    Raises:
        ValueError: a backend was asked for that does not take tensors of this device.
        RuntimeError: its library is not loaded, or has no code for this GPU, with the reason and
            what to do; or it was asked for where derivatives are taken forward, or of derivatives,
            by torch.func; or where torch.onnx exports; or the old exporter of torch.onnx runs.
    """
    requested, device = current(), x.device.type
    if requested == "reference":
        return "reference"
    if _is_exporting_onnx(requested):
        return "onnx"
    transformed = _needs_the_reference()
    if requested == "auto":
        if device not in ("cpu", "cuda"):
            return "reference"
        if transformed:
            _say_transforms_are_slow()
            return "reference"
        if not library.loaded(device):
            if device == "cuda":
                _warn_once(f"the CUDA library is not loaded: {library.reason('cuda')}")
            return "reference"
        if device == "cuda" and (problem := _why_not_on_gpu(x.device.index)):
            _warn_once(problem)
            return "reference"
        return cast(Literal["cpu", "cuda"], device)
    library.require(requested)
    if device != requested:
        raise ValueError(
            f'backend "{requested}" takes {requested} tensors, got one on {x.device}; move the '
            'features and the module there, or use backend("auto")'
        )
    if device == "cuda" and (problem := _why_not_on_gpu(x.device.index)):
        raise RuntimeError(f'backend "cuda" cannot run here: {problem}')
    if transformed:
        raise RuntimeError(
            f'backend "{requested}" has no forward-mode derivatives (jvp, jacfwd, forward_ad) and '
            'no derivatives of derivatives in torch.func (hessian); use backend("reference"), or '
            'backend("auto"), which takes the reference there'
        )
    return requested


@cache
def _warn_once(reason: str) -> None:
    _log.warning("CUDA tensors run on the slow reference here: %s", reason)


@cache
def _say_transforms_are_slow() -> None:
    _log.info(
        "forward-mode derivatives, and derivatives of derivatives in torch.func, run on the "
        "reference: the compiled kernels have no rules for them"
    )
