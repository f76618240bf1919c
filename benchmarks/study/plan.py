"""What the study compares, and the training that all of it gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dyhead_cuda.detection.models.config import ModelConfig
from dyhead_cuda.detection.training.recipe import DataConfig, TrainConfig
from dyhead_cuda.modules import ATTENTIONS, Attention
from dyhead_cuda.pyramid import HIGH_OFFSETS, HighOffset


@dataclass(frozen=True)
class Variant:
    """A detector of the study; what is not said here is the same for all.

    Attributes:
        label: in tables and plots.
        blocks: of the Dynamic Head; 0 is the plain head, two towers of four convolutions.
        attentions, high_offset: see :class:`dyhead_cuda.DyHead`.
    """

    label: str
    blocks: int
    attentions: tuple[Attention, ...] = ATTENTIONS
    high_offset: HighOffset = "flat"


@dataclass(frozen=True)
class Table:
    """Variants that are compared with each other; differences are to the first."""

    title: str
    variants: tuple[str, ...]


# Blocks of the detectors that differ in something else than their number.
_BLOCKS = 2
_WHOLE = f"dyhead-{_BLOCKS}"


def _with(*attentions: Attention) -> Variant:
    return Variant(" + ".join(attentions) or "no attention", _BLOCKS, attentions)


VARIANTS: dict[str, Variant] = {
    "plain": Variant("plain head", 0),
    **{f"dyhead-{n}": Variant(f"DyHead, {n} block{'s' * (n > 1)}", n) for n in (1, 2, 4, 6)},
    "none": _with(),
    "scale": _with("scale"),
    "spatial": _with("spatial"),
    "task": _with("task"),
    "scale-spatial": _with("scale", "spatial"),
    **{
        name.replace("_", "-"): Variant(f'high_offset="{name}"', _BLOCKS, high_offset=name)  # type: ignore[arg-type]
        for name in HIGH_OFFSETS
        if name != "flat"
    },
}

TABLES: dict[str, Table] = {
    "depth": Table("Blocks", ("plain", "dyhead-1", "dyhead-2", "dyhead-4", "dyhead-6")),
    "attentions": Table(
        f"Attentions, {_BLOCKS} blocks",
        ("none", "scale", "spatial", "task", "scale-spatial", _WHOLE),
    ),
    "high_offset": Table(
        f"Offsets of the coarser branch, {_BLOCKS} blocks",
        (_WHOLE, "crop", "mmdet-main", "aligned"),
    ),
}


@dataclass(frozen=True)
class Plan:
    """The training that every variant gets; JSON-able.

    Attributes:
        detector, backbone, channels, first_level, last_level: of all detectors.
        size, least_height: of the scenes and of the digits in them, pixels.
        images, val_images: scenes to train on and to measure AP on.
        steps, batch_size, lr, evaluations: of the training.
    """

    detector: str = "atss"
    backbone: str = "timm/test_resnet.r160_in1k"
    channels: int = 64
    first_level: int = 3
    last_level: int = 6
    size: int = 128
    least_height: int = 16
    images: int = 3000
    val_images: int = 250
    steps: int = 1000
    batch_size: int = 8
    lr: float = 2e-3
    evaluations: int = 3

    def to_dict(self) -> dict[str, Any]:
        """All values, as JSON has them."""
        return asdict(self)

    def model(self, variant: Variant) -> ModelConfig:
        """The detector of a variant."""
        return ModelConfig(
            self.detector,
            num_classes=10,
            backbone=self.backbone,
            first_level=self.first_level,
            last_level=self.last_level,
            channels=self.channels,
            blocks=variant.blocks,
            attentions=variant.attentions,
            high_offset=variant.high_offset,
            min_size=self.size,
            max_size=self.size,
        )

    def data(self) -> DataConfig:
        """The scenes, the same for every run."""
        return DataConfig(
            "digits",
            {
                "size": [self.size, self.size],
                "heights": [self.least_height, 0.8 * self.size],
                "cache": True,
            },
            {"num_images": self.images},
            {"num_images": self.val_images},
        )

    def training(self, seed: int, device: str) -> TrainConfig:
        """The recipe; ``seed`` draws the weights and the order of the images."""
        return TrainConfig(
            steps=self.steps,
            batch_size=self.batch_size,
            lr=self.lr,
            seed=seed,
            device=device,
            eval_every=max(1, self.steps // self.evaluations),
            checkpoint_every=max(1, self.steps // self.evaluations),
        )


QUICK = Plan(channels=16, size=64, images=8, val_images=4, steps=2, batch_size=2, evaluations=1)


def variants_of(tables: Sequence[str]) -> list[str]:
    """The variants in some tables, each once."""
    return list(dict.fromkeys(name for table in tables for name in TABLES[table].variants))
