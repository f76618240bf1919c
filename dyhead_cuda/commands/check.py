"""``python -m dyhead_cuda check``: whether the compiled kernels give the right numbers here.

Every operator and the heads, forward and backward, in every type of the device, against the
reference in float64; then each operator against finite differences, and what torch demands of an
operator. It needs nothing but the installed package, and takes under two minutes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dyhead_cuda import backends, library, older_torch
from dyhead_cuda.commands import check_cases
from dyhead_cuda.commands.check_cases import Case
from dyhead_cuda.numerics import TOLERANCES, gradient_errors, relative_l2

NAMESPACE = "dyhead"
TITLE = f"{'what':<44} {'device':<6} {'type':<9} {'forward':<19} {'backward':<19} verdict"
ADVICE = """
Something here does not compute what the reference does. Please report all of this, with what
"python -m dyhead_cuda info --json" prints. Until it is mended, dyhead_cuda.backend("reference") is
right, and slow."""


@dataclass(frozen=True)
class Result:
    """A line of the table.

    Args:
        what: a case, or a property of an operator.
        device: "cpu" or "cuda".
        precision: a key of :data:`~dyhead_cuda.numerics.TOLERANCES`.
        errors: the largest relative error and the allowed one, forward, then backward.
        problem: what went wrong apart from that.
    """

    what: str
    device: str
    precision: str
    errors: Sequence[tuple[float, float]] = ()
    problem: str = ""

    @property
    def right(self) -> bool:
        # NaN is within no limit.
        return not self.problem and all(error <= allowed for error, allowed in self.errors)

    def __str__(self) -> str:
        columns = [f"{error:.1e} of {allowed:.1e}" for error, allowed in self.errors]
        forward, backward = [*columns, "", ""][:2]
        verdict = "right" if self.right else f"WRONG{': ' * bool(self.problem)}{self.problem}"
        name = f"{self.what:<44} {self.device:<6} {self.precision:<9}"
        return f"{name} {forward:<19} {backward:<19} {verdict}"


def run(arguments: argparse.Namespace) -> int:
    """Prints a line for each check; returns the exit status: 0, 1 if something is wrong, 2 if there
    is nothing to check."""
    start = time.monotonic()
    devices = [device for device in library.NAMES if arguments.device in (None, device)]
    missing = {device: why_not(device) for device in devices}
    for device, reason in missing.items():
        if reason:
            print(f"{device}: not checked, as {reason}")
    devices = [device for device in devices if not missing[device]]
    if not devices:
        print("There is no compiled kernel to check: everything runs on the reference.")
        return 2
    print(TITLE)
    wrong = 0
    for result in results_on(devices):
        print(result, flush=True)
        wrong += not result.right
    print(f"{wrong or 'nothing'} wrong, {time.monotonic() - start:.0f} s")
    if wrong:
        print(ADVICE)
    return int(wrong > 0)


def why_not(device: str) -> str:
    """Why the kernels of a device cannot run here; "" if they can."""
    if not library.loaded(device):
        return f"its library is not loaded: {library.reason(device)}"
    if device == "cuda" and not torch.cuda.is_available():
        return "torch sees no GPU"
    if device == "cuda":
        return library.lacks_code_for(torch.cuda.get_device_capability())
    return ""


def results_on(devices: Sequence[str]) -> Iterator[Result]:
    """All checks, in order."""
    heads = check_cases.heads()
    for device in devices:
        operators = check_cases.operators()
        compared = [*operators, *heads]
        if device == "cuda":
            compared += [
                replace(case, name=f"{case.name}, deterministic", deterministic=True)
                for case in operators
                if "deform_conv" in case.name
            ]
        for case in compared:
            for precision in TOLERANCES:
                if precision != "tf32" or device == "cuda":
                    yield compared_with_reference(case, device, precision)
        small = check_cases.operators(check_cases.SMALL)
        yield from (with_finite_differences(case, device) for case in small)
        yield from as_torch_demands(small, device)


def dtype_of(precision: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, "float32" if precision == "tf32" else precision)
    return dtype


def compared_with_reference(case: Case, device: str, precision: str) -> Result:
    """Results and gradients of a case against those of plain PyTorch in float64."""
    allowed = case.factor * TOLERANCES[precision]
    try:
        # As they come, then away from kinks, where gradients can be compared.
        rough, _, _ = errors_of(case, device, precision, smooth=False)
        smooth, backward, finite = errors_of(case, device, precision, smooth=True)
    except Exception as error:
        return Result(case.name, device, precision, problem=told(error))
    problem = "" if finite else "values that are not finite"
    errors = [(max(rough, smooth), allowed), (backward, 2 * allowed)]
    return Result(case.name, device, precision, errors, problem)


def errors_of(case: Case, device: str, precision: str, smooth: bool) -> tuple[float, float, bool]:
    """The largest errors of results and gradients, and whether all are finite."""
    dtype = dtype_of(precision)
    inputs = case.inputs(smooth, dtype, device)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    with backends.backend("reference"):
        wanted = list((case.expected or case.compiled)(exact))
    cotangents = [check_cases.normals(9 + i)(*t.shape).to(dtype) for i, t in enumerate(wanted)]
    with (
        older_torch.tf32(precision == "tf32"),
        deterministic(case.deterministic),
        backends.backend(library_of(device)),
    ):
        found = list(case.compiled(inputs))
        grads = gradients(found, inputs, cotangents)
    forward = max(relative_l2(a, b) for a, b in zip(found, wanted, strict=True))
    if any(t.dtype != dtype for t in found):
        raise TypeError(f"expected results of {dtype}, got {[t.dtype for t in found]}")
    backward = max(gradient_errors(grads, gradients(wanted, exact, cotangents), case.floor))
    return forward, backward, all(bool(t.isfinite().all()) for t in (*found, *grads))


def library_of(device: str) -> backends.Backend:
    return "cuda" if device == "cuda" else "cpu"


def gradients(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> list[Tensor]:
    moved = [t.to(out) for t, out in zip(cotangents, outputs, strict=True)]
    return list(torch.autograd.grad(outputs, inputs, moved, materialize_grads=True))


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(before or wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def with_finite_differences(case: Case, device: str) -> Result:
    """The gradients of an operator against differences of its results, in float64."""
    what = f"{case.name}: gradcheck"
    inputs = case.inputs(True, torch.float64, device)

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(case.compiled(tensors))

    def check() -> None:
        with backends.backend(library_of(device)):
            # On CUDA the order of some sums is not fixed.
            torch.autograd.gradcheck(call, inputs, nondet_tol=1e-8)

    return passed(what, device, check)


def as_torch_demands(cases: Sequence[Case], device: str) -> Iterator[Result]:
    """The schema, fake kernels and autograd formula of all operators that the cases call."""
    calls: dict[Any, tuple[Any, ...]] = {}

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if f.namespace == NAMESPACE:
                calls[f] = args
            return f(*args, **(kwargs or {}))

    def call_all() -> None:
        for case in cases:
            inputs = case.inputs(True, torch.float64, device)
            outputs = list(case.compiled(inputs))
            gradients(outputs, inputs, outputs)

    with Record(), backends.backend(library_of(device)):
        problem = passed("operators: opcheck", device, call_all)
    if problem.problem:
        yield problem
    for operator, arguments in calls.items():
        name = operator.name().removeprefix(f"{NAMESPACE}::")
        # Backward operators have no derivative of their own.
        leaf = partial(as_leaf, requires_grad="bwd" not in name)
        leaves = pytree.tree_map_only(Tensor, leaf, arguments)
        check = partial(torch.library.opcheck, operator, leaves)
        yield passed(f"{name}: opcheck", device, check)


def as_leaf(t: Tensor, requires_grad: bool) -> Tensor:
    return t.detach().requires_grad_(requires_grad)


def passed(what: str, device: str, check: Callable[[], object]) -> Result:
    """A check that raises where something is wrong."""
    try:
        check()
    except Exception as error:
        return Result(what, device, "float64", problem=told(error))
    return Result(what, device, "float64")


def told(error: Exception) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
