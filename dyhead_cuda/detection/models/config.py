"""A detector from a configuration, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dyhead_cuda import backend, checks
from dyhead_cuda.detection.models.adapters import check_anchor_scale
from dyhead_cuda.detection.models.atss import ATSS
from dyhead_cuda.detection.models.backbones import Pyramid, check_levels
from dyhead_cuda.detection.models.one_stage import FCOS, RetinaNet
from dyhead_cuda.detection.models.recipes import RECIPES, halve_in_first_convolutions
from dyhead_cuda.detection.models.two_stage import FasterRCNN
from dyhead_cuda.detection.names import DETECTORS, ONE_STAGE, TWO_STAGE, BoxHead, Extra
from dyhead_cuda.detection.settings import Settings
from dyhead_cuda.modules import ATTENTIONS, Attention, Init, WithoutTask
from dyhead_cuda.pyramid import HIGH_OFFSETS, HighOffset

# How each publication makes the levels beyond the backbone.
EXTRA_LEVELS: dict[str, Extra] = {
    "atss": "conv",
    "retinanet": "conv_relu",
    "fcos": "conv_relu",
    "faster_rcnn": "pool",
    "faster_rcnn_task": "pool",
}


@dataclass(frozen=True)
class ModelConfig(Settings):
    """All settings of a detector, which :func:`build` makes; JSON-able.

    Args:
        detector: "atss", "retinanet", "fcos", "faster_rcnn" (Dynamic Head on the pyramid, ordinary
            box head) or "faster_rcnn_task" (the paper's figure: the task attention is the box
            head).
        num_classes: without the background.
        backbone, weights, frozen_stages, backbone_last_level, first_level, last_level: see
            :class:`Pyramid`. Two-stage detectors are published with levels 2 to 6.
        channels, blocks, attentions, without_task, high_offset, init: see :class:`Pyramid`; 0
            blocks are the plain head.
        convs: convolutions in each tower before the predictors of a one-stage detector. None: as
            published, 4 without a Dynamic Head, and with one 4 for RetinaNet and 0 for ATSS, which
            FCOS follows here.
        shared_tower: ATSS alone: one tower for classes and boxes, see :class:`ATSS`.
        anchor_scale: of all but FCOS, which has no anchors: the side of the (smallest) anchors, in
            strides. None: as published, 4 for RetinaNet and 8 for the others.
        min_size, max_size: pixels; an image is resized so that its shorter side is ``min_size``,
            or its longer side ``max_size`` if that makes it smaller.
        keypoints: of each object; 0 for none. Two-stage detectors only.
        recipe: of a published checkpoint that an ATSS has started from, such as "mmdet_r50": what
            :class:`Recipe` has, other than sizes. None: this package's own.

    Raises:
        ValueError: values that no detector can be made of.

    Example:
        >>> from dyhead_cuda.detection import ModelConfig
        >>> config = ModelConfig("retinanet", num_classes=80, blocks=2)
        >>> ModelConfig.from_dict(config.to_dict()) == config
        True
        >>> ModelConfig("yolo", 80)
        Traceback (most recent call last):
            ...
        ValueError: expected detector to be one of ('atss', ...
    """

    detector: str
    num_classes: int
    backbone: str = "resnet50"
    weights: str | None = None
    first_level: int = 3
    last_level: int = 7
    channels: int = 256
    blocks: int = 6
    convs: int | None = None
    attentions: tuple[Attention, ...] = ATTENTIONS
    without_task: WithoutTask = "identity"
    high_offset: HighOffset = "flat"
    init: Init = "mmdet"
    min_size: int = 800
    max_size: int = 1333
    keypoints: int = 0
    frozen_stages: int = 0
    anchor_scale: float | None = None
    shared_tower: bool = False
    backbone_last_level: int | None = None
    recipe: str | None = None

    def __post_init__(self) -> None:
        checks.one_of("detector", self.detector, DETECTORS)
        checks.positive(
            num_classes=self.num_classes,
            channels=self.channels,
            min_size=self.min_size,
            max_size=self.max_size,
        )
        if not isinstance(self.backbone, str):
            raise ValueError(f"expected the name of a backbone, got {self.backbone!r}")
        for name in ("blocks", "convs", "keypoints", "frozen_stages"):
            value = getattr(self, name)
            if value is None and name == "convs":
                continue
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"expected {name} as an integer of at least 0, got {value!r}")
        check_levels(self.first_level, self.last_level)
        if self.min_size > self.max_size:
            raise ValueError(
                f"expected min_size <= max_size, got {self.min_size} and {self.max_size}"
            )
        object.__setattr__(self, "attentions", tuple(self.attentions))  # JSON has lists
        for attention in self.attentions:
            checks.one_of("attentions", attention, ATTENTIONS)
        checks.one_of("without_task", self.without_task, get_args(WithoutTask))
        checks.one_of("high_offset", self.high_offset, HIGH_OFFSETS)
        checks.one_of("init", self.init, get_args(Init))
        if self.detector in ONE_STAGE and self.keypoints:
            raise ValueError(
                f"expected keypoints 0 for the one-stage detector {self.detector}, got "
                f"{self.keypoints}; {' and '.join(TWO_STAGE)} predict keypoints"
            )
        if self.detector in TWO_STAGE and self.convs:
            raise ValueError(
                f"expected convs None or 0 for {self.detector}, whose predictors have no towers, "
                f"got {self.convs}"
            )
        self._check_anchors_and_tower()
        if self.recipe is not None:
            checks.one_of("recipe", self.recipe, tuple(RECIPES))
            if self.detector != "atss":
                raise ValueError(
                    f"expected atss for the recipe {self.recipe}, got {self.detector}: published "
                    "checkpoints are read of ATSS only"
                )
        if self.detector == "faster_rcnn_task" and not self.blocks:
            raise ValueError(
                "expected at least 1 block for faster_rcnn_task, got 0; the plain detector is "
                '"faster_rcnn" with 0 blocks'
            )

        if self.detector == "retinanet" and self.blocks and self.convs is None:
            # Filled in at once, as None means something else in older files; see from_dict.
            object.__setattr__(self, "convs", 4)

    def _check_anchors_and_tower(self) -> None:
        check_anchor_scale(self.anchor_scale)
        if self.detector == "fcos" and self.anchor_scale is not None:
            raise ValueError(
                "expected anchor_scale None for fcos, which has no anchors, got "
                f"{self.anchor_scale!r}"
            )
        if not isinstance(self.shared_tower, bool):
            raise ValueError(f"expected shared_tower as True or False, got {self.shared_tower!r}")
        if self.shared_tower and self.detector != "atss":
            raise ValueError(
                f"expected shared_tower False for {self.detector}, got True; only atss has it"
            )
        if self.shared_tower and not self.tower_convs:
            raise ValueError(
                "expected convs of at least 1 for shared_tower, got "
                f"{self.convs}, with {self.blocks} blocks: there is no tower to share"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """The settings that :meth:`to_dict` gave, of this or an older version.

        Older versions had no convolutions after a Dynamic Head in RetinaNet either, and wrote None
        as ``convs`` of it.

        Raises:
            ValueError: unknown or missing names, or values that the class refuses.
        """
        older = values.get("detector") == "retinanet" and values.get("convs", 4) is None
        if older and values.get("blocks", cls.blocks):
            values = {**values, "convs": 0}
        return super().from_dict(values)

    @property
    def tower_convs(self) -> int:
        """``convs`` with its default filled in."""
        return (0 if self.blocks else 4) if self.convs is None else self.convs


def build(config: ModelConfig) -> nn.Module:
    """The detector that ``config`` describes, with torchvision's interface.

    Args:
        config: what to make. Its weights are drawn from torch's random state, or downloaded.

    Returns:
        :class:`ATSS`, :class:`RetinaNet`, :class:`FCOS` or :class:`FasterRCNN`, in training mode.
        ``model(images, targets)`` in training returns a dict of scalar losses; in evaluation
        ``model(images)`` a list of dicts with boxes, float32 [m, 4] (x1, y1, x2, y2 in pixels of
        the input), scores, float32 [m], labels, int64 [m] from 1, and keypoints, float32 [m, K, 3],
        if it has them. ``model.backbone`` is a :class:`Pyramid`.

    Raises:
        ValueError: channels that the Dynamic Head cannot group, levels or weights that the backbone
            does not have.

    Example:
        >>> from dyhead_cuda.detection import ModelConfig, build
        >>> small = {"channels": 16, "blocks": 1, "last_level": 5}
        >>> config = ModelConfig("atss", 3, "timm/test_resnet.r160_in1k", **small)
        >>> type(build(config)).__name__
        'ATSS'
    """
    return _build(config, load_weights=True)


def build_empty(config: ModelConfig) -> nn.Module:
    """As :func:`build`, for a model whose state is loaded next: no weights are downloaded.

    Args:
        config: what to make.

    Returns:
        The detector with random weights, whatever ``config.weights`` is.

    Raises:
        ValueError: as :func:`build`.

    Example:
        >>> from dyhead_cuda.detection.models import ModelConfig, build_empty
        >>> config = ModelConfig("fcos", 3, "resnet18", weights="DEFAULT", channels=16, blocks=1)
        >>> model = build_empty(config)
    """
    return _build(config, load_weights=False)


def _build(config: ModelConfig, load_weights: bool) -> nn.Module:
    task_head = config.detector == "faster_rcnn_task"
    source, recipe = RECIPES[config.recipe] if config.recipe else (None, None)
    pyramid = Pyramid(
        config.backbone,
        weights=config.weights,
        first_level=config.first_level,
        last_level=config.last_level,
        backbone_last_level=config.backbone_last_level,
        channels=config.channels,
        blocks=config.blocks,
        # faster_rcnn_task applies the task attention after RoI pooling instead.
        attentions=[a for a in config.attentions if not (task_head and a == "task")],
        without_task=config.without_task,
        high_offset=config.high_offset,
        init=config.init,
        deform_bias=source.blocks.deform_bias if source else True,
        extra=source.extra if source else EXTRA_LEVELS[config.detector],
        frozen_stages=config.frozen_stages,
        load_weights=load_weights,
    )
    settings: dict[str, Any] = {"min_size": config.min_size, "max_size": config.max_size}
    if source and recipe:
        settings |= {"postprocess": source.postprocess, **recipe.detector_settings()}
        if recipe.stride_in_1x1:
            halve_in_first_convolutions(pyramid)
    if config.detector in ONE_STAGE:
        options: dict[str, Any] = {"convs": config.tower_convs, **settings}
        if config.detector == "fcos":
            return FCOS(pyramid, config.num_classes, **options)
        options["anchor_scale"] = config.anchor_scale
        if config.detector == "retinanet":
            return RetinaNet(pyramid, config.num_classes, **options)
        return ATSS(pyramid, config.num_classes, shared_tower=config.shared_tower, **options)
    box_head: BoxHead = "mlp"
    if task_head:
        box_head = "task" if "task" in config.attentions else "linear"
    return FasterRCNN(
        pyramid,
        config.num_classes,
        box_head=box_head,
        keypoints=config.keypoints,
        anchor_scale=config.anchor_scale,
        **settings,
    )


def count_parameters(model: nn.Module) -> int:
    """Values in all parameters of a model, frozen ones among them.

    Args:
        model: any module.

    Returns:
        Their number.

    Example:
        >>> from torch import nn
        >>> from dyhead_cuda.detection.models import count_parameters
        >>> count_parameters(nn.Conv2d(2, 3, 3))
        57
    """
    return sum(parameter.numel() for parameter in model.parameters())


def gflops(model: nn.Module, height: int, width: int) -> float:
    """Floating-point operations of one image [3, height, width] in evaluation, in 1e9.

    A multiply-add counts as two. Convolutions and matrix products count, as torch's
    ``FlopCounterMode`` has them: those of deformable convolutions, too, but not their
    interpolation. What runs counts: an attention that is left out runs with fixed values, at the
    same cost. The image is resized as the model does it; for a two-stage detector the number
    depends on how many proposals it makes.

    Args:
        model: a detector; its mode is left as it was.
        height, width: of the image, in pixels.

    Returns:
        10^9 operations.

    Example:
        >>> from dyhead_cuda.detection.models import ModelConfig, build, gflops
        >>> small = {"channels": 16, "blocks": 1, "last_level": 5, "min_size": 64, "max_size": 64}
        >>> model = build(ModelConfig("atss", 3, "timm/test_resnet.r160_in1k", **small))
        >>> gflops(model, 64, 64) > 0
        True
    """
    image = torch.rand(3, height, width, generator=torch.Generator().manual_seed(0))
    image = image.to(next(model.parameters()).device)
    training = model.training
    model.eval()
    try:
        # The counter has hooks for all modules, so blocks would log that they are not fused. The
        # reference fuses nothing, and counts the same.
        with torch.no_grad(), backend("reference"), FlopCounterMode(display=False) as counter:
            model([image])
    finally:
        model.train(training)
    return counter.get_total_flops() / 1e9
