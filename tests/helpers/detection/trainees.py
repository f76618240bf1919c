"""A tiny detector, data and metric for tests of the trainer.

``python -m tests.helpers.detection.trainees FOLDER STEPS KILLS`` trains, and is killed that often.
"""

from __future__ import annotations

import math
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from dyhead_cuda.detection.evaluation import Metrics
from dyhead_cuda.detection.training import trainer
from dyhead_cuda.detection.training.config import TrainConfig
from dyhead_cuda.detection.training.parallel import Processes, join
from dyhead_cuda.detection.training.runs import LAST, LOG, RunFolder, read_checkpoint

IMAGES = 7


class Pictures:
    """Random images, each with one box."""

    classes: tuple[str, ...] = ("thing",)
    category_ids: tuple[int, ...] = (1,)
    num_keypoints = 0
    coco: ClassVar[dict[str, Any]] = {}

    def __init__(self, seconds: float = 0) -> None:
        self.seconds = seconds
        generator = torch.Generator().manual_seed(3)
        self.images = torch.rand(IMAGES, 3, 8, 8, generator=generator)

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        time.sleep(self.seconds)
        boxes = torch.tensor([[1.0, 1.0, 5.0, 2.0 + index]])
        target = {"boxes": boxes, "labels": torch.ones(1, dtype=torch.int64)}
        return self.images[index], {**target, "image_id": torch.tensor(index)}


class Detector(nn.Module):
    """One box per image by a perceptron; with ``noise`` it draws from every generator."""

    def __init__(self, noise: float = 0.1) -> None:
        super().__init__()
        self.noise = noise
        self.hidden = nn.Linear(3 * 64, 8)
        self.norm = nn.BatchNorm1d(8) if noise else nn.Identity()
        self.box = nn.Linear(8, 4)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        found = self.box(self.norm(self.hidden(torch.stack(images).flatten(1)).tanh()))
        if targets is None:
            return [{"boxes": box[None]} for box in found]
        if self.noise:
            drawn = random.random() + np.random.rand() + torch.rand(len(images), 1)
            found = found + self.noise * drawn
        wanted = torch.cat([target["boxes"] for target in targets])
        error = found - wanted
        return {"centre": error[:, :2].square().mean(), "size": error[:, 2:].square().mean()}


def evaluate(model: Any, dataset: Pictures, **_: Any) -> Metrics:
    """The "AP" is highest where the boxes are right; it draws random numbers too."""
    torch.rand(3)
    model.eval()
    with torch.no_grad():
        found = torch.stack([d["boxes"][0] for d in model(list(dataset.images))])
    wanted = torch.cat([dataset[i][1]["boxes"] for i in range(len(dataset))])
    ap = float(torch.exp(-(found - wanted).abs().mean()))
    return Metrics({"AP": ap, "AP50": math.nan}, {"thing": ap}, None, [{"score": ap}])


def make_trainer(
    folder: Path,
    config: TrainConfig,
    processes: Processes,
    noise: float = 0.1,
    seconds: float = 0,
    detector: Detector | None = None,
) -> trainer.Trainer:
    """A trainer of a :class:`Detector`, whose metrics are those of ``evaluate`` above."""
    torch.manual_seed(config.seed)
    model = detector or Detector(noise)
    return trainer.Trainer(
        config, model, Pictures(seconds), Pictures(), RunFolder(folder), processes, evaluate
    )


def run(
    folder: Path,
    config: TrainConfig,
    listeners: Sequence[trainer.Listener] = (),
    restart: bool = False,
    **options: Any,
) -> Metrics:
    """Trains a :class:`Detector` in ``folder``, or goes on with it."""
    with join(config.device) as processes, ExitStack() as stack:
        trainer = make_trainer(folder, config, processes, **options)
        processes.on_first(lambda: stack.enter_context(trainer.folder.lock()))
        description = {"training": config.to_dict()}
        checkpoint = processes.on_first(lambda: trainer.folder.begin(description, restart))
        return trainer.run(description, checkpoint, listeners)


def recipe(steps: int = 12, **options: Any) -> TrainConfig:
    usual: dict[str, Any] = {
        "batch_size": 2,
        "lr": 0.01,
        "warmup_steps": 3,
        "device": "cpu",
        "eval_every": 4,
        "checkpoint_every": 3,
    }
    return TrainConfig(steps, **{**usual, **options})


def train_and_kill(folder: Path, config: TrainConfig, kills: int) -> None:
    """Starts to train ``kills`` times; each time ends by SIGKILL some steps further."""
    log = folder / LOG
    for kill in range(kills):
        wanted = (kill + 1) * config.steps // (kills + 1)
        child = os.fork()
        if child == 0:
            run(folder, config, seconds=0.001)
            os._exit(0)
        while not (log.exists() and log.read_bytes().count(b"\n") >= wanted):
            time.sleep(0.001)
        time.sleep(0.003 * kill)  # to hit other moments of a step
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"it ended by itself: {status}"
        if (folder / LAST).exists():
            read_checkpoint(folder / LAST)


if __name__ == "__main__":
    train_and_kill(
        Path(sys.argv[1]), recipe(int(sys.argv[2]), checkpoint_every=1), int(sys.argv[3])
    )
