"""The tests of this folder once more under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from .build import SANITIZER_EXIT, mutate, sanitized

FAULT = """
out = simt.emulator.fault(np.ones(64, np.float32), simt.emulator.Fault.{name})
print("finished", out[:3])
"""

REPORTS = {
    "shared_overrun": "index 64 out of bounds",
    "shared_underrun": "AddressSanitizer: use-after-poison",
    "dynamic_overrun": "AddressSanitizer: use-after-poison",
    "global_overrun": "AddressSanitizer: use-after-poison",
    "global_overread": "AddressSanitizer: use-after-poison",
}


# What is left out of the long ones are the same kernels in other types or orders.
_MATRICES = "not float16 and not float64 and not test_orders and not chunks"
# Of values that are not finite those of offsets become addresses; of the others one each runs here.
_FEW_VALUES = "not (test_not_finite and not offset and not (logits and nan))"
# gradcheck makes one small call hundreds of times.
_CONVOLUTION = f"{_MATRICES} and not gradcheck and {_FEW_VALUES}"
PARTS = {
    "test_block.py": "not torch.float16",  # build.sanitized() has no such kernels
    "test_deform_conv.py": _CONVOLUTION,
    "test_deform_weights.py": f"{_MATRICES} and {_FEW_VALUES}",
    "test_hopper.py": f"{_MATRICES} and not races and not release_of",
    "test_offset_deform_conv.py": _CONVOLUTION,
    "test_plain_conv.py": _MATRICES,
    "test_wgmma_backward.py": "bfloat16 and (works and (odd or groups) or bits and small)",
    "test_wgmma_conv.py": "bfloat16 and (shared or groups) and not test_orders",
}
_NO_KERNELS = ("counters", "mutants", "nvcc", "sanitized", "tiling", "traffic")
SUITES = {
    path.name: PARTS.get(path.name, "")
    for path in sorted(Path(__file__).parent.glob("test_*.py"))
    if not any(name in path.name for name in _NO_KERNELS)
}


def test_parts_are_of_suites() -> None:
    assert PARTS.keys() <= SUITES.keys()


@pytest.mark.spawns
@pytest.mark.usefixtures("simt")
@pytest.mark.parametrize("name", SUITES)
def test_suite_is_clean(name: str) -> None:
    run = sanitized().run_pytest(f"tests/simt/{name}", "-k", SUITES[name])
    assert run.returncode == 0, run.stdout
    assert "passed" in run.stdout


@pytest.mark.spawns
@pytest.mark.usefixtures("simt")
@pytest.mark.parametrize("name", REPORTS)
def test_access_out_of_bounds_is_reported(name: str) -> None:
    run = sanitized().run_python(FAULT.format(name=name))
    assert run.returncode == SANITIZER_EXIT, run.stdout
    assert REPORTS[name] in run.stdout
    assert "basics.cu" in run.stdout
    assert "finished" not in run.stdout


@pytest.mark.spawns
@pytest.mark.usefixtures("simt")
def test_correct_kernel_finishes() -> None:
    run = sanitized().run_python(FAULT.format(name="none"))
    assert run.returncode == 0, run.stdout
    assert "finished [1. 1. 1.]" in run.stdout


@pytest.mark.spawns
@pytest.mark.usefixtures("simt")
def test_planted_overread_is_reported() -> None:
    kernels = mutate(
        "tests/simt/kernels/basics.cu",
        "row[kBlockThreads - 1 - threadIdx.x]",
        "row[kBlockThreads - threadIdx.x]",
        sanitize=True,
    )
    run = kernels.run_pytest("tests/simt/test_emulator.py", "-k", "barrier_publishes")
    assert run.returncode == SANITIZER_EXIT, run.stdout
    assert "index 128 out of bounds for type 'float [128]'" in run.stdout
