"""What accelerate(model) leaves as it is, and what it says about it."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from dyhead_cuda import accelerate
from dyhead_cuda.compat.accelerate import AcceleratedDyConv
from tests.helpers.published import dyconv, glip, microsoft, mmdet, mmdet_glip, ultralytics
from tests.helpers.published_models import CHANNELS, assert_close, fused, glip_model, pyramid, run

# Each entry spoils one block; the second value is in the reason.
Spoil = Callable[[Any], Any]


def replace(path: str, make: Callable[[Any], nn.Module]) -> Spoil:
    def spoil(block: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        owner = block.get_submodule(parent)
        setattr(owner, name, make(getattr(owner, name)))

    return spoil


def assign(path: str, value: Any) -> Spoil:
    def spoil(block: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        setattr(block.get_submodule(parent), name, value)

    return spoil


def hook(block: nn.Module) -> None:
    block.get_submodule("DyConv.1.conv").register_forward_hook(lambda module, args, out: None)


def backward_hook(block: nn.Module) -> None:
    block.get_submodule("offset").register_full_backward_hook(lambda module, i, o: None)


def quantise(block: nn.Module) -> None:
    weight = block.get_parameter("offset.weight").to(torch.int8)
    block.get_submodule("offset").weight = nn.Parameter(weight, requires_grad=False)


class OtherConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


DYCONV_SPOILS: dict[str, tuple[Spoil, str]] = {
    "batch norm": (replace("DyConv.1.bn", lambda m: nn.BatchNorm2d(CHANNELS)), "BatchNorm2d"),
    "sync norm": (replace("DyConv.0.bn", lambda m: nn.SyncBatchNorm(CHANNELS)), "SyncBatchNorm"),
    "no norm": (assign("DyConv.2.bn", None), r"DyConv.2.bn is None"),
    "plain norm": (
        replace("DyConv.1.bn", lambda m: nn.GroupNorm(16, CHANNELS, affine=False)),
        "no weight",
    ),
    "eps": (assign("DyConv.1.bn.eps", 1e-3), "norms differ"),
    "groups of norm": (assign("DyConv.1.bn.num_groups", 8), "norms differ"),
    "plain conv": (
        replace("DyConv.0.conv", lambda m: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)),
        "not a modulated deformable convolution",
    ),
    "groups": (assign("DyConv.0.conv.groups", 2), "2 groups"),
    "deformable groups": (assign("DyConv.0.conv.deformable_groups", 4), "4 deformable groups"),
    "stride": (assign("DyConv.0.conv.stride", 2), "stride"),
    "padding": (assign("DyConv.0.conv.padding", 2), "padding"),
    "dilation": (assign("DyConv.1.conv.dilation", 2), "dilation"),
    "kernel": (
        replace("DyConv.1.conv", lambda m: dyconv.ModulatedDeformConv(32, 32, kernel_size=1)),
        r"kernel size \(1, 1\)",
    ),
    "no offset": (assign("offset", None), "offset is None"),
    "no gate": (assign("AttnConv", None), "AttnConv is None"),
    "no dynamic relu": (assign("relu", nn.ReLU()), "relu is a ReLU"),
    "offset bias": (assign("offset.bias", None), "offset is not a biased"),
    "offset dilation": (
        replace("offset", lambda m: nn.Conv2d(CHANNELS, 27, 3, padding=2, dilation=2)),
        "offset is not a biased 3x3",
    ),
    "offset channels": (
        replace("offset", lambda m: nn.Conv2d(CHANNELS, 18, 3, padding=1)),
        "offset_weight",
    ),
    "offset class": (
        replace("offset", lambda m: OtherConv(CHANNELS, 27, 3, padding=1)),
        "offset is a OtherConv",
    ),
    "lambda_a": (assign("relu.lambda_a", 1.0), "relu.lambda_a is 1.0"),
    "init_a": (assign("relu.init_a", [0.0, 1.0]), "relu.init_a"),
    "init_b": (assign("relu.init_b", [0.5, 0.0]), "relu.init_b"),
    "one line": (assign("relu.K2", False), "relu.K2"),
    "no bias": (assign("relu.use_bias", False), "relu.use_bias"),
    "spatial": (assign("relu.spa", nn.Conv2d(CHANNELS, 1, 1)), "relu.spa is a module"),
    "fc bias": (assign("relu.fc.0.bias", None), "relu.fc.0 has no bias"),
    "fc activation": (replace("relu.fc.1", lambda m: nn.GELU()), "relu.fc.1 is a GELU"),
    "fc gate": (replace("relu.fc.3", lambda m: nn.Sigmoid()), "relu.fc.3 is a Sigmoid"),
    "h_max": (assign("h_sigmoid.h_max", 2), "h_sigmoid"),
    "gate relu": (replace("AttnConv.2", lambda m: nn.Identity()), "AttnConv.2 is a Identity"),
    "gate pool": (replace("AttnConv.0", lambda m: nn.AdaptiveMaxPool2d(1)), "AttnConv.0"),
    "gate length": (assign("AttnConv", nn.Sequential(nn.Identity())), "Sequential of 3"),
    "extra layer": (assign("DyConv.0.dropout", nn.Dropout()), "DyConv.0 is not a Conv3x3Norm"),
    "hook": (hook, r"DyConv.1.conv has hooks"),
    "backward hook": (backward_hook, "offset has hooks"),
    "old weight norm": (
        lambda block: torch.nn.utils.spectral_norm(block.offset),
        "offset has hooks",
    ),
    "weight norm": (
        lambda block: torch.nn.utils.parametrizations.weight_norm(block.offset),
        "offset has parametrizations",
    ),
    "quantised": (quantise, "torch.int8"),
    "patched forward": (assign("forward", lambda x: x), "forward of the block was replaced"),
    "patched inside": (assign("offset.forward", lambda x: x), "forward of offset was replaced"),
    "compiled": (lambda block: block.compile(), "compiled"),
}


def assert_left(block: nn.Module, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    model, keys = nn.Sequential(block), list(block.state_dict())
    caplog.clear()
    assert accelerate(model) is model
    assert model[0] is block
    assert list(block.state_dict()) == keys
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.name == "dyhead_cuda"
    caplog_text = record.getMessage()
    assert f"left as it was: 0 ({type(block).__name__})" in caplog_text
    assert re.search(reason, caplog_text), caplog_text


@pytest.mark.parametrize(("spoil", "reason"), DYCONV_SPOILS.values(), ids=DYCONV_SPOILS)
def test_unsupported_dyconv_is_left(
    spoil: Spoil, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    block = microsoft.DyConv(CHANNELS, CHANNELS)
    spoil(block)
    assert_left(block, reason, caplog)


MMDET_SPOILS: dict[str, tuple[Spoil, str]] = {
    "batch norm": (
        replace("spatial_conv_low.norm", lambda m: nn.BatchNorm2d(CHANNELS)),
        "spatial_conv_low.norm is BatchNorm2d",
    ),
    "no norm": (
        replace("spatial_conv_low", lambda m: mmdet.DyDCNv2(32, 32, 2, with_norm=False)),
        "spatial_conv_low has no norm",
    ),
    "bias": (
        assign("spatial_conv_mid.conv.bias", nn.Parameter(torch.ones(CHANNELS))),
        "spatial_conv_mid.conv has a bias",
    ),
    "stride": (assign("spatial_conv_low.conv.stride", (2, 1)), r"stride \(2, 1\)"),
    "deformable groups": (assign("spatial_conv_high.conv.deform_groups", 2), "2 deformable"),
    "act_cfg": (assign("scale_attn_module.3.bias", 1.0), r"HSigmoid\(1.0, 6.0"),
    "act_cfg kind": (replace("scale_attn_module.3", lambda m: nn.Sigmoid()), "Sigmoid"),
    "task divisor": (assign("task_attn_module.conv2.activate.divisor", 2.0), "conv2.activate"),
    "task norm": (
        assign("task_attn_module.conv1.bn", nn.BatchNorm2d(CHANNELS // 4)),
        "not a ConvModule with conv and activate",
    ),
    "task kernel": (
        replace("task_attn_module.conv1.conv", lambda m: nn.Conv2d(32, 8, 3, padding=1)),
        "1x1",
    ),
}


@pytest.mark.parametrize(("spoil", "reason"), MMDET_SPOILS.values(), ids=MMDET_SPOILS)
def test_unsupported_dyheadblock_is_left(
    spoil: Spoil, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    block = mmdet.DyHeadBlock(CHANNELS, CHANNELS)
    spoil(block)
    assert_left(block, reason, caplog)


GLIP_SPOILS: dict[str, tuple[Spoil, str]] = {
    "no gate": (assign("attnconv", None), "attnconv is None"),
    "batch norm": (
        replace("dyconvs.2.bn", lambda m: nn.BatchNorm2d(CHANNELS)),
        r"dyconvs.2.bn is BatchNorm2d, not GroupNorm \(build the block with group normalisation\)",
    ),
    "plain conv": (
        replace("dyconvs.0.conv", lambda m: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)),
        "dyconvs.0.conv is a Conv2d",
    ),
    "gate": (assign("h_sigmoid", nn.Hardswish()), "h_sigmoid is a Hardswish"),
    "expansion": (assign("relu.expand_ratio", 2), "relu.expand_ratio is 2, not 4"),
    "plain relu": (assign("relu", nn.ReLU()), "relu is a ReLU, not a DyReLU"),
    "fc gate": (replace("relu.fc.3", lambda m: nn.Sigmoid()), "relu.fc.3 is a Sigmoid"),
    "no offset": (assign("offset", None), "offset is None"),
}


@pytest.mark.parametrize(("spoil", "reason"), GLIP_SPOILS.values(), ids=GLIP_SPOILS)
def test_unsupported_block_of_mmdets_glip_is_left(
    spoil: Spoil, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    block = mmdet_glip.DyConv(CHANNELS, CHANNELS)
    spoil(block)
    assert_left(block, reason, caplog)


YOLO_SPOILS: dict[str, tuple[Spoil, str]] = {
    "batch norm": (
        replace("spatial_conv_high.norm", lambda m: nn.BatchNorm2d(CHANNELS)),
        "spatial_conv_high.norm is BatchNorm2d",
    ),
    "one line": (assign("task_attn_module.K2", False), "task_attn_module.K2 is False"),
    "spatial": (
        assign("task_attn_module.spa", nn.Conv2d(CHANNELS, 1, 1)),
        "task_attn_module.spa is a module",
    ),
    "height": (assign("task_attn_module.fc.3.h_max", 2), "task_attn_module.fc.3 is a h_sigmoid"),
    "act_cfg": (replace("scale_attn_module.3", lambda m: nn.Sigmoid()), "Sigmoid"),
}


@pytest.mark.parametrize(("spoil", "reason"), YOLO_SPOILS.values(), ids=YOLO_SPOILS)
def test_unsupported_block_of_a_yolo_fork_is_left(
    spoil: Spoil, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    block = ultralytics.DyHeadBlock(CHANNELS)
    spoil(block)
    assert_left(block, reason, caplog)


@pytest.mark.parametrize("name", ["norm", "activation"])
def test_an_operator_with_more_than_the_convolution_is_left(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    block = microsoft.DyConv(CHANNELS, CHANNELS)
    setattr(block.get_submodule("DyConv.1.conv"), name, nn.ReLU())
    assert_left(block, f"DyConv.1.conv has a {name} of its own", caplog)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"norm": "bn"}, "BatchNorm2d"),
        ({"norm": None}, "bn is None"),
        ({"use_deform": False}, "offset is None"),
        ({"use_dyfuse": False}, "AttnConv is None"),
        ({"use_dyrelu": False}, "relu is a ReLU"),
    ],
)
def test_glip_without_its_switches_is_left(
    settings: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert_left(glip.DyConv(CHANNELS, CHANNELS, **settings), reason, caplog)


def test_microsoft_block_that_fails_in_forward_is_left(caplog: pytest.LogCaptureFixture) -> None:
    assert_left(microsoft.DyConv(48, CHANNELS), "structure differs: expected gate_weight", caplog)


def test_subclasses(caplog: pytest.LogCaptureFixture) -> None:
    class Named(microsoft.DyConv):
        """Keeps the forward."""

    class Changed(microsoft.DyConv):
        def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
            return {key: 2 * value for key, value in super().forward(x).items()}

    same = type("DyConv", (microsoft.DyConv,), {"forward": Changed.forward})
    assert isinstance(accelerate(Named(CHANNELS, CHANNELS)), AcceleratedDyConv)
    assert_left(Changed(CHANNELS, CHANNELS), "subclass Changed has a forward of its own", caplog)
    assert_left(same(CHANNELS, CHANNELS), "subclass DyConv has a forward of its own", caplog)


def test_a_compiled_block_is_left(caplog: pytest.LogCaptureFixture) -> None:
    block = microsoft.DyConv(CHANNELS, CHANNELS)
    model = nn.ModuleDict()
    model["block"] = cast(nn.Module, torch.compile(block, backend="eager"))
    accelerate(model)
    assert not fused(model)
    assert "call accelerate before torch.compile" in caplog.text


def test_only_the_unsupported_blocks_are_left(caplog: pytest.LogCaptureFixture) -> None:
    model, levels = glip_model(), pyramid()
    spoilt = model.get_submodule("dyhead_tower.1")
    spoilt.get_submodule("DyConv.1.conv").register_forward_hook(lambda module, args, out: 2 * out)
    expected = run(model, levels)
    with caplog.at_level(logging.INFO, "dyhead_cuda"):
        accelerate(model)
    assert model.get_submodule("dyhead_tower.1") is spoilt
    assert len(fused(model)) == 1
    assert_close(run(model, levels), expected)
    assert sorted(record.levelname for record in caplog.records) == ["INFO", "WARNING"]
