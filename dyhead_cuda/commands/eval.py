"""``python -m dyhead_cuda eval``: COCO average precision of a trained detector."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from rich.console import Console

from dyhead_cuda.commands.common import fail, is_first, print_metrics, warnings_shown
from dyhead_cuda.detection.data import DataConfig, open_dataset
from dyhead_cuda.detection.evaluation import Metrics, evaluate
from dyhead_cuda.detection.training import parallel
from dyhead_cuda.detection.training.runs import RunError, write_json
from dyhead_cuda.detection.training.trainer import load_model


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
