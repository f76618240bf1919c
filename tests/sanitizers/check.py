"""What a sanitizer must find, and that it finds nothing else."""

from __future__ import annotations

from tests.fuzz.runner import Run, fuzz
from tests.sanitizers.build import (
    Sanitizer,
    build,
    build_planted,
    prefix,
    run_planted,
)

CAPABILITIES = ("default", "")  # of csrc/cpu/vector_kernels.cpp: portable, and the widest there is
ENTRIES = "tests.fuzz.compiled"


def missed_by(sanitizer: Sanitizer) -> list[str]:
    """Build for a sanitizer; what it should have found in planted.cpp, and did not."""
    build(sanitizer)
    build_planted(sanitizer)
    problems = []
    sound = run_planted(sanitizer, "sound")
    if sound.returncode != 0 or "finished 40" not in sound.stdout:
        problems.append(f"the sound function failed: {sound.stdout}{sound.stderr[-600:]}")
    for function, report in sanitizer.finds.items():
        run = run_planted(sanitizer, function)
        if run.returncode == 0 or report not in run.stderr:
            problems.append(f"{function} was not found: {run.returncode}, {run.stderr[-600:]}")
    return problems


def failures_of(sanitizer: Sanitizer, seed: int, calls: int) -> list[str]:
    """Calls of compiled kernels that fail under a sanitizer, with each instruction set."""
    found = []
    for capability in CAPABILITIES:
        environment = sanitizer.environment() | {"DYHEAD_CPU_CAPABILITY": capability}
        if not capability:
            del environment["DYHEAD_CPU_CAPABILITY"]
        run = Run(
            seed,
            calls,
            entries=ENTRIES,
            limited=False,
            environment=environment,
            prefix=tuple(prefix(sanitizer)),
        )
        found += [f"{sanitizer.name}: {failure}" for failure in fuzz(run)]
    return found
