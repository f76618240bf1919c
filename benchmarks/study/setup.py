"""The detector, data and training that all variants of the study share, and its trainings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.study.variants import VARIANTS, Variant
from dyhead_cuda.detection.data import DataConfig
from dyhead_cuda.detection.models import ModelConfig
from dyhead_cuda.detection.settings import Settings
from dyhead_cuda.detection.training import TrainConfig

RUNS, SEARCH = "runs", "search"  # folders
SEARCH_SEED = 100  # none of the study's own, so that no row is tuned to a seed that it is judged by


@dataclass(frozen=True)
class Trial:
    """One training: of the study, or of the search for the learning rate of a row.

    Attributes:
        name: of :data:`~benchmarks.study.variants.VARIANTS`.
        seed: draws the weights and the order of the images.
        lr: the highest learning rate.
        steps: of the training.
        search: whether it belongs to the search.
    """

    name: str
    seed: int
    lr: float
    steps: int
    search: bool = False

    @property
    def path(self) -> str:
        """Of its files, in the folder of results and in that of trainings."""
        if self.search:
            return f"{SEARCH}/{self.name}-lr-{self.lr:g}"
        return f"{RUNS}/{self.name}-seed-{self.seed}"

    @property
    def title(self) -> str:
        """For people."""
        what = f"lr {self.lr:g}, {self.steps} steps" if self.search else f"seed {self.seed}"
        return f"{VARIANTS[self.name].label}, {what}"


@dataclass(frozen=True)
class Setup(Settings):
    """What every variant gets; JSON-able.

    Attributes:
        backbone, weights, frozen_stages, backbone_last_level, first_level, last_level, channels,
            anchor_scale: of all detectors, see :class:`~dyhead_cuda.detection.ModelConfig`.
        size, heights: of the scenes and of the objects in them, pixels.
        background, max_angle: of the scenes, see :class:`~dyhead_cuda.detection.DigitScenes`.
        objects: the folder of :class:`~dyhead_cuda.detection.CutoutScenes`; None: digits.
        num_classes: of the objects.
        images, val_images: scenes to train on and to measure on.
        steps, batch_size, body_lr, ema, evaluations: of the training, see
            :class:`~dyhead_cuda.detection.TrainConfig`.
        rates, search_steps: what each row's learning rate is chosen from, and the length of the
            trainings that choose it.
    """

    backbone: str = "efficientnet_lite0"
    weights: str | None = "DEFAULT"
    frozen_stages: int = 2
    backbone_last_level: int | None = 4
    first_level: int = 3
    last_level: int = 6
    channels: int = 64
    anchor_scale: float | None = 4.0
    size: int = 256
    heights: tuple[float, float] = (16, 204)
    background: str = "photographs"
    max_angle: float = 15
    objects: str | None = None
    num_classes: int = 10
    images: int = 4000
    val_images: int = 300
    steps: int = 600
    batch_size: int = 4
    body_lr: float = 0.1
    ema: float = 0.998
    evaluations: int = 4
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    search_steps: int = 200

    def __post_init__(self) -> None:
        for name in ("heights", "rates"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON has lists

    def search(self, names: Iterable[str]) -> list[Trial]:
        """The trainings that choose the learning rate of some rows."""
        return [
            Trial(name, SEARCH_SEED, lr, self.search_steps, search=True)
            for name in names
            for lr in self.rates
        ]

    def run(self, name: str, seed: int, lr: float) -> Trial:
        """A training of the study."""
        return Trial(name, seed, lr, self.steps)

    def settings(self, trial: Trial) -> dict[str, dict[str, Any]]:
        """All that determines a training, by the configuration that it belongs to."""
        return {
            "model": self._model(VARIANTS[trial.name]),
            "data": self._data(),
            "training": {
                "steps": trial.steps,
                "batch_size": self.batch_size,
                "lr": trial.lr,
                "body_lr": self.body_lr,
                "ema": self.ema,
                "seed": trial.seed,
                "eval_every": max(1, trial.steps // (1 if trial.search else self.evaluations)),
            },
        }

    def model(self, variant: Variant) -> ModelConfig:
        """The detector of a variant."""
        return ModelConfig.from_dict(self._model(variant))

    def data(self) -> DataConfig:
        """The scenes, the same for every training."""
        return DataConfig.from_dict(self._data())

    def training(self, trial: Trial, device: str) -> TrainConfig:
        """The recipe of a training."""
        return TrainConfig.from_dict({**self.settings(trial)["training"], "device": device})

    def _model(self, variant: Variant) -> dict[str, Any]:
        shared = (
            "num_classes",
            "backbone",
            "weights",
            "frozen_stages",
            "backbone_last_level",
            "first_level",
            "last_level",
            "channels",
            "anchor_scale",
        )
        return {
            "detector": "atss",
            **{name: getattr(self, name) for name in shared},
            "min_size": self.size,
            "max_size": self.size,
            **variant.settings(),
        }

    def _data(self) -> dict[str, Any]:
        pictures = {} if self.objects is None else {"path": self.objects}
        return {
            "spec": "cutouts" if pictures else "digits",
            "options": {
                **pictures,
                "size": [self.size, self.size],
                "heights": list(self.heights),
                "background": self.background,
                "max_angle": self.max_angle,
                "cache": True,
            },
            "train": {"num_images": self.images},
            "val": {"num_images": self.val_images},
        }


def fingerprint(settings: Mapping[str, Any]) -> str:
    """What tells whether results are of the same settings; they are JSON-able."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


QUICK = Setup(
    backbone="timm/test_resnet.r160_in1k",
    weights=None,
    frozen_stages=0,
    backbone_last_level=None,
    channels=16,
    size=64,
    heights=(12, 48),
    background="paper",
    images=8,
    val_images=4,
    steps=2,
    batch_size=2,
    evaluations=2,
    search_steps=1,
)
