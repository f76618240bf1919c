"""``python -m dyhead_cuda eval``: COCO average precision of a trained detector."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from dyhead_cuda.commands.common import fail, is_first, print_metrics, warnings_shown
from dyhead_cuda.commands.options import integer
from dyhead_cuda.detection.data import open_dataset
from dyhead_cuda.detection.evaluation import Metrics, evaluate
from dyhead_cuda.detection.training import parallel
from dyhead_cuda.detection.training.recipe import DataConfig
from dyhead_cuda.detection.training.runs import RunError, write_json
from dyhead_cuda.detection.training.trainer import load_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``python -m dyhead_cuda eval``."""
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="a folder that train wrote, or a checkpoint in it"
    )
    parser.add_argument(
        "--data", metavar="FOLDER", help="in COCO's format, its val split (default: the run's)"
    )
    parser.add_argument("--batch-size", type=integer(1), default=8, help="default: %(default)s")
    parser.add_argument("--workers", type=integer(0), default=0, help="load images")
    parser.add_argument("--device", choices=parallel.DEVICES, default="auto")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write metrics and all detections there"
    )


def run(arguments: argparse.Namespace) -> int:
    """Evaluates.

    Returns:
        0, or 2 if the checkpoint, the data or the device cannot be used.
    """
    console = Console(highlight=False, quiet=not is_first())
    try:
        with warnings_shown(console):
            metrics = _evaluate(arguments)
        if is_first():
            print_metrics(console, metrics, str(arguments.run))
            if arguments.json is not None:
                write_json(arguments.json, asdict(metrics))
    except (RunError, ValueError, OSError) as error:
        return fail(error) if is_first() else 2
    return 0


def _evaluate(arguments: argparse.Namespace) -> Metrics:
    with parallel.join(arguments.device) as processes:
        model, config = load_model(arguments.run, processes.device)
        if arguments.data is None:
            dataset = DataConfig.from_dict(config["data"]).open("val")
        else:
            dataset = open_dataset(arguments.data, "val")
        if list(dataset.classes) != config["classes"]:
            raise ValueError(
                f"expected data of the classes that the model knows, {', '.join(config['classes'])}"
                f", got {', '.join(dataset.classes)}"
            )
        return evaluate(
            model,
            dataset,
            device=processes.device,
            batch_size=arguments.batch_size,
            workers=arguments.workers,
        )
