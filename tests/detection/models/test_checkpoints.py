"""Published checkpoints, synthetic ones with their names, against plain evaluations of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet18, resnet50

from dyhead_cuda.detection.models.atss import ATSS
from dyhead_cuda.detection.models.checkpoints import atss_from_microsoft, atss_from_mmdet
from dyhead_cuda.detection.models.recipes import (
    MICROSOFT_R50,
    MICROSOFT_SWINT,
    MMDET_R50,
    MMDET_R50_CAFFE,
    MMDET_SWINL,
    Recipe,
)
from tests.helpers.compare import relative_l2
from tests.helpers.detection.published_detectors import (
    CLASSES,
    DETECTRON,
    MMDET,
    WIDTH,
    State,
    detectron_resnet,
    microsoft_state,
    mmdet_resnet,
    mmdet_state,
    run_microsoft,
    run_mmdet,
    swin,
)


def prepared(image: Tensor, recipe: Recipe) -> Tensor:
    """The network's input of the public code: pixels of 0..255 in its order, padded by zeros."""
    pixels = image.flip(0) * 255 if recipe.channels == "bgr" else image * 255
    mean, std = (
        torch.tensor(v, dtype=torch.float64)[:, None, None]
        for v in (recipe.pixel_mean, recipe.pixel_std)
    )
    height, width = (-size % recipe.size_divisible for size in image.shape[1:])
    return F.pad((pixels - mean) / std, (0, width, 0, height))[None]


def random_image(height: int = 90, width: int = 120) -> Tensor:
    return torch.rand(3, height, width, dtype=torch.float64)


def predictions(model: ATSS, image: Tensor) -> list[Tensor]:
    batch, _ = model.double().transform([image])
    levels = list(model.backbone(batch.tensors).values())
    logits, deltas, centerness = (torch.cat(part, 1)[0] for part in model.head(levels))
    return [logits, deltas, centerness[:, None]]


def assert_same(model: ATSS, image: Tensor, expected: list[Tensor]) -> None:
    other = predictions(model, image.flip(0))
    for found, wanted, changed in zip(predictions(model, image), expected, other, strict=True):
        assert relative_l2(changed, wanted) > 0.02  # the image matters, and its colours
        assert relative_l2(found, wanted) < 1e-6


def unresized(recipe: Recipe, height: int = 90, width: int = 120) -> Recipe:
    """Keeps an image of that size: its longer side must not grow."""
    return replace(recipe, min_size=height + 9, max_size=width)


@pytest.fixture(scope="module")
def mmdet_r18() -> State:
    torch.manual_seed(1)
    return mmdet_state(mmdet_resnet(resnet18), 512)


@pytest.fixture(scope="module")
def microsoft_r50() -> State:
    torch.manual_seed(2)
    return microsoft_state(detectron_resnet(), (512, 1024, 2048))


@torch.no_grad()
def test_mmdet(mmdet_r18: State) -> None:
    recipe = unresized(MMDET_R50)
    model = atss_from_mmdet(mmdet_r18, recipe=recipe)
    image = random_image()
    assert_same(model, image, run_mmdet(mmdet_r18, prepared(image, recipe), recipe))
    assert (model.postprocess, model.num_classes) == ("mmdet", CLASSES)
    assert model.anchors.center_offset == 0
    assert {"boxes", "scores", "labels"} == set(model([image])[0])


@torch.no_grad()
@pytest.mark.parametrize("recipe", [MMDET_R50, MMDET_R50_CAFFE])
def test_mmdet_resnet50_in_both_styles(recipe: Recipe) -> None:
    state = mmdet_state(mmdet_resnet(resnet50), 2048, recipe.kernel_size)
    recipe = unresized(recipe)
    model = atss_from_mmdet({"state_dict": state, "meta": {}}, recipe=recipe)
    image = random_image()
    assert_same(model, image, run_mmdet(state, prepared(image, recipe), recipe))


@torch.no_grad()
def test_mmdet_swin() -> None:
    state = mmdet_state(swin(MMDET, 4), WIDTH << 3, 1)
    image = random_image(140, 180)  # 256 x 256 padded: 8 x 8 positions of the coarsest map
    recipe = unresized(MMDET_SWINL, 140, 180)
    model = atss_from_mmdet(state, recipe=recipe)
    assert_same(model, image, run_mmdet(state, prepared(image, recipe), recipe))
    assert (MMDET_SWINL.min_size, model.anchors.center_offset) == (1200, 0.5)


@torch.no_grad()
def test_microsoft(microsoft_r50: State) -> None:
    recipe = unresized(MICROSOFT_R50)
    as_saved = {"model": {key: value.numpy() for key, value in microsoft_r50.items()}}
    model = atss_from_microsoft(as_saved, recipe=recipe)
    image = random_image()
    assert_same(model, image, run_microsoft(microsoft_r50, prepared(image, recipe), swin=False))
    assert (model.anchors.center_offset, model.postprocess) == (0.5, "microsoft")
    assert model.transform.min_size == (recipe.min_size,)


@torch.no_grad()
def test_microsoft_swin() -> None:
    state = microsoft_state(swin(DETECTRON, 7), (2 * WIDTH, 4 * WIDTH, 8 * WIDTH))
    recipe = unresized(MICROSOFT_SWINT, 150, 300)
    model = atss_from_microsoft(state, recipe=recipe)
    image = random_image(150, 300)  # 256 x 384 padded: 8 x 12 positions of the coarsest map
    assert_same(model, image, run_microsoft(state, prepared(image, recipe), swin=True))


def test_nothing_is_shared_and_norms_are_frozen(mmdet_r18: State) -> None:
    before = {key: value.clone() for key, value in mmdet_r18.items()}
    model = atss_from_mmdet(mmdet_r18, recipe=unresized(MMDET_R50))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert all(torch.equal(value, before[key]) for key, value in mmdet_r18.items())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert not model.training


REMOVED = [
    "backbone.layer3.1.bn2.running_var",
    "neck.0.fpn_convs.4.conv.bias",
    "neck.1.dyhead_blocks.1.spatial_conv_low.norm.weight",
    "bbox_head.atss_reg.weight",
    "bbox_head.scales.2.scale",
]


@pytest.mark.parametrize("key", REMOVED)
def test_missing_key(mmdet_r18: State, key: str) -> None:
    state = {k: v for k, v in mmdet_r18.items() if k != key}
    part = key.removeprefix("neck.1.dyhead_blocks.1.")
    with pytest.raises(ValueError, match=rf"(missing|without).*{part}"):
        atss_from_mmdet(state)


ADDED = [
    "backbone.layer1.0.conv9.weight",
    "neck.0.fpn_convs.5.conv.weight",
    "neck.1.dyhead_blocks.0.strange.weight",
    "bbox_head.cls_convs.0.conv.weight",
]


@pytest.mark.parametrize("key", ADDED)
def test_unexpected_key(mmdet_r18: State, key: str) -> None:
    with pytest.raises(ValueError, match=f"missing: none; unexpected: {key}"):
        atss_from_mmdet(mmdet_r18 | {key: torch.zeros(1)})


def test_microsoft_keys_are_counted(microsoft_r50: State) -> None:
    gone, strange = "backbone.backbone.top_block.p7.bias", "proposal_generator.weight"
    state = {k: v for k, v in microsoft_r50.items() if k != gone} | {strange: torch.zeros(1)}
    with pytest.raises(ValueError, match=f"missing: {gone}; unexpected: {strange}"):
        atss_from_microsoft(state)


def test_shapes_are_checked(mmdet_r18: State) -> None:
    key = "neck.0.lateral_convs.1.conv.weight"
    with pytest.raises(
        ValueError, match=rf"{key}: expected \[32, 256, 1, 1\], got \[32, 7, 1, 1\]"
    ):
        atss_from_mmdet(mmdet_r18 | {key: torch.zeros(32, 7, 1, 1)})
    with pytest.raises(ValueError, match=r"all scales: expected \[5\], got \[6\]"):
        atss_from_mmdet(mmdet_r18 | {"bbox_head.scales.0.scale": torch.ones(2)})


def test_wrong_recipe_or_code_base(mmdet_r18: State, microsoft_r50: State) -> None:
    with pytest.raises(ValueError, match="predictors of size 1 for this recipe, got 3"):
        atss_from_mmdet(mmdet_r18, recipe=MMDET_R50_CAFFE)
    with pytest.raises(ValueError, match="expected a swin backbone"):
        atss_from_microsoft(microsoft_r50, recipe=MICROSOFT_SWINT)
    with pytest.raises(ValueError, match="from_mmdet"):
        atss_from_microsoft(mmdet_r18)
    with pytest.raises(ValueError, match="version"):
        atss_from_mmdet(mmdet_r18, version="1.0")
    with pytest.raises(TypeError, match="state dict"):
        atss_from_mmdet([])  # type: ignore[arg-type]


def test_unknown_backbones(mmdet_r18: State) -> None:
    short = {k: v for k, v in mmdet_r18.items() if not k.startswith("backbone.layer4.1")}
    with pytest.raises(ValueError, match=r"got \(2, 2, 2, 1, 2\)"):
        atss_from_mmdet(short)
    state = mmdet_state(swin(MMDET, 4), WIDTH << 3, 1)
    short = {k: v for k, v in state.items() if not k.startswith("backbone.stages.3")}
    with pytest.raises(ValueError, match="four stages"):
        atss_from_mmdet(short, recipe=MMDET_SWINL)


def test_a_recipe_with_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"family to be one of \('resnet', 'swin'\), got 'resent'"):
        Recipe("resent", 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"channels to be one of \('rgb', 'bgr'\), got 'BGR'"):
        Recipe("resnet", 3, channels="BGR")  # type: ignore[arg-type]
