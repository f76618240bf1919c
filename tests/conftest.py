"""What pytest is told: profiles, markers and fixtures of all tests; helpers/ has the rest."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec

import hypothesis
import pytest
import torch

from dyhead_cuda import library
from tests.helpers.devices import Device

hypothesis.settings.register_profile(
    "dyhead",
    derandomize=True,
    deadline=None,
    max_examples=30,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("dyhead")


# On a machine that is lent as it is, make gpu-check runs what can run.
_NEEDS = {
    (
        *("detection", "commands/test_detection_commands.py", "commands/test_starting_commands.py"),
        *("benchmarks/test_study.py", "benchmarks/test_study_command.py"),
        "benchmarks/test_first_weights.py",
    ): ("pycocotools", "sklearn", "torchvision"),
    ("onnx",): ("onnx", "onnxscript", "onnxruntime"),
}
_MISSING = {
    paths: [name for name in names if find_spec(name) is None] for paths, names in _NEEDS.items()
}
collect_ignore = [path for paths, missing in _MISSING.items() if missing for path in paths]
if collect_ignore and os.environ.get("CI"):
    wanted = [name for missing in _MISSING.values() for name in missing]
    raise pytest.UsageError(f"all tests need {', '.join(wanted)}")


def pytest_report_header() -> list[str]:
    return [
        f"tests/{paths[0]} is left out: {', '.join(missing)} not installed"
        for paths, missing in _MISSING.items()
        if missing
    ]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    no_gpu = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(no_gpu)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Device:
    """The device that helpers/devices.py gives a test, whose library must be there."""
    name: Device = request.param
    library.require(name)
    return name


@pytest.fixture
def threads() -> Iterator[None]:
    """For tests that call torch.set_num_threads: the number of before comes back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
