"""Published checkpoints, synthetic ones with their names, against plain evaluations of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet18, resnet50

from dyhead_cuda.detection.atss import ATSS
from dyhead_cuda.detection.checkpoints import (
    MICROSOFT_R50,
    MICROSOFT_SWINT,
    MMDET_R50,
    MMDET_R50_CAFFE,
    Recipe,
    atss_from_microsoft,
    atss_from_mmdet,
)
from tests.conftest import relative_l2
from tests.published import microsoft, mmdet

CHANNELS, CLASSES = 32, 3
State = dict[str, Tensor]


def fill(shapes: dict[str, Any]) -> State:
    """Random values; statistics and norms around 1 so that activations keep their size."""
    state = {}
    for key, shape in shapes.items():
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(7)
        elif key.endswith("running_var") or (len(shape) == 1 and key.endswith("weight")):
            state[key] = 0.7 + 0.6 * torch.rand(shape)
        elif len(shape) > 1:
            state[key] = torch.randn(shape) * (2 / shape[1:].numel()) ** 0.5
        else:
            state[key] = 0.1 * torch.randn(shape)
    return state


def conv(out: int, into: int, size: int) -> dict[str, torch.Size]:
    return {"weight": torch.Size((out, into, size, size)), "bias": torch.Size((out,))}


def under(prefix: str, shapes: dict[str, torch.Size]) -> dict[str, torch.Size]:
    return {f"{prefix}.{key}": shape for key, shape in shapes.items()}


def shapes_of(module: nn.Module) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in module.state_dict().items()}


def predictors(names: tuple[str, str, str], size: int) -> dict[str, torch.Size]:
    shapes: dict[str, torch.Size] = {}
    for name, values in zip(names, (CLASSES, 4, 1), strict=True):
        shapes |= under(name, conv(values, CHANNELS, size))
    return shapes


MMDET_PREDICTORS = ("bbox_head.atss_cls", "bbox_head.atss_reg", "bbox_head.atss_centerness")
MICROSOFT_PREDICTORS = ("head.cls_logits", "head.bbox_pred", "head.centerness")


def mmdet_state(network: Callable[[], nn.Module] = resnet18, size: int = 3) -> State:
    """mmdet's ResNet has torchvision's names."""
    body = shapes_of(network())
    width = body["fc.weight"][1]
    shapes = under("backbone", {k: v for k, v in body.items() if not k.startswith("fc.")})
    for i in range(3):
        shapes |= under(f"neck.0.lateral_convs.{i}.conv", conv(CHANNELS, width >> (2 - i), 1))
    for i in range(5):
        shapes |= under(f"neck.0.fpn_convs.{i}.conv", conv(CHANNELS, CHANNELS, 3))
    shapes |= under("neck.1", shapes_of(mmdet.DyHead(CHANNELS, CHANNELS, 2)))
    shapes |= predictors(MMDET_PREDICTORS, size)
    shapes |= {f"bbox_head.scales.{i}.scale": torch.Size(()) for i in range(5)}
    return fill(shapes)


def detectron_resnet(depths: tuple[int, ...] = (3, 4, 6, 3)) -> dict[str, torch.Size]:
    def normed(prefix: str, out: int, into: int, size: int) -> dict[str, torch.Size]:
        norm = ("weight", "bias", "running_mean", "running_var")
        return {
            f"{prefix}.weight": torch.Size((out, into, size, size)),
            **{f"{prefix}.norm.{name}": torch.Size((out,)) for name in norm},
        }

    shapes, into = normed("stem.conv1", 64, 3, 7), 64
    for stage, depth in enumerate(depths):
        inner, out = 64 << stage, 256 << stage
        for i in range(depth):
            block = f"res{stage + 2}.{i}"
            if not i:
                shapes |= normed(f"{block}.shortcut", out, into, 1)
            shapes |= normed(f"{block}.conv1", inner, into, 1)
            shapes |= normed(f"{block}.conv2", inner, inner, 3)
            shapes |= normed(f"{block}.conv3", out, inner, 1)
            into = out
    return shapes


def detectron_swin() -> dict[str, torch.Size]:
    def layer(prefix: str, *shape: int) -> dict[str, torch.Size]:
        return {f"{prefix}.weight": torch.Size(shape), f"{prefix}.bias": torch.Size(shape[:1])}

    shapes = layer("patch_embed.proj", 96, 3, 4, 4) | layer("patch_embed.norm", 96)
    for stage, depth in enumerate((2, 2, 6, 2)):
        width, heads = 96 << stage, 3 << stage
        for i in range(depth):
            block = f"layers.{stage}.blocks.{i}"
            shapes |= layer(f"{block}.norm1", width) | layer(f"{block}.norm2", width)
            shapes |= layer(f"{block}.attn.qkv", 3 * width, width)
            shapes |= layer(f"{block}.attn.proj", width, width)
            shapes[f"{block}.attn.relative_position_bias_table"] = torch.Size((169, heads))
            shapes |= layer(f"{block}.mlp.fc1", 4 * width, width)
            shapes |= layer(f"{block}.mlp.fc2", width, 4 * width)
        if stage < 3:
            merging = f"layers.{stage}.downsample"
            shapes |= layer(f"{merging}.norm", 4 * width)
            shapes[f"{merging}.reduction.weight"] = torch.Size((2 * width, 4 * width))
        if stage:
            shapes |= layer(f"norm{stage}", width)
    return shapes


def microsoft_state(body: dict[str, torch.Size], widths: tuple[int, ...]) -> State:
    shapes = under("backbone.backbone.bottom_up", body)
    for level, width in zip((3, 4, 5), widths, strict=True):
        shapes |= under(f"backbone.backbone.fpn_lateral{level}", conv(CHANNELS, width, 1))
        shapes |= under(f"backbone.backbone.fpn_output{level}", conv(CHANNELS, CHANNELS, 3))
    for level in (6, 7):
        shapes |= under(f"backbone.backbone.top_block.p{level}", conv(CHANNELS, CHANNELS, 3))
    shapes |= under("backbone", shapes_of(microsoft.DyHead(nn.Identity(), CHANNELS, 2)))
    shapes |= predictors(MICROSOFT_PREDICTORS, 1)
    shapes |= {f"head.scales.{i}.scale": torch.Size((1,)) for i in range(5)}
    state = fill(shapes)
    for key in [key for key in state if key.endswith("bias_table")]:
        state[key.replace("bias_table", "index")] = relative_position_index(7)
    return state


def relative_position_index(window: int) -> Tensor:
    place = torch.arange(window)
    y, x = (t.flatten() for t in torch.meshgrid(place, place, indexing="ij"))
    dy, dx = (t[:, None] - t + window - 1 for t in (y, x))
    return dy * (2 * window - 1) + dx


class Plain:
    """A detector evaluated tensor by tensor in float64."""

    def __init__(self, state: State, body: str) -> None:
        self.prefix = body
        self.state = {k: v.double() if v.is_floating_point() else v for k, v in state.items()}

    def conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = self.state[f"{name}.weight"]
        bias = self.state.get(f"{name}.bias")
        return F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2)

    def norm(self, x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (
            self.state[f"{name}.{key}"][:, None, None]
            for key in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def resnet(self, x: Tensor, caffe: bool) -> list[Tensor]:
        """Of torchvision's names (mmdet) or of detectron2's."""
        theirs = f"{self.prefix}.stem.conv1.weight" in self.state
        stem = f"{self.prefix}.stem.conv1" if theirs else f"{self.prefix}.conv1"

        def normed(x: Tensor, conv: str, stride: int = 1) -> Tensor:
            norm = f"{conv}.norm"
            if not theirs:
                left, _, last = conv.rpartition(".")
                norm = f"{left}.bn{last[-1]}" if last[:4] == "conv" else f"{left}.1"
            return self.norm(self.conv(x, conv, stride), norm)

        x = F.max_pool2d(normed(x, stem, 2).relu(), 3, 2, 1)
        levels = []
        for stage in range(4):
            name = f"res{stage + 2}" if theirs else f"layer{stage + 1}"
            index = 0
            while f"{self.prefix}.{name}.{index}.conv1.weight" in self.state:
                block = f"{self.prefix}.{name}.{index}"
                stride = 2 if stage and not index else 1
                skip = f"{block}.shortcut" if theirs else f"{block}.downsample.0"
                bottleneck = f"{block}.conv3.weight" in self.state
                first, second = (stride, 1) if caffe or not bottleneck else (1, stride)
                y = normed(x, f"{block}.conv1", first).relu()
                y = normed(y, f"{block}.conv2", second)
                if bottleneck:
                    y = normed(y.relu(), f"{block}.conv3")
                short = normed(x, skip, stride) if f"{skip}.weight" in self.state else x
                x = (y + short).relu()
                index += 1
            levels.append(x)
        return levels[1:]

    def layer(self, x: Tensor, name: str) -> Tensor:
        name = f"{self.prefix}.{name}"
        weight, bias = self.state[f"{name}.weight"], self.state.get(f"{name}.bias")
        if weight.dim() == 1:
            return F.layer_norm(x, weight.shape, weight, bias)
        return F.linear(x, weight, bias)

    def attention(self, x: Tensor, name: str, shift: int, window: int = 7) -> Tensor:
        """Of one image [H, W, C], window by window; shifted windows do not wrap around."""
        height, width, channels = x.shape
        tall, wide = -height % window, -width % window
        x = F.pad(x, (0, 0, 0, wide, 0, tall))

        def parts(size: int) -> Tensor:
            """Of a rolled axis: whole windows, then the last one's end, then what came round."""
            at = torch.arange(size)
            return (at >= size - window).int() + (at >= size - shift).int()

        region = 3 * parts(x.shape[0])[:, None] + parts(x.shape[1])
        if not shift:
            region = torch.zeros_like(region)
        x = x.roll((-shift, -shift), (0, 1))
        table = self.state[f"{self.prefix}.{name}.relative_position_bias_table"]
        bias = table[relative_position_index(window)].permute(2, 0, 1)
        out = torch.zeros_like(x)
        for i in range(0, x.shape[0], window):
            for j in range(0, x.shape[1], window):
                box = slice(i, i + window), slice(j, j + window)
                tokens = x[box].reshape(-1, channels)
                here = region[box].flatten()
                heads = (
                    self.layer(tokens, f"{name}.qkv").unflatten(-1, (3, len(bias), -1)).unbind(1)
                )
                query, key, value = (t.transpose(0, 1) for t in heads)
                scores = query @ key.transpose(1, 2) * query.shape[-1] ** -0.5 + bias
                scores = scores - 100.0 * (here[:, None] != here)
                mixed = (scores.softmax(-1) @ value).transpose(0, 1).flatten(1)
                out[box] = self.layer(mixed, f"{name}.proj").reshape(window, window, channels)
        return out.roll((shift, shift), (0, 1))[:height, :width]

    def swin(self, image: Tensor) -> list[Tensor]:
        weight = self.state[f"{self.prefix}.patch_embed.proj.weight"]
        bias = self.state[f"{self.prefix}.patch_embed.proj.bias"]
        x = F.conv2d(image, weight, bias, stride=4)[0].permute(1, 2, 0)
        x = self.layer(x, "patch_embed.norm")
        levels = []
        for stage, depth in enumerate((2, 2, 6, 2)):
            for i in range(depth):
                block = f"layers.{stage}.blocks.{i}"
                y = self.layer(x, f"{block}.norm1")
                x = x + self.attention(y, f"{block}.attn", 3 * (i % 2))
                y = F.gelu(self.layer(self.layer(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
                x = x + self.layer(y, f"{block}.mlp.fc2")
            if stage:
                levels.append(self.layer(x, f"norm{stage}").permute(2, 0, 1)[None])
            if stage < 3:
                corners = [x[dy::2, dx::2] for dx in (0, 1) for dy in (0, 1)]
                y = self.layer(torch.cat(corners, -1), f"layers.{stage}.downsample.norm")
                x = self.layer(y, f"layers.{stage}.downsample.reduction")
        return levels

    def pyramid(self, maps: list[Tensor], lateral: str, output: str, first: int) -> list[Tensor]:
        levels: list[Tensor] = []
        above = None
        for i in (2, 1, 0):
            x = self.conv(maps[i], lateral.format(i + first))
            if above is not None:
                x = x + above.repeat_interleave(2, -2).repeat_interleave(2, -1)
            above = x
            levels.insert(0, self.conv(x, output.format(i + first)))
        return levels

    def predict(self, levels: list[Tensor], names: tuple[str, ...], scale: str) -> list[Tensor]:
        """Class logits, box deltas and centerness of all positions in order: [A, K], ..."""
        parts = []
        for i, x in enumerate(levels):
            one = torch.ones(())
            factors = (one, self.state[scale.format(i)], one)
            for name, factor in zip(names, factors, strict=True):
                parts.append((self.conv(x, name) * factor)[0].flatten(1).T)
        return [torch.cat(parts[i::3]) for i in range(3)]


def run_mmdet(state: State, image: Tensor, caffe: bool = False) -> list[Tensor]:
    plain = Plain(state, "backbone")
    maps = plain.resnet(image, caffe)
    fpn = "neck.0.fpn_convs.{}.conv"
    levels = plain.pyramid(maps, "neck.0.lateral_convs.{}.conv", fpn, 0)
    for i in (3, 4):
        levels.append(plain.conv(levels[-1], fpn.format(i), 2))
    tower = mmdet.DyHead(CHANNELS, CHANNELS, 2)
    tower.load_state_dict(
        {k.removeprefix("neck.1."): v for k, v in state.items() if k.startswith("neck.1.")}
    )
    return plain.predict(
        list(tower.double()(levels)), MMDET_PREDICTORS, "bbox_head.scales.{}.scale"
    )


def run_microsoft(state: State, image: Tensor, swin: bool) -> list[Tensor]:
    plain = Plain(state, "backbone.backbone.bottom_up")
    maps = plain.swin(image) if swin else plain.resnet(image, caffe=True)
    fpn = "backbone.backbone.fpn_"
    levels = plain.pyramid(maps, fpn + "lateral{}", fpn + "output{}", 3)
    levels.append(plain.conv(levels[-1], "backbone.backbone.top_block.p6", 2))
    levels.append(plain.conv(levels[-1].relu(), "backbone.backbone.top_block.p7", 2))
    tower = microsoft.DyHead(nn.Identity(), CHANNELS, 2)
    prefix = "backbone.dyhead_tower."
    tower.dyhead_tower.load_state_dict(
        {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    )
    levels = list(tower.double()({str(i): x for i, x in enumerate(levels)}).values())
    return plain.predict(levels, MICROSOFT_PREDICTORS, "head.scales.{}.scale")


def prepared(image: Tensor, recipe: Recipe) -> Tensor:
    """The network's input of the public code: pixels of 0..255 in its order, padded by zeros."""
    pixels = image.flip(0) * 255 if recipe.channels == "bgr" else image * 255
    mean, std = (
        torch.tensor(v, dtype=torch.float64)[:, None, None]
        for v in (recipe.pixel_mean, recipe.pixel_std)
    )
    height, width = (-size % recipe.size_divisible for size in image.shape[1:])
    return F.pad((pixels - mean) / std, (0, width, 0, height))[None]


def random_image(height: int = 120, width: int = 150) -> Tensor:
    return torch.rand(3, height, width, dtype=torch.float64)


def predictions(model: ATSS, image: Tensor) -> list[Tensor]:
    batch, _ = model.double().transform([image])
    levels = list(model.backbone(batch.tensors).values())
    logits, deltas, centerness = (torch.cat(part, 1)[0] for part in model.head(levels))
    return [logits, deltas, centerness[:, None]]


def assert_same(model: ATSS, image: Tensor, expected: list[Tensor]) -> None:
    for found, wanted in zip(predictions(model, image), expected, strict=True):
        assert wanted.std() > 1e-3
        assert relative_l2(found, wanted) < 1e-6


def unresized(recipe: Recipe, height: int = 120, width: int = 150) -> Recipe:
    return replace(recipe, min_size=height, max_size=width)


@pytest.fixture(scope="module")
def mmdet_r18() -> State:
    torch.manual_seed(1)
    return mmdet_state()


@pytest.fixture(scope="module")
def microsoft_r50() -> State:
    torch.manual_seed(2)
    return microsoft_state(detectron_resnet(), (512, 1024, 2048))


@torch.no_grad()
def test_mmdet(mmdet_r18: State) -> None:
    recipe = unresized(MMDET_R50)
    model = atss_from_mmdet(mmdet_r18, recipe=recipe)
    image = random_image()
    assert_same(model, image, run_mmdet(mmdet_r18, prepared(image, recipe)))
    assert (model.anchors.center_offset, model.postprocess, model.num_classes) == (
        0,
        "mmdet",
        CLASSES,
    )
    assert {"boxes", "scores", "labels"} == set(model([image])[0])


@torch.no_grad()
@pytest.mark.parametrize("recipe", [MMDET_R50, MMDET_R50_CAFFE])
def test_mmdet_resnet50_in_both_styles(recipe: Recipe) -> None:
    state, recipe = mmdet_state(resnet50, recipe.kernel_size), unresized(recipe)
    model = atss_from_mmdet({"state_dict": state, "meta": {}}, recipe=recipe)
    image = random_image()
    expected = run_mmdet(state, prepared(image, recipe), caffe=recipe.stride_in_1x1)
    assert_same(model, image, expected)


@torch.no_grad()
def test_microsoft(microsoft_r50: State) -> None:
    recipe = unresized(MICROSOFT_R50)
    as_saved = {"model": {key: value.numpy() for key, value in microsoft_r50.items()}}
    model = atss_from_microsoft(as_saved, recipe=recipe)
    image = random_image()
    assert_same(model, image, run_microsoft(microsoft_r50, prepared(image, recipe), swin=False))
    assert (model.anchors.center_offset, model.postprocess) == (0.5, "microsoft")


@torch.no_grad()
def test_microsoft_swin() -> None:
    state = microsoft_state(detectron_swin(), (192, 384, 768))
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


def test_wrong_recipe_or_code_base(mmdet_r18: State, microsoft_r50: State) -> None:
    with pytest.raises(
        ValueError, match="predictors of size 1 for this recipe, got resnet18 and 3"
    ):
        atss_from_mmdet(mmdet_r18, recipe=MMDET_R50_CAFFE)
    with pytest.raises(ValueError, match="expected a swin backbone"):
        atss_from_microsoft(microsoft_r50, recipe=MICROSOFT_SWINT)
    with pytest.raises(ValueError, match="from_mmdet"):
        atss_from_microsoft(mmdet_r18)
    with pytest.raises(ValueError, match="version"):
        atss_from_mmdet(mmdet_r18, version="1.0")
    with pytest.raises(TypeError, match="state dict"):
        atss_from_mmdet([])  # type: ignore[arg-type]


def test_backbones_that_torchvision_does_not_have(mmdet_r18: State) -> None:
    rest = {k: v for k, v in mmdet_r18.items() if not k.startswith("backbone.")}
    swin = {"backbone.stages.0.blocks.0.attn.w_msa.qkv.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match="Swin-L"):
        atss_from_mmdet(rest | swin)
    short = {k: v for k, v in mmdet_r18.items() if not k.startswith("backbone.layer4.1")}
    with pytest.raises(ValueError, match=r"got \(2, 2, 2, 1, 2\)"):
        atss_from_mmdet(short)
