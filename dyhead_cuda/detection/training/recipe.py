"""What follows from the settings of a training alone: rates, optimizer, order of the images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from dyhead_cuda.detection.data import DetectionDataset, Target
from dyhead_cuda.detection.names import Optimizer, Schedule
from dyhead_cuda.detection.training import random_state
from dyhead_cuda.detection.training.config import TrainConfig
from dyhead_cuda.modules import DyHeadBlock

# The published "1x" schedule has 12 epochs and lowers the rate after the 8th and the 11th.
DROPS, DROP_FACTOR = (8 / 12, 11 / 12), 0.1

WARMUP_START = 0.001  # of the learning rate, at the first step

MOMENTUM = 0.9  # of stochastic gradient descent


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of a step, the first being 0."""
    if step < config.warmup_steps:
        grown = (step + 1) / config.warmup_steps
        return config.lr * (WARMUP_START + (1 - WARMUP_START) * grown)
    return config.lr * _SCHEDULES[config.schedule](config, step)


def _cosine(config: TrainConfig, step: int) -> float:
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))


def _step(config: TrainConfig, step: int) -> float:
    drops = sum(step >= drop * config.steps for drop in DROPS)
    return DROP_FACTOR**drops


def evaluation_due(config: TrainConfig, step: int) -> bool:
    """Whether the model is evaluated after so many steps; see ``eval_every`` of the settings."""
    every, left = config.eval_every, config.steps - step
    return left == 0 or (every is not None and step > 0 and step % every == 0 and 2 * left >= every)


# The factor on the highest learning rate after the warmup.
_SCHEDULES: dict[Schedule, Callable[[TrainConfig, int], float]] = {
    "cosine": _cosine,
    "step": _step,
}


def _sgd(groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr, momentum=MOMENTUM)


_OPTIMIZERS: dict[Optimizer, Callable[[list[dict[str, Any]], float], torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "sgd": _sgd,
}


def make_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of the parameters that are trained.

    Each group has ``lr_factor``, by which its learning rate differs from that of the step.
    """
    factors = _lr_factors(config, model)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            decay = config.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((factors.get(parameter, 1.0), decay), []).append(parameter)
    if not groups:
        raise ValueError("expected a model with parameters to train, got one that is all frozen")
    options = [
        {"params": parameters, "lr_factor": factor, "weight_decay": decay}
        for (factor, decay), parameters in groups.items()
    ]
    return _OPTIMIZERS[config.optimizer](options, config.lr)


def _lr_factors(config: TrainConfig, model: nn.Module) -> dict[nn.Parameter, float]:
    """The factors on the learning rate of those parameters that have one."""
    slow: list[tuple[nn.Module, float]] = [
        (module.offset_conv, config.offset_lr)
        for module in model.modules()
        if isinstance(module, DyHeadBlock)
    ]
    if config.body_lr != 1:
        try:
            slow.append((model.get_submodule("backbone.body"), config.body_lr))
        except AttributeError:
            raise ValueError(
                f"expected a model with backbone.body for body_lr {config.body_lr}, got "
                f"{type(model).__name__}, which has none; set body_lr to 1"
            ) from None
    factors: dict[nn.Parameter, float] = {}
    for module, factor in slow:
        for parameter in module.parameters():
            factors[parameter] = factors.get(parameter, 1.0) * factor
    return factors


class Stream(Dataset[tuple[Tensor, Target]]):
    """An endless data set: one permutation of the images after another.

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
