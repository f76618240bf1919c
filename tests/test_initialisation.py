"""Initialisation and parameters as the published code has them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dyhead_cuda import DyHead, DyHeadBlock, ModulatedDeformConv2d, UnifiedDyHead
from dyhead_cuda.modules import UnifiedDyHeadBlock

inits = pytest.mark.parametrize("init", ["microsoft", "mmdet"])

BLOCK_SHAPES = {
    "offset_conv.weight": (27, 256, 3, 3),
    "offset_conv.bias": (27,),
    **{
        f"{branch}.{name}": shape
        for branch in ("low", "mid", "high")
        for name, shape in {
            "weight": (256, 256, 3, 3),
            "bias": (256,),
            "norm.weight": (256,),
            "norm.bias": (256,),
        }.items()
    },
    "scale_gate.weight": (1, 256),
    "scale_gate.bias": (1,),
    "dynamic_relu.fc1.weight": (64, 256),
    "dynamic_relu.fc1.bias": (64,),
    "dynamic_relu.fc2.weight": (1024, 64),
    "dynamic_relu.fc2.bias": (1024,),
}


def assert_uniform(t: Tensor, bound: float) -> None:
    t = t.detach()
    assert t.numel() >= 27
    assert t.abs().max() <= bound
    if t.numel() > 1000:  # the largest of n values is about 1 / n below the bound
        assert float(t.abs().max()) > bound * (1 - 20 / t.numel())
    assert abs(float(t.mean())) < 4 * bound / math.sqrt(3 * t.numel())
    spread = float(t.std()) * math.sqrt(3) / bound
    assert spread == pytest.approx(1, abs=3 / math.sqrt(t.numel()))
    # A normal distribution of this spread would have a third of its values beyond 0.58 of it.
    assert float((t.abs() > bound / 2).double().mean()) == pytest.approx(
        0.5, abs=3 / math.sqrt(t.numel())
    )


def assert_normal(t: Tensor, deviation: float = 0.01) -> None:
    t = t.detach()
    few = 4 / math.sqrt(t.numel())
    assert float(t.mean()) == pytest.approx(0, abs=few * deviation)
    assert float(t.std()) == pytest.approx(deviation, rel=few)
    assert float((t.abs() > 2 * deviation).double().mean()) == pytest.approx(0.0455, abs=few)
    assert t.abs().max() > 2 * deviation  # 1.73 deviations is all that a uniform one has


@inits
def test_published_initialisation(init: Any) -> None:
    block = DyHeadBlock(256, 256, init=init)
    p = dict(block.named_parameters())
    for branch in ("low", "mid", "high"):
        assert_uniform(p[f"{branch}.weight"], 1 / math.sqrt(9 * 256))
        assert (p[f"{branch}.bias"] == 0).all()
        assert (p[f"{branch}.norm.weight"] == 1).all()
        assert (p[f"{branch}.norm.bias"] == 0).all()
    assert not torch.equal(p["low.weight"], p["mid.weight"])
    assert_normal(p["scale_gate.weight"])
    assert (p["scale_gate.bias"] == 0).all()
    if init == "microsoft":
        # PyTorch's default: uniform in +-1 / sqrt(fan in), weights and biases.
        assert_uniform(p["offset_conv.weight"], 1 / math.sqrt(9 * 256))
        assert_uniform(p["offset_conv.bias"], 1 / math.sqrt(9 * 256))
        for layer, fan_in in (("fc1", 256), ("fc2", 64)):
            assert_uniform(p[f"dynamic_relu.{layer}.weight"], 1 / math.sqrt(fan_in))
            assert_uniform(p[f"dynamic_relu.{layer}.bias"], 1 / math.sqrt(fan_in))
    else:
        assert (p["offset_conv.weight"] == 0).all()
        assert (p["offset_conv.bias"] == 0).all()
        for layer in ("fc1", "fc2"):
            assert_normal(p[f"dynamic_relu.{layer}.weight"])
            assert (p[f"dynamic_relu.{layer}.bias"] == 0).all()


def test_local_initialisation_starts_from_each_levels_own_values() -> None:
    torch.manual_seed(0)
    block = DyHeadBlock(64, 64, init="local")
    p = dict(block.named_parameters())
    for name in ("offset_conv.weight", "offset_conv.bias", "dynamic_relu.fc2.bias"):
        assert (p[name] == 0).all()
    for branch, weight in (("low", 1), ("mid", 5), ("high", 1)):
        assert (p[f"{branch}.norm.weight"] == weight).all()
    identity = torch.nn.init.dirac_(torch.empty(64, 64, 3, 3))
    assert_uniform((p["mid.weight"] - identity) / 0.3, 1 / math.sqrt(9 * 64))
    assert_uniform(p["low.weight"], 1 / math.sqrt(9 * 64))


@pytest.mark.parametrize(("init", "least", "most"), [("mmdet", 0.0, 0.3), ("local", 0.9, 1.0)])
def test_what_a_pixel_after_six_blocks_comes_from(init: Any, least: float, most: float) -> None:
    """The share of its gradient in the 5 x 5 pixels around it on its own level."""
    torch.manual_seed(0)
    head = DyHead(32, 32, 6, init=init, num_groups=8)
    levels = [torch.randn(2, 32, side, side, requires_grad=True) for side in (24, 12, 6, 3)]
    finest = head(levels)[0]
    assert isinstance(finest, Tensor)
    seen = torch.autograd.grad((finest[:, :, 12, 12] * torch.randn(32)).sum(), levels)
    energy = [g.square().sum((0, 1)) for g in seen]
    share = energy[0][10:15, 10:15].sum() / torch.stack([e.sum() for e in energy]).sum()
    assert least < float(share) < most


def test_deformable_weights_follow_their_input_channels() -> None:
    block = DyHeadBlock(64, 128)
    assert_uniform(block.mid.weight, 1 / math.sqrt(9 * 64))
    head = DyHead(64, 128, 2)
    assert_uniform(head.get_parameter("blocks.1.mid.weight"), 1 / math.sqrt(9 * 128))


def test_the_default_is_microsofts() -> None:
    torch.manual_seed(1)
    default = DyHead(16, 16, 1)
    torch.manual_seed(1)
    named = DyHead(16, 16, 1, init="microsoft", high_offset="flat", deform_bias=True)
    for a, b in zip(default.parameters(), named.parameters(), strict=True):
        assert torch.equal(a, b)
    block = default.blocks[0]
    assert isinstance(block, DyHeadBlock)
    assert (block.high_offset, block.num_groups, block.eps) == ("flat", 16, 1e-5)


@inits
def test_initialisation_of_deformable_convolution(init: Any) -> None:
    module = ModulatedDeformConv2d(32, 48, 3, groups=2)
    assert_uniform(module.weight, 1 / math.sqrt(9 * 16))
    assert module.bias is not None
    assert (module.bias == 0).all()
    with torch.no_grad():
        module.weight.fill_(7)
        module.bias.fill_(7)
    module.reset_parameters()
    assert_uniform(module.weight, 1 / math.sqrt(9 * 16))
    assert (module.bias == 0).all()


def test_initialisation_of_the_unified_head() -> None:
    block = UnifiedDyHead(levels=5, channels=64, num_blocks=1).blocks[0]
    assert isinstance(block, UnifiedDyHeadBlock)
    for weight in block.spatial_weight:
        assert_uniform(weight, 1 / math.sqrt(9 * 64))


@pytest.mark.parametrize(("bias", "count"), [(True, 1_917_276), (False, 1_916_508)])
def test_parameters_of_the_published_size(bias: bool, count: int) -> None:
    block = DyHeadBlock(deform_bias=bias)
    shapes = {name: tuple(p.shape) for name, p in block.named_parameters()}
    deform_biases = {f"{branch}.bias" for branch in ("low", "mid", "high")}
    assert shapes == {k: v for k, v in BLOCK_SHAPES.items() if bias or k not in deform_biases}
    assert sum(p.numel() for p in block.parameters()) == count
    assert list(block.buffers()) == []
    assert all(p.requires_grad for p in block.parameters())


def test_names_and_count_of_a_head() -> None:
    head = DyHead(num_blocks=2)
    assert set(head.state_dict()) == {
        f"blocks.{i}.{name}" for i in range(2) for name in BLOCK_SHAPES
    }
    assert len(DyHead(16, 16).blocks) == 6
