"""How a detector is trained: the settings, and what follows from them alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from dyhead_cuda import checks
from dyhead_cuda.detection.data import (
    DetectionDataset,
    HorizontalFlip,
    Split,
    Target,
    open_dataset,
)
from dyhead_cuda.detection.training import random_state
from dyhead_cuda.detection.training.parallel import DEVICES
from dyhead_cuda.modules import DyHeadBlock

Optimizer = Literal["adamw", "sgd"]
Schedule = Literal["cosine", "step"]
Amp = Literal["off", "bf16", "fp16"]

# Of the published "1x" schedule of 12 epochs: lower after the 8th and after the 11th.
DROPS, DROP_FACTOR = (8 / 12, 11 / 12), 0.1

WARMUP_START = 0.001  # of the learning rate, at the first step


@dataclass(frozen=True)
class TrainConfig:
    """How to train; JSON-able.

    Args:
        steps: optimizer steps in all.
        batch_size: images per step and process.
        optimizer: "adamw", or "sgd" with a momentum of 0.9.
        lr: the highest learning rate.
        offset_lr: of the convolutions that predict sampling offsets, as a part of ``lr``; usual for
            deformable layers, whose samples else leave the image before they have learned.
        weight_decay: of weights; biases and normalisations have none.
        schedule: after the warmup "cosine", to 0, or "step", a tenth after 8/12 and 11/12 of the
            steps.
        warmup_steps: in which the learning rate grows linearly.
        clip_norm: gradients of a larger L2 norm are scaled down to it; None: never.
        amp: autocast: "off", "bf16", or "fp16" with a loss scale.
        seed: of the weights, of the order of the images and of what models draw.
        eval_every: steps between evaluations; None: only after the last.
        checkpoint_every: steps between checkpoints; also before each evaluation.
        workers: processes that load images; 0: none of their own.
        device: "auto" (GPUs where there are any), "cpu" or "cuda".
        deterministic: have torch refuse operations whose result varies from run to run.

    Raises:
        ValueError: a setting is out of its range.
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
        for name in ("offset_lr", "weight_decay", "warmup_steps", "seed", "workers"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"expected {name} of at least 0, got {value}")
        for name in ("lr", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"expected a positive {name}, got {value}")

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON has them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: settings that there are not, or no steps.
        """
        unknown = values.keys() - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"expected settings of TrainConfig, got {', '.join(sorted(unknown))}")
        if "steps" not in values:
            raise ValueError("expected the setting steps, got none")
        return cls(**values)


@dataclass(frozen=True)
class DataConfig:
    """The data sets of a run; JSON-able.

    Args:
        spec: "digits" or a folder, for :func:`dyhead_cuda.detection.data.open_dataset`.
        options: its options, for both splits.
        train, val: more options for one split.
        flip: mirror half of the training images, at random.
    """

    spec: str
    options: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    val: dict[str, Any] = field(default_factory=dict)
    flip: bool = False

    def open(self, split: Split) -> DetectionDataset:
        """The data set of one split.

        Raises:
            ValueError: it cannot be read, or cannot be mirrored.
        """
        dataset = open_dataset(self.spec, split, **self.options, **getattr(self, split))
        return HorizontalFlip(dataset) if self.flip and split == "train" else dataset

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON has them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DataConfig:
        """The inverse of :meth:`to_dict`."""
        return cls(**values)


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of a step, the first being 0."""
    if step < config.warmup_steps:
        grown = (step + 1) / config.warmup_steps
        return config.lr * (WARMUP_START + (1 - WARMUP_START) * grown)
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * done))
    drops = sum(step >= drop * config.steps for drop in DROPS)
    return config.lr * DROP_FACTOR**drops


def make_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of the parameters that are trained.

    Each group has ``lr_factor``, by which its learning rate differs from that of the step.
    """
    slow = {
        parameter
        for module in model.modules()
        if isinstance(module, DyHeadBlock)
        for parameter in module.offset_conv.parameters()
    }
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            decay = config.weight_decay if parameter.ndim > 1 else 0.0
            factor = config.offset_lr if parameter in slow else 1.0
            groups.setdefault((factor, decay), []).append(parameter)
    if not groups:
        raise ValueError("expected a model with parameters to train, got one that is all frozen")
    options = [
        {"params": parameters, "lr_factor": factor, "weight_decay": decay}
        for (factor, decay), parameters in groups.items()
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(options, config.lr, momentum=0.9)
    return torch.optim.AdamW(options, config.lr)


class Stream(Dataset[tuple[Tensor, Target]]):
    """A data set without an end: one permutation of its images after another.

    Item ``position`` depends on the seed and the position alone, even where reading it draws random
    numbers (mirrored or not), in whatever process and order it is read.

    Args:
        dataset: what to permute.
        seed: of the permutations, one per epoch, and of what items draw.

    Raises:
        ValueError: there are no images.
    """

    def __init__(self, dataset: DetectionDataset, seed: int) -> None:
        if not len(dataset):
            raise ValueError("expected at least one image to train on, got none")
        self.dataset, self.seed = dataset, seed
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def index(self, position: int) -> int:
        """Which item of the data set is at ``position``."""
        epoch, place = divmod(position, len(self.dataset))
        if epoch != self._epoch:
            rng = np.random.default_rng((self.seed, epoch))
            self._epoch, self._order = epoch, rng.permutation(len(self.dataset))
        return int(self._order[place])

    def __getitem__(self, position: int) -> tuple[Tensor, Target]:
        draws = np.random.SeedSequence((self.seed, position), spawn_key=(1,))
        with random_state.kept():
            random_state.seed(int(draws.generate_state(1)[0]))
            return self.dataset[self.index(position)]


def batches(
    config: TrainConfig, start: int, rank: int = 0, processes: int = 1
) -> Iterator[list[int]]:
    """The positions in the :class:`Stream` that one process takes in each step.

    What all processes take together is what one would take with a batch of that size.

    Args:
        config: its batch size and steps.
        start: the first step.
        rank, processes: this process among how many.
    """
    for step in range(start, config.steps):
        first = (step * processes + rank) * config.batch_size
        yield list(range(first, first + config.batch_size))
