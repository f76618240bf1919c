"""What the Dynamic Head of a detector attends to on an image, in that image's coordinates.

Coordinates are those of boxes: x and y in pixels from the upper left corner of the image. Pixel i
of a level is centred on pixel i * stride of what the backbone reads, as in ResNets and for
torchvision's anchors; pixel j of an image spans j to j + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import nms

from dyhead_cuda.detection.models.adapters import has_area
from dyhead_cuda.detection.prediction import shown_name
from dyhead_cuda.inspect import record
from dyhead_cuda.inspect.record import BRANCHES
from dyhead_cuda.modules import DyHead, DynamicReLU
from dyhead_cuda.pyramid import HighOffset, Upsample, repack, unpack

SAME_OBJECT = 0.5  # intersection over union


@dataclass(frozen=True)
class Frame:
    """From pixels of the levels to the image and back; sizes are (width, height) in pixels."""

    strides: tuple[int, ...]
    image: tuple[int, int]
    resized: tuple[int, int]  # what the transform made of it, without the padding

    def to_image(self, level: int, positions: Tensor) -> Tensor:
        """Positions [P, 2], y before x in pixels of a level, as [P, 2], x before y in the image."""
        scale = torch.tensor(self.image).double() / torch.tensor(self.resized)
        return (positions.double().flip(1) * self.strides[level] + 0.5) * scale

    def to_level(self, level: int, x: float, y: float) -> tuple[int, int]:
        """Row and column of the pixel of a level that is nearest to a place in the image.

        Raises:
            ValueError: a place outside the image.
        """
        width, height = self.image
        if not (0 <= x <= width and 0 <= y <= height):
            raise ValueError(f"expected a point in the {width} x {height} image, got {x:g},{y:g}")
        stride = self.strides[level]
        nearest = []
        for value, side, resized in ((y, height, self.resized[1]), (x, width, self.resized[0])):
            last = (resized - 1) // stride
            nearest.append(min(round(max(0.0, value * resized / side - 0.5) / stride), last))
        return nearest[0], nearest[1]


@dataclass(frozen=True)
class Point:
    """A pixel of a level whose readings are of interest."""

    x: float  # in the image
    y: float
    level: int
    text: str  # what it is, for a reader
    box: tuple[float, float, float, float] | None = None  # xyxy, where it is a detection


class Observation:
    """One image through a detector; made by :func:`observe`.

    Attributes:
        boxes, scores, labels: the detections [m, 4] xyxy in the image, [m], [m], best first.
        blocks: per block, per level: a :class:`~dyhead_cuda.inspect.record.LevelRecord`.
        attentions: those that are in use, of "scale", "spatial" and "task".
        task_elsewhere: whether the detector has its task attention after the RoI pooling.
        high_offset: the head's.
        upsample: the head's.
        frame: the coordinates.
    """

    def __init__(
        self,
        model: nn.Module,
        head: DyHead,
        inputs: Sequence[Tensor],
        maps: Sequence[Tensor],
        detections: dict[str, Tensor],
        frame: Frame,
    ) -> None:
        order = detections["scores"].detach().argsort(descending=True, stable=True)
        order = order[has_area(detections["boxes"])[order]]
        boxes, scores = detections["boxes"][order], detections["scores"][order]
        # A score of exactly 1 has no gradient; the corners of its box have.
        self._evidence = scores + boxes.sum(1)
        self._maps = list(maps)
        self.boxes, self.scores = boxes.detach().cpu(), scores.detach().cpu()
        self.labels = detections["labels"][order].cpu()
        self.blocks = record.record(head, list(inputs))
        first = record.blocks_of(head)[0]
        self.attentions = first.attentions
        self.high_offset: HighOffset = first.high_offset
        self.upsample: Upsample = first.upsample
        own = set(head.modules())
        self.task_elsewhere = any(
            isinstance(module, DynamicReLU) and module not in own for module in model.modules()
        )
        self.frame = frame

    @property
    def level_names(self) -> tuple[str, ...]:
        """P3 for stride 8, and so on."""
        return tuple(f"P{stride.bit_length() - 1}" for stride in self.frame.strides)

    def best(self, count: int) -> list[int]:
        """The ``count`` best detections, without those of an object that a better one is of."""
        apart = nms(self.boxes, self.scores, SAME_OBJECT)
        return [int(index) for index in apart[:count]]

    def level_of(self, index: int) -> int:
        """The level from which detection ``index`` was made: the one its gradient flows to."""
        gradients = torch.autograd.grad(
            self._evidence[index], self._maps, retain_graph=True, allow_unused=True
        )
        strengths = [0.0 if g is None else float(g.abs().sum()) for g in gradients]
        return strengths.index(max(strengths))

    def detected(self, index: int, classes: Sequence[str] = ()) -> Point:
        """The centre of detection ``index``, at the level from which it was made.

        Args:
            index: 0 is the one with the best score.
            classes: names of labels 1, 2, ...

        Raises:
            ValueError: no such detection.
        """
        if not len(self.boxes):
            raise ValueError(f"expected detection {index}, but no object was detected; show places")
        if not 0 <= index < len(self.boxes):
            raise ValueError(f"expected a detection from 0 to {len(self.boxes) - 1}, got {index}")
        left, top, right, bottom = self.boxes[index].tolist()
        label = int(self.labels[index])
        name = classes[label - 1] if 0 < label <= len(classes) else str(label)
        text = f"{shown_name(name)}, score {float(self.scores[index]):.2f}"
        box = (left, top, right, bottom)
        return Point((left + right) / 2, (top + bottom) / 2, self.level_of(index), text, box)

    def place(self, x: float, y: float, level: int | None = None) -> Point:
        """A place in the image at a level; by default that of the smallest box around it.

        Outside all boxes the default is the finest level.
        """
        if level is None:
            left, top, right, bottom = self.boxes.unbind(1)
            around = (left <= x) & (x <= right) & (top <= y) & (y <= bottom)
            area = torch.where(around, (right - left) * (bottom - top), torch.inf)
            level = self.level_of(int(area.argmin())) if around.any() else 0
        return Point(x, y, level, f"place {x:g},{y:g}")

    def samples(self, block: int, point: Point) -> dict[str, record.Samples]:
        """Where the branches of a block read for a point; see :func:`record.samples`."""
        row, column = self.frame.to_level(point.level, point.x, point.y)
        return record.samples(
            self.blocks[block], point.level, row, column, self.high_offset, self.upsample
        )


def head_of(model: nn.Module) -> DyHead:
    """The Dynamic Head of a detector.

    Raises:
        ValueError: it has none.
    """
    head = getattr(getattr(model, "backbone", None), "dyhead", None)
    if not isinstance(head, DyHead):
        raise ValueError(
            f"expected a detector with a Dynamic Head at model.backbone.dyhead, got a "
            f"{type(model).__name__} without one; train one with --blocks 1 or more"
        )
    return head


def observe(model: nn.Module, image: Tensor) -> Observation:
    """Runs a detector on one image and keeps what its Dynamic Head does.

    Args:
        model: a detector as :func:`dyhead_cuda.detection.build` makes them: torchvision's
            interface, ``transform``, ``backbone.dyhead`` and ``backbone.strides``. Its mode is
            left as it was.
        image: float32 [3, H, W], RGB in 0 to 1.

    Raises:
        ValueError: a detector without a Dynamic Head.
    """
    head = head_of(model)
    strides = tuple(int(stride) for stride in model.backbone.strides)  # type: ignore[union-attr]
    seen: dict[str, Any] = {}

    def keep_size(_: nn.Module, __: Any, output: Any) -> None:
        seen["resized"] = output[0].image_sizes[0]

    def keep_maps(_: nn.Module, arguments: Any, output: Any) -> Any:
        seen["inputs"] = [x.detach() for x in unpack(arguments[0])]
        seen["maps"] = [x.detach().requires_grad_() for x in unpack(output)]
        return repack(output, seen["maps"])

    training = model.training
    hooks = [
        model.transform.register_forward_hook(keep_size),  # type: ignore[union-attr]
        head.register_forward_hook(keep_maps),
    ]
    try:
        with torch.enable_grad():
            (detections,) = model.eval()([image])
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    height, width = (int(side) for side in seen["resized"])
    frame = Frame(strides, (image.shape[-1], image.shape[-2]), (width, height))
    return Observation(model, head, seen["inputs"], seen["maps"], detections, frame)


def to_dict(observation: Observation, points: Sequence[Point]) -> dict[str, Any]:
    """The numbers of the picture, as JSON takes them; blocks count from 1."""
    frame, names = observation.frame, observation.level_names
    return {
        "image_size": list(frame.image),
        "resized_size": list(frame.resized),
        "strides": list(frame.strides),
        "attentions": list(observation.attentions),
        "high_offset": observation.high_offset,
        "points": [
            {"x": p.x, "y": p.y, "level": names[p.level], "text": p.text, "box": p.box}
            for p in points
        ],
        "blocks": [
            {
                "block": index + 1,
                "levels": {
                    name: _level_numbers(level) for name, level in zip(names, levels, strict=True)
                },
                "samples": [_sample_numbers(observation, index, point) for point in points],
            }
            for index, levels in enumerate(observation.blocks)
        ],
    }


def _level_numbers(level: record.LevelRecord) -> dict[str, Any]:
    energy = level.energy_output
    return {
        "gates": {name: round(gate, 6) for name, gate in level.gates.items()},
        "coefficients": dict(
            zip(("a1", "b1", "a2", "b2"), _rounded(level.coefficients), strict=True)
        ),
        "share_of_first": _rounded(level.share),
        "energy": {"mean": round(float(energy.mean()), 6), "max": round(float(energy.max()), 6)},
    }


def _sample_numbers(observation: Observation, block: int, point: Point) -> dict[str, Any]:
    found = observation.samples(block, point)
    return {
        name: {
            "level": observation.level_names[found[name].level],
            "taps": found[name].taps.tolist(),
            "xy": _rounded(observation.frame.to_image(found[name].level, found[name].positions)),
            "weights": _rounded(found[name].weights),
        }
        for name in BRANCHES
        if name in found
    }


def _rounded(values: Tensor) -> Any:
    return (values.double() * 1e4).round().div(1e4).tolist()
