"""Runs tests and programs in processes of their own, without the seconds that a start takes.

A server imports torch, pytest and the tests once, but no emulated kernels. Each run is a fork of it
that loads the kernels of one folder.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.paths import ROOT

# Set in the runs: where the Python module lies, already built.
MODULE_DIRECTORY = "DYHEAD_SIMT_MODULE_DIRECTORY"

# Whether this process was started under AddressSanitizer.
SANITIZED = "ASAN_OPTIONS" in os.environ

LIMIT_S = 600

# A sanitizer ends the process, and with it the output that pytest would capture by default.
_OPTIONS = ["-q", "-p", "no:cacheprovider", "--capture=sys"]


@dataclass(frozen=True)
class Run:
    """How a run ended, and what it wrote to stdout and stderr."""

    returncode: int
    stdout: str


class Server:
    """The side of those who want something run. The server ends with this process."""

    def __init__(self, variables: dict[str, str]) -> None:
        # What pytest is told here, or by a worker of pytest-xdist, is not meant for the runs.
        kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.simt.server"],
            cwd=ROOT,
            env=kept | variables,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        atexit.register(self.close)

    @staticmethod
    @cache
    def of(variables: tuple[tuple[str, str], ...]) -> Server:
        """The server with these environment variables; each is started once."""
        return Server(dict(variables))

    def run_pytest(self, directory: Path, *arguments: str) -> Run:
        """Runs tests with the kernels of a folder."""
        return self._run(directory, {"pytest": arguments})

    def run_python(self, directory: Path, code: str) -> Run:
        """Runs code with the kernels of a folder: `simt` is their module, `np` is numpy."""
        return self._run(directory, {"code": code})

    def close(self) -> None:
        """Ends the server, and a run that is under way."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()

    def _run(self, directory: Path, request: dict[str, Any]) -> Run:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        with tempfile.NamedTemporaryFile("r", errors="replace") as output:
            request |= {"directory": str(directory), "output": output.name}
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
            if not select.select([stdout], [], [], LIMIT_S)[0]:
                self.close()
                raise TimeoutError(f"no end within {LIMIT_S} s:\n{output.read()}")
            answer = stdout.readline()
            if not answer:
                raise RuntimeError("the server of tests/simt has died; stderr says why")
            return Run(int(answer), output.read())


def _pytest(arguments: list[str]) -> int:
    return int(pytest.main([*_OPTIONS, *arguments]))


def _python(code: str) -> int:
    from .build import load_module

    exec(code, {"simt": load_module(), "np": np})
    return 0


def _run_here(request: dict[str, Any]) -> int:
    """Does what is asked, with all that it writes in a file; returns the exit status."""
    os.environ[MODULE_DIRECTORY] = request["directory"]
    output = os.open(request["output"], os.O_WRONLY)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, nothing), (1, output), (2, output)):
        os.dup2(source, target)
    try:
        return _python(request["code"]) if "code" in request else _pytest(request["pytest"])
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _serve() -> None:
    # Imports all that the runs will need. What pytest says of it is not an answer.
    with contextlib.redirect_stdout(io.StringIO()) as said:
        if _pytest(["--collect-only", "tests/simt"]) != 0:
            sys.exit(said.getvalue())
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os._exit(_run_here(json.loads(line)))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    _serve()
