"""The published code's own numbers, forward and backward, through every way into this package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dyhead_cuda
from dyhead_cuda.backends import Backend
from tests.helpers import fixtures
from tests.helpers.fixtures import Array, Fixture

# The backend, and the device that it runs on.
BACKENDS = [
    ("reference", "cpu"),
    ("auto", "cpu"),
    pytest.param("cuda", "cuda", marks=pytest.mark.gpu),
]
backends = pytest.mark.parametrize(("name", "device"), BACKENDS)
DIGEST_TOLERANCE = 1e-10
FLOAT32_FACTOR = 10
FLOAT32_OUTPUT_L2 = 1e-5


@pytest.fixture(params=fixtures.paths(), ids=lambda path: f"{path.parent.name}/{path.stem}")
def fixture(request: pytest.FixtureRequest) -> Fixture:
    path: Path = request.param
    return fixtures.load(path)


def results(fixture: Fixture, outs: list[Tensor], grads: list[Tensor]) -> dict[str, Array]:
    """Outputs and input gradients by their keys in the fixture."""
    named = {f"out.{level}": out for level, out in enumerate(outs)}
    if not fixture.crops:
        named |= {f"grad_in.{level}": grad for level, grad in enumerate(grads)}
    return {key: value.double().cpu().numpy() for key, value in named.items()}


def parameter_results(
    fixture: Fixture, gradients: dict[str, Tensor | None], but: tuple[str, ...] = ()
) -> dict[str, Array]:
    """Parameter gradients by their keys; checks that unused parameters have none."""
    for key in fixture.meta["unused_params"]:
        gradient = gradients[key]
        assert gradient is None or not gradient.any(), key
    offset = "spatial_conv_offset" if fixture.crops else None
    found = {}
    for key, grad in gradients.items():
        if grad is not None and offset not in key.split(".") and not set(but) & set(key.split(".")):
            found[f"grad_param.{key}"] = grad.double().cpu().numpy()
    return found


def expected_keys(fixture: Fixture) -> set[str]:
    """Every key of the fixture that is a target."""
    unused = {f"grad_param.{key}" for key in fixture.meta["unused_params"]}
    keys = {key for key in fixture.arrays if key.split(".")[0] in ("out", "grad_in", "grad_param")}
    if fixture.crops:
        keys = {k for k in keys if not k.startswith("grad_in.") and "spatial_conv_offset" not in k}
    return keys - unused


def check_double(fixture: Fixture, found: dict[str, Array]) -> None:
    """Element by element, and by the digest of the full-precision tensors."""
    relative = 2 * fixture.meta["rel_rounding"] + 1e-10
    for key, value in found.items():
        expected = fixture.arrays[key]
        assert value.shape == expected.shape, key
        error = np.abs(value - expected).max()
        assert error <= relative * np.abs(expected).max(), (key, error)
        total, squares = map(float, fixture.meta["digest"][key])
        # A sum that cancels is known only up to what its terms are known.
        scale = max(abs(total), np.sqrt(value.size * squares))
        assert abs(value.sum() - total) <= DIGEST_TOLERANCE * scale, key
        assert abs((value**2).sum() - squares) <= DIGEST_TOLERANCE * squares, key


def check_single(fixture: Fixture, found: dict[str, Array]) -> None:
    """Within ten times what float32 costs the published code itself, per kind of tensor."""
    costs = fixture.meta["float32_run_of_the_real_code_max_rel"]
    for key, value in found.items():
        expected = fixture.arrays[key]
        error = np.abs(value - expected).max()
        limit = FLOAT32_FACTOR * costs[key.split(".")[0]] * np.abs(expected).max()
        assert error <= limit, (key, error, limit)
        if key.startswith("out."):
            difference = np.linalg.norm(value - expected) / np.linalg.norm(expected)
            assert difference <= FLOAT32_OUTPUT_L2, (key, difference)


CHECKS: dict[torch.dtype, Callable[[Fixture, dict[str, Array]], None]] = {
    torch.float64: check_double,
    torch.float32: check_single,
}


def gradients_of(model: nn.Module) -> dict[str, Tensor | None]:
    return {key: parameter.grad for key, parameter in model.named_parameters()}


@pytest.mark.parametrize("dtype", CHECKS, ids=str)
@backends
def test_converted_head(fixture: Fixture, name: Backend, device: str, dtype: torch.dtype) -> None:
    head = fixture.head(dtype).to(device)
    with dyhead_cuda.backend(name):
        found = results(fixture, *fixture.run(head, dtype, device))
    found |= parameter_results(fixture, fixture.head_gradients(head))
    assert set(found) >= expected_keys(fixture)
    CHECKS[dtype](fixture, found)


@pytest.mark.parametrize("dtype", CHECKS, ids=str)
@backends
def test_accelerated_model(
    fixture: Fixture, name: Backend, device: str, dtype: torch.dtype
) -> None:
    model = fixture.published(dtype).to(device)
    assert dyhead_cuda.accelerate(model) is model
    assert "Accelerated" in repr(model)
    with dyhead_cuda.backend(name):
        found = results(fixture, *fixture.run(model, dtype, device))
    found |= parameter_results(fixture, gradients_of(model))
    assert set(found) >= expected_keys(fixture)
    CHECKS[dtype](fixture, found)


def test_stand_in_computes_the_published_numbers(fixture: Fixture) -> None:
    """What the other tests accelerate is the published computation, so they compare with it."""
    model = fixture.published(torch.float64)
    outs, grads = fixture.run(model, torch.float64)
    # torchvision's offset gradient is one-sided at coordinate -1, where zero offsets put samples.
    but = ("spatial_conv_offset",) if "zero_offset" in fixture.meta["case"] else ()
    found = results(fixture, outs, grads)
    found |= parameter_results(fixture, gradients_of(model), but)
    if but:
        found = {key: value for key, value in found.items() if not key.startswith("grad_in")}
    check_double(fixture, found)


def test_converting_back_gives_the_fixture(fixture: Fixture) -> None:
    head = fixture.head(torch.float64)
    to = {"microsoft": dyhead_cuda.compat.to_microsoft, "mmdet": dyhead_cuda.compat.to_mmdet}
    back = to[fixture.code_base.key](head)
    expected = fixture.state_dict(torch.float64)
    assert list(back) == list(fixture.published(torch.float64).state_dict())
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[key], expected[key]) for key in expected)
