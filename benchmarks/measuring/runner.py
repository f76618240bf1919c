"""Checks and measures every implementation of the selected settings."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from benchmarks.cases.heads import problem_of
from benchmarks.cases.precisions import PRECISIONS
from benchmarks.cases.problems import (
    BOTH,
    FORWARD,
    Implementation,
    Problem,
    Setting,
    with_gradients,
)
from benchmarks.measuring import checking, probes, selection
from benchmarks.measuring.checking import Action, WrongResultError
from benchmarks.measuring.selection import Entry
from benchmarks.measuring.timing import GRAPH, WARM, Effort, Timing, measure
from benchmarks.reports.results import FAILED, OK, SKIPPED, WRONG, Row

REMARK_LENGTH = 300


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        device: where.
        effort: how long each.
        methods: of :data:`timing.METHODS`.
        deadline: of :func:`time.monotonic`; what would start later is skipped.
    """

    device: torch.device
    effort: Effort
    methods: tuple[str, ...]
    deadline: float = float("inf")


@dataclass
class Runner:
    """Runs entries; reuses results that several settings or precisions share."""

    options: Options
    _expected: dict[tuple[Setting, bool, str], checking.Results] = field(default_factory=dict)
    _small_errors: dict[tuple[Setting, str, str, str], float | str] = field(default_factory=dict)
    _measured: dict[tuple[Setting, str, str, str], Row] = field(default_factory=dict)

    def run(self, entry: Entry, announce: Callable[[str], None]) -> Iterator[Row]:
        """All rows of one entry, as they are measured.

        Args:
            entry: the setting.
            announce: is told what begins.
        """
        if time.monotonic() > self.options.deadline:
            yield from self._skipped(entry)
            return
        problem = problem_of(entry.setting)
        for precision in entry.precisions:
            for direction in entry.directions:
                for how in problem.implementations:
                    left_out = how.family and how.family not in entry.families
                    if left_out or direction not in how.directions:
                        continue
                    announce(f"{entry.setting.title}, {precision}, {direction}: {how.name}")
                    yield self._row(problem, entry, how, precision, direction)
        self._expected.clear()
        self._measured.clear()

    def _skipped(self, entry: Entry) -> Iterator[Row]:
        for precision in entry.precisions:
            for direction in entry.directions:
                yield _blank_row(entry.setting, precision, direction, "all", precision, SKIPPED)

    def _row(
        self, problem: Problem, entry: Entry, how: Implementation, precision: str, direction: str
    ) -> Row:
        device = self.options.device
        setting = problem.setting
        ran_in = how.precision_for(precision, device)
        known = self._measured.get((setting, how.name, ran_in, direction))
        if known is not None:
            return replace(known, precision=precision)
        row = _blank_row(setting, precision, direction, how.name, ran_in, SKIPPED)
        if time.monotonic() > self.options.deadline:
            return row
        row = replace(
            row,
            remark="",
            flops=problem.work.flops_of(direction),
            bytes=problem.work.bytes_of(direction, PRECISIONS[ran_in].itemsize),
        )
        try:
            row = self._measure(row, problem, entry, how, ran_in, direction)
        except WrongResultError as error:
            row = replace(row, status=WRONG, remark=str(error))
        except Exception as error:  # a peer may raise anything; keep measuring the others
            row = replace(row, status=FAILED, remark=_first_line(error))
        _free(device)
        self._measured[setting, how.name, ran_in, direction] = row
        return row

    def _measure(
        self,
        row: Row,
        problem: Problem,
        entry: Entry,
        how: Implementation,
        precision: str,
        direction: str,
    ) -> Row:
        options = self.options
        checked, errors = [], []
        # torch.compile compiles for every size anew, so check only the size that is measured.
        if not how.bar and not how.compiled:
            errors.append(self._small_error(problem.setting, how, precision, direction))
            checked.append("small")
        action = Action(problem, how, precision, options.device)
        with action.context():
            run = action.prepare(direction)
            if how.compiled:
                run()
            begin = time.perf_counter()
            found, memory = probes.with_peak_memory(run, options.device)
            first = time.perf_counter() - begin
            judged = None
            if not how.bar and (entry.real_check or how.compiled):
                judged = self._judged_direction(problem, direction)
            if judged is not None:
                results = action.as_maps(found)
                if judged == FORWARD:
                    results = replace(results, inputs=[], parameters=[])
                right = self._right(problem, last_only=True, direction=judged)
                errors.append(checking.check(problem, how, precision, results, right, real=True))
                checked.append("real" if judged == direction else "real, outputs only")
                del results
            del found
            times, remark = self._times(run, first)
            kernels = (
                probes.launches(run, options.device) if not with_gradients(direction) else None
            )
        return replace(
            row,
            status=OK,
            remark=remark,
            error=max(errors) if errors else None,
            checked=checked,
            times=times,
            memory=memory,
            launches=kernels,
        )

    def _times(self, run: Callable[[], object], first: float) -> tuple[dict[str, Timing], str]:
        device, remark = self.options.device, ""
        effort, known = self.options.effort.given(first)
        times: dict[str, Timing] = {}
        for method in self.options.methods:
            try:
                times[method] = measure(
                    run, device, effort, method, known if method == WARM else ()
                )
            except RuntimeError as error:
                if method != GRAPH or not times:
                    raise
                remark = f"no CUDA graph: {_first_line(error)}"
        return times, remark

    def _judged_direction(self, problem: Problem, direction: str) -> str | None:
        """The direction whose reference fits into memory at the real size; None if neither does."""
        free = checking.available_bytes(self.options.device) // 2
        for candidate in (direction, FORWARD):
            if checking.reference_bytes(problem, candidate) <= free:
                return candidate
        return None

    def _right(self, problem: Problem, last_only: bool, direction: str) -> checking.Results:
        """The results of the reference; those of both directions include the forward's."""
        for known in (direction, BOTH):
            found = self._expected.get((problem.setting, last_only, known))
            if found is not None:
                return found if known == direction else replace(found, inputs=[], parameters=[])
        found = checking.expected(problem, self.options.device, direction, last_only)
        self._expected[problem.setting, last_only, direction] = found
        return found

    def _small_error(
        self, setting: Setting, how: Implementation, precision: str, direction: str
    ) -> float:
        small = selection.small(setting)
        key = (small, how.name, precision, direction)
        if key not in self._small_errors:
            try:
                self._small_errors[key] = self._check_small(small, how.name, precision, direction)
            except WrongResultError as error:
                self._small_errors[key] = f"at a small size: {error}"
        known = self._small_errors[key]
        if isinstance(known, str):
            raise WrongResultError(known)
        return known

    def _check_small(self, small: Setting, name: str, precision: str, direction: str) -> float:
        problem = problem_of(small)
        how = next(i for i in problem.implementations if i.name == name)
        action = Action(problem, how, precision, self.options.device)
        with action.context():
            results = action.as_maps(action.prepare(direction)())
        right = self._right(problem, last_only=False, direction=direction)
        return checking.check(problem, how, precision, results, right)


def _blank_row(
    setting: Setting, precision: str, direction: str, name: str, ran_in: str, status: str
) -> Row:
    return Row(
        case=setting.case,
        shapes=setting.shapes.name,
        batch=setting.batch,
        blocks=setting.blocks,
        channels=setting.shapes.channels,
        direction=direction,
        precision=precision,
        implementation=name,
        ran_in=ran_in,
        status=status,
        remark="no time left",
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or ["no reason given"]
    return f"{type(error).__name__}: {lines[0]}"[:REMARK_LENGTH]


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # a kernel that failed earlier makes it raise
            torch.cuda.empty_cache()


@contextlib.contextmanager
def compiler_room() -> Iterator[None]:
    """Lets torch.compile recompile for many sizes; by default it would silently fall back."""
    settings = torch._dynamo.config
    with settings.patch(recompile_limit=1000, fail_on_recompile_limit_hit=True):
        yield


def run_entries(
    entries: Sequence[Entry], options: Options, announce: Callable[[str], None]
) -> Iterator[tuple[Entry, Row]]:
    """The rows of some entries, each with its entry."""
    runner = Runner(options)
    with compiler_room():
        for entry in entries:
            for row in runner.run(entry, announce):
                yield entry, row
