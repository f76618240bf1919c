"""What is attached inside a block after it was accelerated acts, as it did before."""

from __future__ import annotations

import copy
import io
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm

from dyhead_cuda import accelerate
from dyhead_cuda.compat import inner
from dyhead_cuda.compat.accelerate import AcceleratedBlock
from tests.helpers.published_models import (
    MODELS,
    assert_close,
    fused,
    main_model,
    pyramid,
    run,
)

each_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def pair(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """The same model twice, the second one accelerated."""
    model = make()
    return model, accelerate(copy.deepcopy(model))


def first(model: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """The first module of a kind inside the first block, by the path that it has there."""
    block = next(m for m in model.modules() if type(m).__name__ in BLOCKS)
    return next(m for m in block.modules() if isinstance(m, kind))


BLOCKS = (
    *("DyConv", "DyHeadBlock"),
    *("AcceleratedDyConv", "AcceleratedMMDetDyConv"),
    *("AcceleratedDyHeadBlock", "AcceleratedYoloDyHeadBlock"),
)


class LowRank(nn.Module):
    """An adapter around a layer, as LoRA has it."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer
        generator = torch.Generator().manual_seed(3)
        shape = (layer.out_channels, layer.in_channels, *layer.kernel_size)
        self.change = nn.Parameter(0.1 * torch.randn(shape, generator=generator).double())

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + nn.functional.conv2d(x, self.change, None, 1, self.layer.padding)


def replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in model.modules():
        for name, child in parent.named_children():
            if child is old and parent is not new:
                setattr(parent, name, new)


@each_model
def test_hooks_fire_and_act(
    make: Callable[[], nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    models = pair(make)
    calls: list[nn.Module] = []

    def halve(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        calls.append(module)
        return output / 2

    for model in models:
        first(model, nn.GroupNorm).register_forward_hook(halve)
    with caplog.at_level(logging.WARNING, "dyhead_cuda"):
        own = run(models[0], pyramid())
        expected_calls = len(calls)
        found = run(models[1], pyramid())
    assert_close(found, own)
    assert len(calls) == 2 * expected_calls > 0
    assert "is not fused and runs its own forward" in caplog.text
    assert "has hooks" in caplog.text


@each_model
def test_adapters_act_and_learn(make: Callable[[], nn.Module]) -> None:
    own, fast = pair(make)
    adapters = []
    for model in (own, fast):
        layer = first(model, nn.Conv2d)
        assert isinstance(layer, nn.Conv2d)
        adapters.append(LowRank(layer))
        replace(model, layer, adapters[-1])
    assert_close(run(fast, pyramid()), run(own, pyramid()))
    for model in (own, fast):
        sum(out.square().sum() for out in run(model, pyramid())).backward()  # type: ignore[union-attr]
    assert adapters[0].change.grad is not None
    found, expected = adapters[1].change.grad, adapters[0].change.grad
    assert found is not None
    if (
        make is main_model
    ):  # the fused block after it has the true gradient, which that code has not
        assert found.abs().max() > 0
    else:
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


@each_model
def test_a_replaced_layer_is_used(make: Callable[[], nn.Module]) -> None:
    own, fast = pair(make)
    for model in (own, fast):
        layer = first(model, nn.Conv2d)
        assert isinstance(layer, nn.Conv2d)
        new = copy.deepcopy(layer)
        with torch.no_grad():
            new.weight.mul_(2)
        replace(model, layer, new)
    before = run(accelerate(make()), pyramid())
    found = run(fast, pyramid())
    assert_close(found, run(own, pyramid()))
    assert not torch.allclose(found[0], before[0])
    assert all(block._inner for block in fused(fast))


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.GroupNorm])
def test_pruning_trains(kind: type[nn.Module]) -> None:
    own, fast = pair(MODELS["mmdet"])
    for model in (own, fast):
        prune.random_unstructured(first(model, kind), "weight", 0.5)
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            sum(out.square().mean() for out in run(model, pyramid())).backward()  # type: ignore[union-attr]
            optimizer.step()
    # The masks are random, so only that both train is compared.
    assert all(torch.isfinite(out).all() for out in run(fast, pyramid()))


def test_the_old_spectral_norm_is_live() -> None:
    torch.manual_seed(0)
    own, fast = pair(MODELS["mmdet"])
    for model in (own, fast):
        torch.manual_seed(1)
        spectral_norm(first(model, nn.Conv2d))
    for _ in range(3):
        assert_close(run(fast, pyramid()), run(own, pyramid()))


def test_parametrizations_stay_fused_and_live(caplog: pytest.LogCaptureFixture) -> None:
    own, fast = pair(MODELS["mmdet"])
    for model in (own, fast):
        parametrizations.weight_norm(first(model, nn.Conv2d))
        with torch.no_grad():
            first(model, nn.Conv2d).parametrizations.weight.original0.mul_(1.5)  # type: ignore[union-attr, operator]
    with caplog.at_level(logging.WARNING, "dyhead_cuda"):
        assert_close(run(fast, pyramid()), run(own, pyramid()))
    assert "not fused" not in caplog.text


def test_copies_and_files_keep_what_was_attached() -> None:
    own, fast = pair(MODELS["mmdet"])
    for model in (own, fast):
        layer = first(model, nn.Conv2d)
        assert isinstance(layer, nn.Conv2d)
        replace(model, layer, LowRank(layer))
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    expected = run(own, pyramid())
    for again in (copy.deepcopy(fast), torch.load(file, weights_only=False)):
        assert any(isinstance(m, AcceleratedBlock) for m in again.modules())
        assert_close(run(again, pyramid()), expected)


def test_taking_it_off_fuses_the_block_again(caplog: pytest.LogCaptureFixture) -> None:
    own, fast = pair(MODELS["microsoft"])
    handle = first(fast, nn.GroupNorm).register_forward_hook(lambda *_: None)
    run(fast, pyramid())
    handle.remove()
    assert_close(run(fast, pyramid()), run(own, pyramid()))
    for block in fused(fast):
        assert inner.why_changed(block, block._inner) is None
