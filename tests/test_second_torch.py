"""One build serves every torch: the same CPU library under another version, the same numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.paths import ROOT

CI = os.environ.get("CI") == "true"
PYTHON = os.environ.get("DYHEAD_SECOND_PYTHON")

WORKER = """
import hashlib, json, sys
import numpy as np
import torch
import dyhead_cuda
from dyhead_cuda import library

source, target = sys.argv[1:]
torch.set_num_threads(1)
with np.load(source) as inputs:
    tensors = [torch.from_numpy(inputs[key]).requires_grad_() for key in inputs.files]
with dyhead_cuda.backend("cpu"):
    out = dyhead_cuda.functional.dynamic_relu(*tensors)
    out.square().sum().backward()
np.savez(target, out.detach().numpy(), *(t.grad.numpy() for t in tensors))
digest = hashlib.sha256(library.path("cpu").read_bytes()).hexdigest()
print(json.dumps({"torch": str(torch.__version__), "digest": digest}))
"""


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


def run_worker(python: str, inputs: Path, outputs: Path) -> tuple[dict[str, str], list[np.ndarray]]:
    """The versions, and the output and the gradients of dynamic_relu, under one Python."""
    result = subprocess.run(
        [python, "-c", WORKER, str(inputs), str(outputs)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    with np.load(outputs) as arrays:
        return json.loads(result.stdout), [arrays[key] for key in arrays.files]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_same_library_gives_the_same_numbers(tmp_path: Path, dtype: type) -> None:
    second = second_python()
    rng = np.random.default_rng(7)
    shapes: tuple[tuple[int, ...], ...] = ((2, 64, 9, 11), (16, 64), (16,), (256, 16), (256,))
    inputs = tmp_path / "inputs.npz"
    np.savez(inputs, *(rng.standard_normal(shape).astype(dtype) for shape in shapes))
    ours, expected = run_worker(sys.executable, inputs, tmp_path / "ours.npz")
    theirs, got = run_worker(second, inputs, tmp_path / "theirs.npz")
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
