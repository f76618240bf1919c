"""Runs calls in a child process, which may crash or hang without taking the run with it."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import queue
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.fuzz.cases import Call, Source
from tests.fuzz.entries import make_call
from tests.fuzz.judge import problem_of
from tests.helpers.paths import ROOT

MEMORY = 8 << 30  # of a child: a larger result is refused, as by a small machine
START = 120.0  # seconds in which a child has imported torch


@dataclass(frozen=True)
class Run:
    """What to call.

    Args:
        seed: of all random choices.
        calls: how many.
        first: index of the first one.
        entries: module with a dict ENTRIES.
        timeout: seconds that one call may take.
        limited: whether a child's memory is limited, which sanitizers do not allow.
        environment: of the child, beside the parent's.
        prefix: of the child's command.
    """

    seed: int = 0
    calls: int = 500
    first: int = 0
    entries: str = "tests.fuzz.entries"
    timeout: float = 60.0
    limited: bool = True
    environment: dict[str, str] = field(default_factory=dict)
    prefix: tuple[str, ...] = ()


@dataclass(frozen=True)
class Failure:
    """A call that broke the rule, with the command that makes it again."""

    index: int
    call: str
    problem: str
    run: Run

    def __str__(self) -> str:
        other = "" if self.run.entries == Run.entries else f" --entries {self.run.entries}"
        again = f"python -m tests.fuzz --seed {self.run.seed} --only {self.index}{other}"
        return " ".join(f"{again}  # {self.problem[:400]}; {self.call[:600]}".split())


def fuzz(run: Run) -> Iterator[Failure]:
    """Make all calls of a run; yield those that fail."""
    index, last = run.first, run.first + run.calls
    while index < last:
        index = yield from one_child(run, index, last)


def one_child(run: Run, first: int, last: int) -> Any:
    """Make calls until one kills the child; returns the index of the next one."""
    child = subprocess.Popen(
        [
            *(*run.prefix, sys.executable, "-m", "tests.fuzz", "--child", "--seed", str(run.seed)),
            *("--first", str(first), "--calls", str(last - first), "--entries", run.entries),
            *(["--unlimited"] if not run.limited else []),
        ],
        cwd=ROOT,
        env=os.environ | run.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    lines: queue.Queue[str | None] = queue.Queue()
    said: list[str] = []
    readers = [
        threading.Thread(target=forward, args=(child.stdout, lines.put), daemon=True),
        threading.Thread(target=forward, args=(child.stderr, said.append), daemon=True),
    ]
    for reader in readers:
        reader.start()
    index, call, patience, problem = first, "", START, ""
    while True:
        try:
            line = lines.get(timeout=patience)
        except queue.Empty:
            child.kill()
            problem = f"no answer within {patience:.0f} s"
            break
        if line is None:
            break
        message = json.loads(line)
        index, patience = message["index"], run.timeout
        if "problem" not in message:
            call = message["call"]
        elif message["problem"]:
            yield Failure(index, call, message["problem"], run)
    code = child.wait()
    readers[1].join(timeout=10)
    if code == 0 and not problem:
        return last
    if not problem:
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        tail = " ".join("".join(said).split())
        problem = f"the process ended by {how}: {report_of(tail)}"
    yield Failure(index, call or "(before the first call)", problem, run)
    return index + 1 if call else last


def report_of(text: str) -> str:
    """The part of a child's errors that matters: a sanitizer's first line, or the end."""
    for mark in ("runtime error:", "ERROR: AddressSanitizer", "WARNING: ThreadSanitizer"):
        if mark in text:
            start = max(0, text.index(mark) - 120)
            return text[start : start + 500]
    return text[-300:]


def forward(stream: Any, put: Callable[[Any], None]) -> None:
    for line in stream:
        put(line)
    put(None if put.__name__ == "put" else "")


def work(arguments: argparse.Namespace) -> int:
    """The child: makes the calls, and says before and after each what it is about to do."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what others print is no answer
    if not arguments.unlimited:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(min(2, torch.get_num_threads()))
    entries = importlib.import_module(arguments.entries).ENTRIES

    def say(**message: Any) -> None:
        print(json.dumps(message), file=answers, flush=True)

    for index in range(arguments.first, arguments.first + arguments.calls):
        say(index=index, call="(making the arguments)")
        call = make_call(entries, arguments.seed, index)
        say(index=index, call=described(call))
        try:
            problem = problem_of(call)
        except Exception as error:
            problem = f"the judge itself raised {type(error).__name__}: {error}"
        say(index=index, problem=problem)
    return 0


def described(call: Call) -> str:
    return f"{call}{call.spoiled and f'; spoiled {call.spoiled}'}"


def alone(entries: dict[str, Callable[[Source], Call]], seed: int, index: int) -> int:
    """Make one call in this process, with its traceback where it raises."""
    call = make_call(entries, seed, index)
    print(described(call))
    problem = problem_of(call)
    print(problem or "right")
    return int(bool(problem))
