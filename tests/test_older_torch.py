"""What older releases of torch lack: under them, and with a newer one that is made to lack it."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch.utils import checkpoint

import dyhead_cuda
from dyhead_cuda import backends, older_torch, recompute
from dyhead_cuda.version import MINIMUM_TORCH


def test_versions_are_read_from_what_torch_says() -> None:
    assert older_torch.minor("2.10.0a0+git1234") == (2, 10) > older_torch.minor("2.9.1+cu128")
    assert older_torch.FOUND >= MINIMUM_TORCH


def test_what_needs_a_newer_torch_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    older_torch.require("this", older_torch.FOUND)
    with pytest.raises(RuntimeError, match=r"this needs torch >= 9\.1, found 2"):
        older_torch.require("this", (9, 1))
    monkeypatch.setattr(older_torch, "FOUND", (2, 6))
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with pytest.raises(RuntimeError, match=r"torch\.onnx\.export .* needs torch >= 2\.7, found"):
        backends.select(torch.empty(0))


def test_an_export_cannot_be_told_without_is_exporting(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not older_torch.is_exporting()
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True, raising=False)
    assert older_torch.is_exporting()
    monkeypatch.delattr(torch.compiler, "is_exporting")
    assert not older_torch.is_exporting()


@pytest.mark.parametrize("version", [older_torch.FOUND, (2, 8)])
def test_the_switch_of_tf32(monkeypatch: pytest.MonkeyPatch, version: tuple[int, int]) -> None:
    monkeypatch.setattr(older_torch, "FOUND", version)
    before = older_torch.tf32_allowed()
    with older_torch.tf32(True):
        assert older_torch.tf32_allowed()
        with older_torch.tf32(False):
            assert not older_torch.tf32_allowed()
        assert older_torch.tf32_allowed()
    assert older_torch.tf32_allowed() == before


def test_recomputation_without_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(checkpoint, "CheckpointPolicy", raising=False)
    try:
        importlib.reload(recompute)
        assert recompute._KEEP_THE_LAST == {}
    finally:
        monkeypatch.undo()
        importlib.reload(recompute)


def test_a_compiled_head_that_recomputes() -> None:
    torch.manual_seed(0)
    head = dyhead_cuda.DyHead(16, 16, num_blocks=2, num_groups=4, recompute=True)
    features = [torch.randn(1, 16, size, size) for size in (12, 6)]
    found = []
    for model in (head, torch.compile(head, backend="aot_eager")):
        outputs = model(features)
        loss = sum(level.square().mean() for level in outputs)
        found.append([*outputs, *torch.autograd.grad(loss, list(head.parameters()))])
    torch._dynamo.reset()
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected)
