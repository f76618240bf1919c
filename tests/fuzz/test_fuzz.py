"""Random calls keep the rule, and the tool names each call that does not."""

from __future__ import annotations

import subprocess
import sys

from tests.fuzz.runner import Run, fuzz
from tests.helpers.devices import needs_cpu_library
from tests.helpers.paths import ROOT

PLANTED = "tests.helpers.fuzz_plants"
PROBLEMS = {
    1: "SIGABRT",
    2: "relative L2 error 0.001",
    3: "an input was changed",
    4: "raised AttributeError",
    5: "no answer within 3 s",
    6: "shares its memory",
    7: "without a word",
}


@needs_cpu_library
def test_five_hundred_calls() -> None:
    """make fuzz makes more of them, other ones each time."""
    failures = [str(failure) for failure in fuzz(Run(seed=20210608, calls=500))]
    assert not failures, "\n".join(failures)


def test_each_broken_rule_is_named_and_the_run_goes_on() -> None:
    failures = list(fuzz(Run(calls=9, entries=PLANTED, timeout=3)))
    assert {failure.index: True for failure in failures} == dict.fromkeys(PROBLEMS, True)
    for failure in failures:
        assert PROBLEMS[failure.index] in failure.problem
        assert f"--seed 0 --only {failure.index} --entries {PLANTED}" in str(failure)
        assert "\n" not in str(failure)


def test_the_line_of_a_failure_makes_the_call_again() -> None:
    failure = next(fuzz(Run(first=2, calls=1, entries=PLANTED)))
    command = str(failure).partition(" #")[0].split()
    run = subprocess.run(
        [sys.executable, *command[1:]], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 1
    assert "wrong(float32[3, 4])" in run.stdout
    assert "relative L2 error" in run.stdout
