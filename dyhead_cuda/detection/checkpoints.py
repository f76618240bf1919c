"""Published ATSS detectors with a Dynamic Head: checkpoints of mmdet and microsoft/DynamicHead."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from dyhead_cuda import compat
from dyhead_cuda.compat.names import MICROSOFT, MMDET, CodeBase
from dyhead_cuda.compat.towers import unnest
from dyhead_cuda.detection.atss import ATSS, Postprocess
from dyhead_cuda.detection.backbones import Extra, Pyramid
from dyhead_cuda.modules import DyHead

_FIRST, _LAST = 3, 7
_BACKBONE = 5  # the coarsest level that the backbone has
_RESNETS = {
    (2, 2, 2, 2, 2): "resnet18",
    (3, 4, 6, 3, 2): "resnet34",
    (3, 4, 6, 3, 3): "resnet50",
    (3, 4, 23, 3, 3): "resnet101",
    (3, 8, 36, 3, 3): "resnet152",
}
_SWINS = {(2, 2, 6, 2, 96): "swin_t", (2, 2, 18, 2, 96): "swin_s", (2, 2, 18, 2, 128): "swin_b"}


@dataclass(frozen=True)
class Recipe:
    """What a published configuration fixes and a state dict does not tell.

    Args:
        family: of the backbone.
        kernel_size: of the predictors.
        pixel_mean, pixel_std: of pixels in 0..255, in the order of ``channels``.
        channels: the order in which the network takes them.
        stride_in_1x1: whether a ResNet stage halves its input in its first 1x1 convolution (caffe's
            style) and not in the 3x3 one.
        center_offset, size_divisible, min_size, max_size: see :class:`~dyhead_cuda.detection.ATSS`.
    """

    family: Literal["resnet", "swin"]
    kernel_size: int
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    channels: Literal["rgb", "bgr"] = "rgb"
    stride_in_1x1: bool = False
    center_offset: float = 0.5
    size_divisible: int = 128
    min_size: int = 800
    max_size: int = 1333


#: mmdet ``atss_r50_fpn_dyhead_1x_coco``.
MMDET_R50 = Recipe("resnet", 3, center_offset=0.0, size_divisible=32)
_CAFFE: dict[str, Any] = {
    "pixel_mean": (103.53, 116.28, 123.675),
    "pixel_std": (1.0, 1.0, 1.0),
    "channels": "bgr",
    "stride_in_1x1": True,
}
#: mmdet ``atss_r50-caffe_fpn_dyhead_1x_coco``, once called ``..._for_reproduction_1x_coco``.
MMDET_R50_CAFFE = Recipe("resnet", 1, **_CAFFE)
#: microsoft/DynamicHead ``dyhead_r50_atss_fpn_1x``.
MICROSOFT_R50 = Recipe("resnet", 1, **_CAFFE)
#: microsoft/DynamicHead ``dyhead_swint_atss_fpn_2x_ms``.
MICROSOFT_SWINT = Recipe("swin", 1)


class _Source(NamedTuple):
    """A code base: how its detectors name and connect what :class:`ATSS` has."""

    blocks: CodeBase
    body: str  # prefix of the backbone's keys
    tower: str  # prefix of the Dynamic Head's
    classes: str
    scales: str
    extra: Extra
    postprocess: Postprocess
    rules: tuple[tuple[str, str], ...]  # a key of ours (regex, all of it) -> theirs (template)


def _mmdet_rules() -> Iterable[tuple[str, str]]:
    yield r"backbone\.body\.(.+)", r"backbone.\1"
    yield r"backbone\.fpn\.inner_blocks\.(\d)\.0\.(.+)", r"neck.0.lateral_convs.\1.conv.\2"
    yield r"backbone\.fpn\.layer_blocks\.(\d)\.0\.(.+)", r"neck.0.fpn_convs.\1.conv.\2"
    for level in range(_BACKBONE + 1, _LAST + 1):
        theirs = rf"neck.0.fpn_convs.{level - _FIRST}.conv.\1"
        yield rf"backbone\.fpn\.extra_blocks\.p{level}\.(.+)", theirs
    yield r"head\.classes\.(.+)", r"bbox_head.atss_cls.\1"
    yield r"head\.boxes\.(.+)", r"bbox_head.atss_reg.\1"
    yield r"head\.centerness\.(.+)", r"bbox_head.atss_centerness.\1"


def _microsoft_rules() -> Iterable[tuple[str, str]]:
    bottom_up, body = "backbone.backbone.bottom_up", r"backbone\.body"
    yield rf"{body}\.conv1\.(.+)", rf"{bottom_up}.stem.conv1.\1"
    yield rf"{body}\.bn1\.(.+)", rf"{bottom_up}.stem.conv1.norm.\1"
    yield rf"{body}\.stages\.0\.0\.(.+)", rf"{bottom_up}.patch_embed.proj.\1"
    yield rf"{body}\.stages\.0\.2\.(.+)", rf"{bottom_up}.patch_embed.norm.\1"
    for stage in range(4):
        ours, theirs = rf"{body}\.layer{stage + 1}\.(\d+)", rf"{bottom_up}.res{stage + 2}.\1"
        yield rf"{ours}\.(conv\d)\.(.+)", rf"{theirs}.\2.\3"
        yield rf"{ours}\.bn(\d)\.(.+)", rf"{theirs}.conv\2.norm.\3"
        yield rf"{ours}\.downsample\.0\.(.+)", rf"{theirs}.shortcut.\2"
        yield rf"{ours}\.downsample\.1\.(.+)", rf"{theirs}.shortcut.norm.\2"
        # Patch embedding, then stage, patch merging, stage, ...
        ours = rf"{body}\.stages\.{2 * stage + 1}\.(\d+)"
        theirs = rf"{bottom_up}.layers.{stage}.blocks.\1"
        yield rf"{ours}\.mlp\.0\.(.+)", rf"{theirs}.mlp.fc1.\2"
        yield rf"{ours}\.mlp\.3\.(.+)", rf"{theirs}.mlp.fc2.\2"
        yield rf"{ours}\.(.+)", rf"{theirs}.\2"
        merging = rf"{bottom_up}.layers.{stage}.downsample.\1"
        yield rf"{body}\.stages\.{2 * stage + 2}\.(.+)", merging
    for index in range(_BACKBONE - _FIRST + 1):
        yield rf"{body}\.norms\.{index}\.(.+)", rf"{bottom_up}.norm{index + 1}.\1"
        for ours, theirs in (("inner_blocks", "fpn_lateral"), ("layer_blocks", "fpn_output")):
            here = rf"backbone\.fpn\.{ours}\.{index}\.0\.(.+)"
            yield here, rf"backbone.backbone.{theirs}{index + _FIRST}.\1"
    yield r"backbone\.fpn\.extra_blocks\.(.+)", r"backbone.backbone.top_block.\1"
    yield r"head\.classes\.(.+)", r"head.cls_logits.\1"
    yield r"head\.boxes\.(.+)", r"head.bbox_pred.\1"
    yield r"head\.centerness\.(.+)", r"head.centerness.\1"


_MMDET = _Source(
    blocks=MMDET,
    body="backbone.",
    tower="neck.1.dyhead_blocks.",
    classes="bbox_head.atss_cls.weight",
    scales="bbox_head.scales.{}.scale",
    extra="conv",
    postprocess="mmdet",
    rules=tuple(_mmdet_rules()),
)
_MICROSOFT = _Source(
    blocks=MICROSOFT,
    body="backbone.backbone.bottom_up.",
    tower="backbone.dyhead_tower.",
    classes="head.cls_logits.weight",
    scales="head.scales.{}.scale",
    extra="conv_relu",
    postprocess="microsoft",
    rules=tuple(_microsoft_rules()),
)


def _translate(key: str, rules: Sequence[tuple[str, str]]) -> str:
    for pattern, template in rules:
        match = re.fullmatch(pattern, key)
        if match:
            return match.expand(template)
    raise KeyError(key)


def _backbone(state: Mapping[str, Any], source: _Source) -> str:
    """The torchvision name of the backbone whose keys ``state`` has."""
    keys = [key.removeprefix(source.body) for key in state if key.startswith(source.body)]

    def depths(pattern: str) -> tuple[int, ...]:
        blocks = {m.groups() for m in (re.match(pattern, key) for key in keys) if m}
        return tuple(sum(stage == s for stage, _ in blocks) for s in sorted({s for s, _ in blocks}))

    residual = depths(r"(?:layer|res)(\d)\.(\d+)\.")
    if residual:
        convs = 3 if any(re.search(r"\.0\.conv3\.", key) for key in keys) else 2
        found, known = (*residual, convs), _RESNETS
        what = "blocks of the four stages and convolutions of a block"
    else:
        found = depths(r"(?:layers|stages)\.(\d)\.blocks\.(\d+)\.")
        table = f"{source.body}layers.0.blocks.0.attn.relative_position_bias_table"
        if not found or table not in state or len(state[table]) != (2 * 7 - 1) ** 2:
            raise ValueError(
                f"expected a ResNet or a Swin transformer of torchvision (window 7) under "
                f'"{source.body}" with the names of {source.blocks.title}, found '
                f"{', '.join(keys[:3]) or 'nothing'} ...; mmdet's Swin-L (window 12) is not one"
            )
        found, known = (*found, len(state[f"{source.body}patch_embed.proj.weight"])), _SWINS
        what = "blocks of the four stages and channels of the first"
    if found not in known:
        raise ValueError(f"expected {what} as one of {known}, got {found}")
    return known[found]


def _tower_keys(head: DyHead, source: _Source) -> set[str]:
    names = [name.theirs for name in source.blocks.names]
    return {f"{source.tower}{i}.{name}" for i in range(len(head.blocks)) for name in names}


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))


def _load(model: ATSS, state: Mapping[str, Any], source: _Source, tower: set[str]) -> None:
    """Load all but the Dynamic Head, whose keys are ``tower``; every key must have its use."""
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    scales = [source.scales.format(i) for i in range(model.head.scales.numel())]
    names = {
        key: _translate(key, source.rules)
        for key in shapes
        if not key.startswith("backbone.dyhead.") and key != "head.scales"
    }
    used = {*names.values(), *scales, *tower}
    missing = sorted(used - set(state))
    # Frozen batch normalisation counts no batches.
    unexpected = sorted(key for key in set(state) - used if not key.endswith("num_batches_tracked"))
    if missing or unexpected:
        raise ValueError(
            f"expected the {len(used)} tensors of {source.blocks.title}'s ATSS with a Dynamic "
            f"Head of P{_FIRST}..P{_LAST}, missing: {', '.join(missing) or 'none'}; unexpected: "
            f"{', '.join(unexpected) or 'none'}"
        )
    tensors = {key: _tensor(state[name]) for key, name in names.items()}
    tensors["head.scales"] = torch.stack([_tensor(state[name]).reshape(()) for name in scales])
    for key in tensors:
        if key.endswith("relative_position_index"):
            tensors[key] = tensors[key].flatten()
    wrong = [key for key, value in tensors.items() if value.shape != shapes[key]]
    if wrong:
        lines = (
            f"{names.get(key, 'scales')}: expected {list(shapes[key])}, got "
            f"{list(tensors[key].shape)}"
            for key in wrong
        )
        raise ValueError(f"expected other shapes in the checkpoint: {'; '.join(lines)}")
    model.load_state_dict(tensors, strict=False)


def _build(checkpoint: Mapping[str, Any], source: _Source, head: DyHead, recipe: Recipe) -> ATSS:
    state = unnest(checkpoint, source.blocks)
    backbone = _backbone(state, source)
    if source.classes not in state:
        raise ValueError(f'expected "{source.classes}" of an ATSS head, found no such key')
    num_classes, _, kernel_size, _ = state[source.classes].shape
    if not backbone.startswith(recipe.family) or kernel_size != recipe.kernel_size:
        raise ValueError(
            f"expected a {recipe.family} backbone and predictors of size {recipe.kernel_size} for "
            f"this recipe, got {backbone} and {kernel_size}; pass the recipe of the checkpoint's "
            "configuration"
        )
    pyramid = Pyramid(
        backbone,
        weights="DEFAULT",  # for frozen batch normalisation; none are loaded
        load_weights=False,
        first_level=_FIRST,
        last_level=_LAST,
        channels=cast(int, head.blocks[0].in_channels),
        blocks=0,
        extra=source.extra,
    )
    pyramid.dyhead, pyramid.out_channels = head.float(), head.out_channels
    mean, std = recipe.pixel_mean, recipe.pixel_std
    bgr = recipe.channels == "bgr"
    model = ATSS(
        pyramid,
        num_classes,
        min_size=recipe.min_size,
        max_size=recipe.max_size,
        kernel_size=kernel_size,
        center_offset=recipe.center_offset,
        postprocess=source.postprocess,
        image_mean=[value / 255 for value in (reversed(mean) if bgr else mean)],
        image_std=[value / 255 for value in (reversed(std) if bgr else std)],
        size_divisible=recipe.size_divisible,
    )
    _load(model, state, source, _tower_keys(head, source))
    if bgr:
        first = next(m for m in pyramid.body.modules() if isinstance(m, nn.Conv2d))
        first.weight.data = first.weight.data.flip(1)
    if recipe.stride_in_1x1 and recipe.family == "resnet":
        for stage in ("layer2", "layer3", "layer4"):
            block: Any = pyramid.body.get_submodule(f"{stage}.0")
            if hasattr(block, "conv3"):
                block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
    return model.eval()


def atss_from_mmdet(
    state_dict: Mapping[str, Any], *, recipe: Recipe = MMDET_R50, version: str = "3.3.0"
) -> ATSS:
    """The detector of a checkpoint that mmdet's ATSS with a Dynamic Head has.

    Depth of the ResNet, blocks, channels and classes are read from the checkpoint; every tensor
    in it must have its use. Batch normalisation is frozen. The result takes RGB images in 0..1.
    On an image whose size the transform keeps it gives mmdet's numbers to rounding; resizing is
    torchvision's, which interpolates slightly differently from OpenCV and Pillow.

    Args:
        state_dict: a state dict, or a checkpoint with one under "state_dict"; its tensors are
            copied.
        recipe: of the configuration that it was trained with.
        version: of the mmdet that trained it, see :func:`dyhead_cuda.compat.from_mmdet`.

    Returns:
        The detector in evaluation mode, float32, on the CPU.

    Raises:
        ValueError: missing, unexpected or misshapen tensors, all of them listed; a backbone that
            torchvision does not have (mmdet's Swin-L), or one that does not fit the recipe.
        TypeError: not a mapping.
    """
    head = compat.from_mmdet(state_dict, version=version, prefix=_MMDET.tower)
    return _build(state_dict, _MMDET, head.cpu(), recipe)


def atss_from_microsoft(state_dict: Mapping[str, Any], *, recipe: Recipe = MICROSOFT_R50) -> ATSS:
    """The detector of a checkpoint of microsoft/DynamicHead on detectron2.

    As :func:`atss_from_mmdet`, with the state dict under "model" and Swin-T, -S and -B as further
    backbones (``recipe=MICROSOFT_SWINT``). Where a side of the padded image has at most 224
    pixels a Swin transformer differs: torchvision does not shift windows in a map of one window.
    """
    head = compat.from_microsoft(state_dict, prefix=_MICROSOFT.tower)
    return _build(state_dict, _MICROSOFT, head.cpu(), recipe)
