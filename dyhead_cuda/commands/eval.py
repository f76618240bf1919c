"""``python -m dyhead_cuda eval``: COCO average precision of a trained detector."""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
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
from dyhead_cuda.detection.data import DataConfig, DetectionDataset, open_dataset
from dyhead_cuda.detection.evaluation import Metrics, evaluate
from dyhead_cuda.detection.files import write_json
from dyhead_cuda.detection.names import SPLITS
from dyhead_cuda.detection.trained import load_model
from dyhead_cuda.detection.training import parallel
from dyhead_cuda.detection.training.errors import RankError, RunError
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
    except (RunError, ValueError, OSError, ImportError) as error:
        return fail(error) if is_first() else 2
    except (MemoryError, RuntimeError) as error:
        return fail_for_memory(error, "lower --batch-size or --workers")
    return 0


def _check_json(path: Path | None) -> None:
    """Raises ValueError unless it can be a file: it is written only after the evaluation."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise ValueError(f"expected --json as a file in a folder that is there, got {path}")


def _own_data(config: dict[str, Any], run: str | Path) -> DataConfig:
    """The data that a run has learned from."""
    try:
        return DataConfig.from_dict(config["data"])
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"the checkpoint of {run} does not say what it was trained on "
            f"({type(error).__name__}: {error}); name the data with --data"
        ) from None


def _dataset(arguments: argparse.Namespace, config: dict[str, Any]) -> DetectionDataset:
    """The data that the options ask for."""
    given = {"annotations": arguments.annotations, "images": arguments.images_folder}
    options = {name: path for name, path in given.items() if path is not None}
    if arguments.data is not None:
        if arguments.data == "digits" and options:
            raise ValueError("--annotations, --images-folder: only for --data FOLDER")
        return open_dataset(arguments.data, arguments.split, **options)
    if options:
        raise ValueError("--annotations, --images-folder: name the folder, too, with --data FOLDER")
    own = _own_data(config, arguments.run)
    if arguments.split in SPLITS:
        plain = replace(own, flip=False, scale_jitter=None, jitter_size=None)
        return plain.open(arguments.split)
    return open_dataset(own.spec, arguments.split, **own.options)


def _evaluate(arguments: argparse.Namespace) -> Metrics:
    with parallel.join(arguments.device) as processes:
        model, config = load_model(arguments.run, processes.device)
        dataset = _dataset(arguments, config)
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
