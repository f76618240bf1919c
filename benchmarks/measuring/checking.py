"""Runs an implementation on its data and compares the results with the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cases.precisions import PEER_GRADIENT_FACTOR, PEER_TOLERANCE, PRECISIONS, products
from benchmarks.cases.problems import Implementation, Maps, Problem, random_maps, with_gradients
from dyhead_cuda import backends

COTANGENT_SEED = 99
# A gradient much smaller than the others, whose terms cancel, is judged relative to this share of
# the largest.
MIN_SHARE = 1e-3


class WrongResultError(Exception):
    """A result too far from the float64 reference to be worth timing."""


class Action:
    """One implementation on one problem, ready to run.

    Args:
        problem, how, precision, device: what runs, in which precision and where.
    """

    def __init__(
        self, problem: Problem, how: Implementation, precision: str, device: torch.device
    ) -> None:
        self.problem, self.how, self.precision, self.device = problem, how, precision, device
        dtype = PRECISIONS[precision]
        self.module = how.module_of(problem.module, device, precision)
        self.inputs = how.inputs.encode([x.to(device, dtype) for x in problem.images])
        self.leaves: Maps = []
        self.cotangents: Maps = []

    @contextmanager
    def context(self) -> Iterator[None]:
        """Selects the backend and the precision of products to run with."""
        name = self.device.type if self.how.backend == "own" else self.how.backend
        with backends.backend(name), products(self.precision):  # type: ignore[arg-type]
            yield

    def prepare(self, direction: str) -> Callable[[], Maps]:
        """The function to time. For both directions it returns the outputs, then the gradients."""
        if not with_gradients(direction):
            return self._forward
        with self.context():
            outputs = self._forward()
        self.module.requires_grad_()
        self.leaves = [x.detach().requires_grad_() for x in self.inputs]
        if self.how.bar:
            self.cotangents = [torch.randn_like(out) for out in outputs]
        else:
            cotangents = cotangents_for(self.how.outputs.decode(outputs))
            encoded = self.how.outputs.encode([t.to(self.device) for t in cotangents])
            self.cotangents = [t.to(o.dtype) for t, o in zip(encoded, outputs, strict=True)]
        return self._both

    def _forward(self) -> Maps:
        with torch.no_grad():
            return self.how.run(self.module, self.inputs)

    def _both(self) -> Maps:
        outputs = self.how.run(self.module, self.leaves)
        leaves = [*self.leaves, *self.module.parameters()]
        gradients = torch.autograd.grad(outputs, leaves, self.cotangents, allow_unused=self.how.bar)
        return [*outputs, *gradients]

    def as_maps(self, results: Maps) -> Results:
        """What the function of :meth:`prepare` returned, in the layout that all share."""
        count = len(results) if not self.leaves else len(results) - len(self._differentiated())
        gradients = results[count:]
        inputs = gradients[: len(self.leaves)]
        return Results(
            [x.detach() for x in self.how.outputs.decode(results[:count])],
            self.how.inputs.decode(inputs) if inputs else [],
            gradients[len(self.leaves) :],
        )

    def _differentiated(self) -> Maps:
        return [*self.leaves, *self.module.parameters()]


@dataclass(frozen=True)
class Results:
    """Outputs and, for both directions, gradients of the inputs and of the parameters."""

    outputs: Maps
    inputs: Maps
    parameters: Maps

    def last_image(self) -> Results:
        """The results of the last image, without gradients that are sums over images."""
        return Results([x[-1:] for x in self.outputs], [x[-1:] for x in self.inputs], [])


def cotangents_for(outputs: Sequence[Tensor]) -> Maps:
    """The incoming gradients; those of the last image are the same for every batch."""
    return random_maps([x.shape[1:] for x in outputs], len(outputs[0]), COTANGENT_SEED)


def expected(problem: Problem, device: torch.device, direction: str, last_only: bool) -> Results:
    """The results of the reference in float64.

    Args:
        problem: the problem.
        device: where to compute it.
        direction: whether gradients are wanted.
        last_only: of the last image alone, for which a batch has the same data at any size.
    """
    if last_only:
        problem = replace(problem, images=[x[-1:] for x in problem.images])
    action = Action(problem, problem.reference, "float64", device)
    with action.context():
        run = action.prepare(direction)
        return action.as_maps(run())


def relative_errors(found: Sequence[Tensor], right: Sequence[Tensor]) -> list[float]:
    """||found - right|| / ||right|| of each, in float64; NaN where there is one."""
    norms = [float(x.double().norm()) for x in right]
    floor = MIN_SHARE * max(norms, default=0.0)
    errors = []
    for a, b, norm in zip(found, right, norms, strict=True):
        if a.shape != b.shape:
            raise WrongResultError(f"expected a result of {list(b.shape)}, got {list(a.shape)}")
        distance = float((a.to(b.device).double() - b.double()).norm())
        errors.append(distance / max(norm, floor, 1e-300))
    return errors


def check(
    problem: Problem,
    how: Implementation,
    precision: str,
    found: Results,
    right: Results,
    real: bool = False,
) -> float:
    """The largest relative error of some results.

    Args:
        problem, how, precision: what ran.
        found, right: its results and those of the reference.
        real: whether the size is a real one, at which gradients may jump.

    Raises:
        WrongResultError: it is larger than allowed, or not a number.
    """
    if len(found.outputs[0]) != len(right.outputs[0]):
        found, right = found.last_image(), replace(right, parameters=[])
    if how.family == "":
        allowed = problem.tolerance[precision]
        of_gradients = problem.gradient_tolerance[precision]
    else:
        allowed = PEER_TOLERANCE[precision]
        of_gradients = PEER_GRADIENT_FACTOR * allowed
    if real:
        of_gradients = max(of_gradients, problem.jumps)
    worst = 0.0
    for what, limit, a, b in (
        ("the outputs", allowed, found.outputs, right.outputs),
        ("the inputs' gradients", of_gradients, found.inputs, right.inputs),
        ("the parameters' gradients", of_gradients, found.parameters, right.parameters),
    ):
        for error in relative_errors(a, b):
            if not error <= limit:
                raise WrongResultError(
                    f"expected a relative error of {what} of at most {limit:.0e}, got {error:.1e}"
                )
            worst = max(worst, error)
    return worst


def reference_bytes(problem: Problem, direction: str) -> int:
    """Roughly the memory of the float64 reference for one image: several times its columns.

    Measured: 5.3 GiB for a block with its backward at 800x1344, a third of that without.
    """
    blocks = max(1, problem.setting.blocks)
    columns = problem.work.flops / problem.setting.batch / blocks / problem.setting.shapes.channels
    return int(columns * (40 if with_gradients(direction) else 13))


def available_bytes(device: torch.device) -> int:
    """Free memory in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 8 * 2**30
    fields = dict(line.split(":") for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024
