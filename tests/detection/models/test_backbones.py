"""Pyramids of every family of backbones: levels, strides, gradients, and torchvision's numbers."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from dyhead_cuda.detection.models.backbones import ExtraLevels, Pyramid
from dyhead_cuda.detection.names import Extra
from dyhead_cuda.modules import Attention

TIMM_RESNET = "timm/test_resnet.r160_in1k"


def images(count: int = 2, height: int = 64, width: int = 96) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("backbone", "first", "last"),
    [
        ("resnet18", 2, 5),
        ("resnet18", 3, 7),
        ("resnet18", 3, 4),
        ("resnet18", 4, 4),
        ("resnet50", 5, 6),
        ("swin_t", 2, 3),
        ("swin_v2_t", 3, 6),
        (TIMM_RESNET, 2, 6),
        ("timm/test_mambaout", 3, 6),  # its maps are [N, H, W, C]
        ("timm/swin_tiny_patch4_window7_224", 4, 5),
        ("timm/test_vit", 4, 6),  # three features of the same stride
    ],
)
def test_levels_have_their_strides_and_train(backbone: str, first: int, last: int) -> None:
    torch.manual_seed(0)
    blocks = int(first < last)  # a single level has no neighbours for a head to look at
    pyramid = Pyramid(backbone, first_level=first, last_level=last, channels=16, blocks=blocks)
    assert pyramid.levels == tuple(range(first, last + 1))
    assert pyramid.strides == tuple(2**level for level in pyramid.levels)
    assert (pyramid.num_levels, pyramid.out_channels) == (len(pyramid.strides), 16)
    levels = pyramid(images())
    assert list(levels) == [str(i) for i in range(len(pyramid.strides))]
    for level, stride in zip(levels.values(), pyramid.strides, strict=True):
        assert level.shape == (2, 16, -(-64 // stride), -(-96 // stride))
    sum(level.square().mean() for level in levels.values()).backward()
    assert [name for name, p in pyramid.named_parameters() if p.grad is None] == []


def test_stages_end_where_they_should() -> None:
    # What follows a Swin stage, patch merging, has the stride of the next one, too.
    swin: Any = Pyramid("swin_t", first_level=2, last_level=3, channels=16, blocks=0)
    assert list(swin.body.stages) == ["0", "1", "2", "3"]
    resnet: Any = Pyramid("resnet18", first_level=2, last_level=3, channels=16, blocks=0)
    assert list(resnet.body)[-1] == "layer2"


def test_same_numbers_as_torchvision() -> None:
    theirs = resnet_fpn_backbone(
        backbone_name="resnet18",
        weights=None,
        norm_layer=nn.BatchNorm2d,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    ).eval()
    ours = Pyramid("resnet18", blocks=0, extra="conv_relu").eval()
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        for ours_level, level in zip(
            ours(images()).values(), theirs(images()).values(), strict=True
        ):
            torch.testing.assert_close(ours_level, level)


@pytest.mark.parametrize("extra", ["conv", "conv_relu", "pool"])
def test_levels_beyond_the_backbone(extra: Extra) -> None:
    torch.manual_seed(0)
    pyramid: Any = Pyramid("resnet18", channels=16, blocks=0, extra=extra)
    with torch.no_grad():
        p5, p6, p7 = list(pyramid(images()).values())[2:]
        if extra == "pool":
            assert torch.equal(p6, p5[:, :, ::2, ::2])
            assert torch.equal(p7, p6[:, :, ::2, ::2])
            return
        blocks = pyramid.fpn.extra_blocks
        torch.testing.assert_close(p6, blocks.p6(p5))
        torch.testing.assert_close(p7, blocks.p7(p6.relu() if extra == "conv_relu" else p6))
        assert (p6 < 0).any()


def test_head_is_on_the_pyramid() -> None:
    torch.manual_seed(0)
    chosen: tuple[Attention, ...] = ("scale",)
    pyramid: Any = Pyramid(
        "resnet18", channels=16, blocks=2, attentions=chosen, high_offset="crop"
    ).eval()
    assert [block.attentions for block in pyramid.dyhead.blocks] == [chosen] * 2
    assert pyramid.dyhead.blocks[0].high_offset == "crop"
    with torch.no_grad():
        found = pyramid(images())
        head, pyramid.dyhead = pyramid.dyhead, None
        expected = head(pyramid(images()))
    for name, level in found.items():
        torch.testing.assert_close(level, expected[name])


@pytest.mark.parametrize(
    ("backbone", "weights"), [("resnet18", "DEFAULT"), (TIMM_RESNET, "pretrained")]
)
def test_statistics_of_pretrained_networks_stay(
    backbone: str, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_download(*arguments: Any, **options: Any) -> None:
        raise AssertionError("downloads")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_download)
    monkeypatch.setattr("socket.socket.connect", no_download)
    for given, frozen in ((None, False), (weights, True)):
        pyramid = Pyramid(backbone, weights=given, channels=16, blocks=0, load_weights=False)
        before = {name: x.clone() for name, x in pyramid.body.named_buffers()}
        pyramid.train()(images())
        after = dict(pyramid.body.named_buffers())
        same = [torch.equal(x, after[name]) for name, x in before.items()]
        assert same
        assert all(same) if frozen else not any(same)
    if backbone == "resnet18":
        assert any(isinstance(module, FrozenBatchNorm2d) for module in pyramid.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "resnet17"}, "resnet18.*timm/NAME.*got 'resnet17'"),
        ({"backbone": "vgg11"}, "got 'vgg11'"),
        ({"backbone": "timm/nothing_there"}, "timm model.*'nothing_there'"),
        ({"weights": "pretrained"}, r"None or one of \['DEFAULT', 'IMAGENET1K_V1'\]"),
        ({"backbone": TIMM_RESNET, "weights": "DEFAULT"}, 'None or "pretrained"'),
        ({"first_level": 1}, "first_level from 2"),
        ({"last_level": 8}, "last_level from 2 .* to 7"),
        ({"first_level": 5, "last_level": 4}, "would be empty"),
        ({"first_level": 6}, r"\[2, 3, 4, 5\].*need \[6\]"),
        ({"backbone": "timm/test_vit"}, r"has, \[4\].*need \[3\]"),
        ({"channels": 20}, "divisible by num_groups, got 20 channels and 16 groups"),
        ({"channels": 0}, "channels"),
        ({"blocks": -1}, "blocks.*at least 0, got -1"),
        ({"extra": "none"}, "extra"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pyramid(**{"backbone": "resnet18", "channels": 16, "blocks": 1, **options})


def test_timm_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    Pyramid("resnet18", channels=16, blocks=0)
    with pytest.raises(ImportError, match="pip install timm"):
        Pyramid(TIMM_RESNET, channels=16, blocks=0)


def test_unknown_extra_levels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"extra to be one of .*'pool'.*, got 'pooling'"):
        ExtraLevels(8, [6], "pooling")  # type: ignore[arg-type]
