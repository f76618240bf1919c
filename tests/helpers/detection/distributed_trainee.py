"""One of the processes of test_distributed_training.py: what is done in each, with its results.

Under torchrun: ``-m tests.helpers.detection.distributed_trainee FOLDER``.
"""

from __future__ import annotations

import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dyhead_cuda.detection.training.parallel import Processes, join
from dyhead_cuda.detection.training.runs import RunError
from dyhead_cuda.detection.training.trainer import Interrupted, TrainingError
from tests.helpers.detection.trainees import Detector, make_trainer, recipe, run

WORLD = 2
ONE_STEP: dict[str, Any] = {"steps": 1, "warmup_steps": 0, "clip_norm": None, "optimizer": "sgd"}


def one_step(folder: Path, processes: Processes, batch_size: int) -> dict[str, Tensor]:
    """Gradients and weights after a step of a detector whose losses are means over images."""
    config = recipe(**ONE_STEP, batch_size=batch_size)
    trainer = make_trainer(folder, config, processes, noise=0)
    trainer.run({"training": config.to_dict()})
    results = {}
    for name, parameter in trainer.model.named_parameters():
        results[name] = parameter.detach()
        if parameter.grad is not None:
            results[f"{name}.grad"] = parameter.grad
    return results


def averaged(folder: Path, processes: Processes) -> dict[str, Tensor]:
    """The averages of weights and statistics, after an evaluation."""
    config = recipe(3, ema=0.5)
    trainer = make_trainer(folder, config, processes)
    trainer.run({"training": config.to_dict()})
    state: dict[str, Tensor] = trainer.result.state_dict()
    return state


def interrupt(record: dict[str, Any]) -> None:
    """A listener, which only the first process has."""
    if record["step"] == 5:
        os.kill(os.getpid(), signal.SIGTERM)


class BadInOne(Detector):
    """The loss of one process is nan in its third step."""

    calls = 0

    def forward(self, images: Any, targets: Any = None) -> Any:
        losses = super().forward(images, targets)
        self.calls += targets is not None
        if self.calls == 3 and os.environ["RANK"] == "1":
            losses["size"] = losses["size"] * math.nan
        return losses


def error_of(expected: type[Exception], folder: Path, **options: Any) -> str:
    """The message of the error that the run must end with."""
    try:
        run(folder, **options)
    except expected as error:
        return str(error)
    raise AssertionError(f"expected {expected.__name__}")


def main(folder: Path) -> None:
    """Runs all cases; each process writes its results."""
    torch.set_num_threads(1)
    with join("cpu") as processes:
        results: dict[str, Any] = {"one step": one_step(folder / "step", processes, 2)}
        results["average"] = averaged(folder / "average", processes)
        run(folder / "whole", recipe(ema=0.5))
        results["interrupted"] = error_of(
            Interrupted, folder / "stopped", config=recipe(ema=0.5), listeners=[interrupt]
        )
        run(folder / "stopped", recipe(ema=0.5))
        results["differs"] = error_of(RunError, folder / "stopped", config=recipe(ema=0.5, lr=0.5))
        results["nan"] = error_of(
            TrainingError, folder / "nan", config=recipe(), detector=BadInOne(0.1)
        )
        torch.save(results, folder / f"rank{processes.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
