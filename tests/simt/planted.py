"""What a planted bug is: a change of a kernel's text that its emulated tests must notice."""

from __future__ import annotations

from dataclasses import dataclass

from .build import Kernels, mutate

CUDA = "csrc/cuda"
COMMON = "csrc/common"
ROWS = f"{CUDA}/tile/rows.cuh"
BARRIER = "__syncthreads();"
BARRIER_LINE = "  __syncthreads();\n"


@dataclass(frozen=True)
class Bug:
    """One change of one file.

    Attributes:
        file: the file, relative to the repository.
        pattern, replacement: what is replaced by what; `pattern` occurs once in the file.
        kernel: where `file` is a header, the kernel to build with it instead of the suite's.
        select: the tests that must notice it instead of the suite's.
    """

    file: str
    pattern: str
    replacement: str
    kernel: str | None = None
    select: str | None = None


@dataclass(frozen=True)
class Suite:
    """The bugs planted in an operator, and the tests that must notice them.

    Attributes:
        tests: the file of the tests in this folder.
        kernel: what to build where a header is changed: a .cu file, without its ending.
        select: the tests that run, an expression for pytest's -k; all where it is empty.
        bugs: by what is wrong.
        harmless: a change under which the tests must pass.
        optimize: whether the bugs are compiled as the unchanged kernels are. Without it a kernel
            compiles in a third of the time, and runs longer: what is less for few and small tests.
    """

    tests: str
    kernel: str
    select: str
    bugs: dict[str, Bug]
    harmless: Bug
    optimize: bool = True

    def build(self, bug: Bug) -> Kernels:
        kernel = None if bug.file.endswith(".cu") else bug.kernel or self.kernel
        return mutate(bug.file, bug.pattern, bug.replacement, kernel=kernel, optimize=self.optimize)

    def pytest_arguments(self, bug: Bug) -> tuple[str, ...]:
        select = bug.select or self.select
        return (f"tests/simt/{self.tests}", *(("-k", select) if select else ()))


def without(file: str, text: str, kept: str = "", **options: str) -> Bug:
    """The bug that `text` is missing behind `kept`, which makes the place unique."""
    return Bug(file, kept + text, kept, **options)
