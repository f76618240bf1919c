"""How a detector is trained: the settings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

from dyhead_cuda import checks
from dyhead_cuda.detection.names import DEVICES, Amp, Optimizer, Schedule
from dyhead_cuda.detection.settings import Settings


@dataclass(frozen=True)
class TrainConfig(Settings):
    """How to train; JSON-able.

    Args:
        steps: optimizer steps in all. A run that is there can be given more, see :func:`.train`.
        batch_size: images per step and process.
        optimizer: "adamw", or "sgd" with a momentum of 0.9.
        lr: the highest learning rate.
        offset_lr: factor on the learning rate of the convolutions that predict sampling offsets;
            usually small for deformable layers, whose samples else leave the image before they
            have learned.
        weight_decay: of weights; biases and normalisations have none.
        schedule: after the warmup "cosine", to 0, or "step", a tenth after 8/12 and 11/12 of the
            steps.
        warmup_steps: in which the learning rate grows linearly.
        clip_norm: gradients of a larger L2 norm are scaled down to it; None: never.
        amp: autocast: "off", "bf16", or "fp16" with a loss scale.
        seed: of the weights, of the order of the images and of what models draw.
        eval_every: steps between evaluations; None: only after the last. There is always one after
            the last step; one that is due within less than half of ``eval_every`` before it is
            left out.
        checkpoint_every: steps between checkpoints; also before each evaluation.
        workers: processes that load images; 0: the training's own process does.
        device: "auto" (GPUs where there are any), "cpu" or "cuda".
        deterministic: let torch raise an error for operations whose result varies from run to run,
            as some do on GPUs.
        body_lr: factor on the learning rate of the backbone's body (``model.backbone.body``), the
            part that has pretrained weights; usually 0.1 where it has them.
        ema: decay of an exponential moving average of the weights over the steps, such as 0.9998;
            0: none. Evaluations, the best weights and :func:`.load_model` then have the averaged
            weights. The decay grows to this value, see :mod:`.averaging`.

    Raises:
        ValueError: a setting is out of its range.

    Example:
        >>> from dyhead_cuda.detection import TrainConfig
        >>> config = TrainConfig(steps=1000, batch_size=4, schedule="step")
        >>> TrainConfig.from_dict(config.to_dict()) == config
        True
        >>> TrainConfig(steps=1000, optimizer="adam")
        Traceback (most recent call last):
            ...
        ValueError: expected optimizer to be one of ('adamw', 'sgd'), got 'adam'
    """

    steps: int
    batch_size: int = 8
    optimizer: Optimizer = "adamw"
    lr: float = 2e-4
    offset_lr: float = 0.1
    weight_decay: float = 0.05
    schedule: Schedule = "cosine"
    warmup_steps: int = 100
    clip_norm: float | None = 10.0
    amp: Amp = "off"
    seed: int = 0
    eval_every: int | None = None
    checkpoint_every: int = 100
    workers: int = 0
    device: str = "auto"
    deterministic: bool = False
    body_lr: float = 1.0
    ema: float = 0.0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("optimizer", get_args(Optimizer)),
            ("schedule", get_args(Schedule)),
            ("amp", get_args(Amp)),
            ("device", DEVICES),
        ):
            checks.one_of(name, getattr(self, name), allowed)
        for name in ("steps", "batch_size", "eval_every", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"expected {name} of at least 1, got {value}")
        for name in ("offset_lr", "body_lr", "weight_decay", "warmup_steps", "seed", "workers"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"expected {name} of at least 0, got {value}")
        for name in ("lr", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"expected a positive {name}, got {value}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"expected ema of at least 0 and below 1, got {self.ema}")
