"""The detector, data and training that all variants of the study share."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.study.variants import Variant
from dyhead_cuda.detection.data import DataConfig
from dyhead_cuda.detection.models import ModelConfig
from dyhead_cuda.detection.settings import Settings
from dyhead_cuda.detection.training import TrainConfig


@dataclass(frozen=True)
class Setup(Settings):
    """The training that every variant gets; JSON-able.

    Attributes:
        detector, backbone, channels, first_level, last_level: of all detectors.
        size, min_height: of the scenes and of the digits in them, pixels.
        images, val_images: scenes to train on and to measure AP on.
        steps, batch_size, lr, evaluations: of the training.
    """

    detector: str = "atss"
    backbone: str = "timm/test_resnet.r160_in1k"
    channels: int = 64
    first_level: int = 3
    last_level: int = 6
    size: int = 128
    min_height: int = 16
    images: int = 3000
    val_images: int = 250
    steps: int = 1000
    batch_size: int = 8
    lr: float = 2e-3
    evaluations: int = 3

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
                "heights": [self.min_height, 0.8 * self.size],
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


QUICK = Setup(channels=16, size=64, images=8, val_images=4, steps=2, batch_size=2, evaluations=1)
