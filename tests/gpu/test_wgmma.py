"""The kernels of deform_conv with wgmma on a GPU, against the reference and against mma.sync.

``make gpu-check`` runs it in a process of its own: a kernel that hangs must not take the other
tests with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.helpers.compare import relative_l2
from tests.helpers.deform_checks import assert_same_bits, bits, check
from tests.helpers.deform_work import WGMMA, Call, Convolution
from tests.helpers.training import HALF, deterministic

from .device import launched

pytestmark = [pytest.mark.gpu, pytest.mark.wgmma]

SETTING = "DYHEAD_CUDA_MMA"
LEVEL = Convolution(channels=256, out_channels=256, size=(100, 168), offset_scale=2)
CALLS = {
    **WGMMA,
    "a level": LEVEL,
    "a batch": replace(LEVEL, images=8, size=(25, 42)),
    "regions": replace(LEVEL, images=300, size=(7, 7)),
}
half = pytest.mark.parametrize("dtype", HALF, ids=lambda dtype: str(dtype)[6:])


@pytest.fixture(autouse=True)
def wgmma(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    monkeypatch.setenv(SETTING, "wgmma")
    yield
    torch.cuda.synchronize()


def forward(call: Call, tensors: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        return [x.detach() for x in call.run(tensors)]


@half
@pytest.mark.parametrize("name", CALLS)
def test_calls(name: str, dtype: torch.dtype) -> None:
    call = CALLS[name]
    tensors = call.tensors(dtype, "cuda")
    kernels = launched(lambda: forward(call, tensors))
    assert any("deform_fwd_wgmma" in kernel for kernel in kernels), kernels
    check(call, dtype, tensors)


@half
@pytest.mark.parametrize("name", CALLS)
def test_it_agrees_with_mma(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are the same, only the order of float32 sums differs."""
    call = CALLS[name]
    tensors = call.tensors(dtype, "cuda")
    found = forward(call, tensors)
    monkeypatch.setenv(SETTING, "mma")
    expected = forward(call, tensors)
    for a, b in zip(found, expected, strict=True):
        assert relative_l2(a, b) < torch.finfo(dtype).eps


@half
@pytest.mark.parametrize("name", ["a level", "a batch"])
def test_gradients_agree_with_mma(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls of so many tiles that they have 128 pixels."""
    call = CALLS[name]
    tensors = call.tensors(dtype, "cuda")
    found: list[list[torch.Tensor]] = []
    for setting in ("wgmma", "mma"):
        monkeypatch.setenv(SETTING, setting)
        kernels = launched(lambda: found.append(bits(call, tensors, dtype)))
        taken = any("deform_bwd_input_wgmma" in kernel for kernel in kernels)
        assert taken == (setting == "wgmma"), kernels
    for a, b in zip(*found, strict=True):
        assert relative_l2(a, b) < torch.finfo(dtype).eps


def test_every_run_has_the_same_bits() -> None:
    call = CALLS["a batch"]
    tensors = call.tensors(torch.bfloat16, "cuda")
    first = forward(call, tensors)
    for _ in range(20):
        assert_same_bits(forward(call, tensors), first)


def test_deterministic_gradients_have_the_same_bits() -> None:
    tensors = LEVEL.tensors(torch.bfloat16, "cuda")
    with deterministic():
        first = bits(LEVEL, tensors, torch.bfloat16)
        for _ in range(5):
            assert_same_bits(bits(LEVEL, tensors, torch.bfloat16), first)


def test_in_a_cuda_graph() -> None:
    call = LEVEL
    tensors = call.tensors(torch.bfloat16, "cuda")
    expected = forward(call, tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = forward(call, tensors)
    for _ in range(3):
        graph.replay()
        assert_same_bits(found, expected)
