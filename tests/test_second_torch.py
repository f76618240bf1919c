"""One build serves every torch: the same CPU library under another version, the same numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.paths import ROOT

CI = os.environ.get("CI") == "true"
PYTHON = os.environ.get("DYHEAD_SECOND_PYTHON")

WORKER = """
import hashlib, json, sys
from pathlib import Path
import numpy as np
import torch
import dyhead_cuda
from dyhead_cuda import library

torch.set_num_threads(1)
for source in Path(sys.argv[1]).glob("*.npz"):
    with np.load(source) as inputs:
        tensors = [torch.from_numpy(inputs[key]).requires_grad_() for key in inputs.files]
    with dyhead_cuda.backend("cpu"):
        out = dyhead_cuda.functional.dynamic_relu(*tensors)
        out.square().sum().backward()
    np.savez(Path(sys.argv[2], source.name), out.detach(), *(t.grad for t in tensors))
digest = hashlib.sha256(library.path("cpu").read_bytes()).hexdigest()
print(json.dumps({"torch": str(torch.__version__), "digest": digest}))
"""

DTYPES = ("float32", "float64")


@dataclass(frozen=True)
class Results:
    """What one Python says of itself, and by dtype the output and gradients of dynamic_relu."""

    versions: dict[str, str]
    arrays: dict[str, list[np.ndarray]]


def second_python() -> str:
    """The other environment's Python; without one the test is skipped, or fails under CI."""
    if PYTHON is None:
        pytest.skip("no second torch: make test sets one up, or DYHEAD_SECOND_PYTHON names one")
    probe = "import torch, numpy; print(torch.__version__)"
    try:
        result = subprocess.run([PYTHON, "-c", probe], capture_output=True, text=True, check=False)
        problem = result.stderr.strip()[-500:] if result.returncode else ""
    except OSError as error:
        problem = str(error)
    if problem:
        message = f"the second environment ({PYTHON}) cannot import torch and numpy: {problem}"
        if CI:
            pytest.fail(message)
        pytest.skip(message)
    if result.stdout.strip() == torch.__version__:
        pytest.fail(f"expected another torch than {torch.__version__} in {PYTHON}")
    return PYTHON


def run_worker(python: str, inputs: Path, outputs: Path) -> Results:
    """The results on all inputs under one Python."""
    outputs.mkdir()
    result = subprocess.run(
        [python, "-c", WORKER, str(inputs), str(outputs)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    arrays = {}
    for dtype in DTYPES:
        with np.load(outputs / f"{dtype}.npz") as saved:
            arrays[dtype] = [saved[key] for key in saved.files]
    return Results(json.loads(result.stdout), arrays)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Results]:
    """The results under this Python and under the second."""
    second = second_python()
    directory = tmp_path_factory.mktemp("second")
    rng = np.random.default_rng(7)
    shapes: tuple[tuple[int, ...], ...] = ((2, 64, 9, 11), (16, 64), (16,), (256, 16), (256,))
    inputs = directory / "inputs"
    inputs.mkdir()
    for dtype in DTYPES:
        values = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
        np.savez(inputs / f"{dtype}.npz", *values)
    ours = run_worker(sys.executable, inputs, directory / "ours")
    return ours, run_worker(second, inputs, directory / "theirs")


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_library_gives_the_same_numbers(both: tuple[Results, Results], dtype: str) -> None:
    ours, theirs = (results.versions for results in both)
    expected, got = (results.arrays[dtype] for results in both)
    assert ours["torch"] == torch.__version__ != theirs["torch"]
    assert ours["digest"] == theirs["digest"]
    assert len(got) == len(expected) == 6
    # Output and input gradient come from the library alone. torch's own matrix products make the
    # gradients of the parameters: these may round differently in another version.
    for a, b in zip(expected[:2], got[:2], strict=True):
        assert np.abs(a).max() > 0
        np.testing.assert_array_equal(b, a)
    for a, b in zip(expected[2:], got[2:], strict=True):
        assert np.linalg.norm(b - a) < 8 * np.finfo(dtype).eps * np.linalg.norm(a)
