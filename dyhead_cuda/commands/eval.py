"""``python -m dyhead_cuda eval``: COCO average precision of a trained detector."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from dyhead_cuda.commands.common import (
    fail,
    fail_for_memory,
    is_first,
    print_metrics,
    warnings_shown,
)
from dyhead_cuda.detection.data import DataConfig, open_dataset
from dyhead_cuda.detection.evaluation import Metrics, evaluate
from dyhead_cuda.detection.files import write_json
from dyhead_cuda.detection.training import parallel
from dyhead_cuda.detection.training.errors import RankError, RunError
from dyhead_cuda.detection.training.trainer import load_model
from dyhead_cuda.detection.tta import TestTimeAugmentation


def run(arguments: argparse.Namespace) -> int:
    """Evaluates.

    Returns:
        0; 1 if another process has ended; 2 if the checkpoint, the data or the device cannot be
        used.
    """
    console = Console(highlight=False, quiet=not is_first())
    try:
        _check_json(arguments.json)
        with warnings_shown(console):
            metrics = _evaluate(arguments)
        if is_first():
            print_metrics(console, metrics, str(arguments.run))
            if arguments.json is not None:
                write_json(arguments.json, asdict(metrics))
    except RankError as error:
        return fail(error, 1)
    except (RunError, ValueError, OSError) as error:
        return fail(error) if is_first() else 2
    except (MemoryError, RuntimeError) as error:
        return fail_for_memory(error, "lower --batch-size or --workers")
    return 0


def _check_json(path: Path | None) -> None:
    """Raises ValueError unless it can be a file: it is written only after the evaluation."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise ValueError(f"expected --json as a file in a folder that is there, got {path}")


def _own_data(config: dict[str, Any], run: Path) -> DataConfig:
    """The data that a run has learned from."""
    try:
        return DataConfig.from_dict(config["data"])
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"the checkpoint of {run} does not say what it was trained on "
            f"({type(error).__name__}: {error}); name the data with --data"
        ) from None


def _evaluate(arguments: argparse.Namespace) -> Metrics:
    with parallel.join(arguments.device) as processes:
        model, config = load_model(arguments.run, processes.device)
        if arguments.data is None:
            dataset = _own_data(config, arguments.run).open("val")
        else:
            dataset = open_dataset(arguments.data, "val")
        if list(dataset.classes) != config["classes"]:
            raise ValueError(
                f"expected data of the classes that the model knows, {', '.join(config['classes'])}"
                f", got {', '.join(dataset.classes)}"
            )
        return evaluate(
            TestTimeAugmentation(model, arguments.scales, arguments.flip),
            dataset,
            device=processes.device,
            batch_size=arguments.batch_size,
            workers=arguments.workers,
        )
