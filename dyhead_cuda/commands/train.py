"""``python -m dyhead_cuda train``: trains a detector, or resumes a run."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from dyhead_cuda.commands import train_settings
from dyhead_cuda.commands.common import (
    fail,
    fail_for_memory,
    is_first,
    print_metrics,
    warnings_shown,
)
from dyhead_cuda.detection.data import DataConfig, DetectionDataset
from dyhead_cuda.detection.evaluation import Metrics
from dyhead_cuda.detection.figures import curves, drawing
from dyhead_cuda.detection.files import WriteError, make_folder, write_json
from dyhead_cuda.detection.models.config import ModelConfig
from dyhead_cuda.detection.prediction import predict
from dyhead_cuda.detection.training import parallel, progress
from dyhead_cuda.detection.training.checkpoint_file import read_checkpoint
from dyhead_cuda.detection.training.config import TrainConfig
from dyhead_cuda.detection.training.errors import RankError, RunError
from dyhead_cuda.detection.training.parallel import Processes
from dyhead_cuda.detection.training.runs import BEST, RunFolder
from dyhead_cuda.detection.training.trainer import Interrupted, TrainingError, load_model, train

THRESHOLD = 0.3  # on scores of detections in pictures


def run(arguments: argparse.Namespace) -> int:
    """Trains, then writes the curve, the metrics and pictures into the run folder.

    Returns:
        0; 1 if training failed or a file could not be written; 2 if options, data, device or run
        folder cannot be used; 128 + the signal's number if it was interrupted.
    """
    console = Console(highlight=False, quiet=not is_first())
    try:
        with warnings_shown(console), parallel.join(arguments.device) as processes:
            _train(arguments, console, processes)
    except Interrupted as error:
        console.print(escape(str(error)), soft_wrap=True)
        return 128 + error.signal
    except RankError as error:
        return fail(error, 1)
    except (TrainingError, WriteError) as error:
        return fail(error, 1) if is_first() else 1
    except (RunError, ValueError, OSError, ImportError) as error:
        return fail(error) if is_first() else 2
    except (MemoryError, RuntimeError) as error:
        return fail_for_memory(error, "lower --batch-size, --size, --channels or --workers", 1)
    return 0


def _train(arguments: argparse.Namespace, console: Console, processes: Processes) -> None:
    start = train_settings.start(arguments)
    base = start.model if start else None
    data = train_settings.data_config(arguments, base)
    sets = data.open("train"), data.open("val")
    model = train_settings.model_config(arguments, sets[0], base)
    config = train_settings.train_config(arguments, len(sets[0]))
    folder = arguments.out or Path("runs") / f"{model.detector}-{Path(data.spec).name}"
    _print_settings(console, config, model, data, sets, folder)
    if start:
        console.print(escape(f"start: {start.source}"), soft_wrap=True)
    with ExitStack() as lock:
        # To the end: what is drawn and written after the training is the run's, too.
        processes.on_first(lambda: lock.enter_context(RunFolder(folder).lock()))
        with ExitStack() as stack:
            listeners = [
                stack.enter_context(progress.shown(console, config.steps)),
                progress.foretold(console, config.steps, _how_to_shorten(config)),
            ]
            if arguments.tensorboard and is_first():
                events = progress.tensorboard(folder / "tensorboard")
                listeners.append(stack.enter_context(events))
            metrics = train(
                config,
                model,
                data,
                folder,
                restart=arguments.restart,
                start=start,
                sets=sets,
                listeners=listeners,
            )
        if is_first():
            _finish(console, metrics, folder, sets[1], arguments.pictures, config.device)


def _print_settings(
    console: Console,
    config: TrainConfig,
    model: ModelConfig,
    data: DataConfig,
    sets: tuple[DetectionDataset, DetectionDataset],
    folder: Path,
) -> None:
    head = f"{model.blocks} DyHead blocks" if model.blocks else "plain head"
    device = parallel.choose_device(config.device)
    weights = f"weights {model.weights}" if model.weights else "random weights"
    if not model.weights and data.spec != "digits":
        weights += " (--weights downloads pretrained ones, which take fewer steps)"
    levels = f"levels {model.first_level}-{model.last_level}"
    for line in (
        f"model: {model.detector}, {model.backbone} with {weights}, {head}, "
        f"{model.channels} channels, {levels}",
        f"data: {data.spec}, {len(sets[0])} images to train on, {len(sets[1])} to measure, "
        f"{model.num_classes} classes",
        f"training: {config.steps} steps of {config.batch_size} images, {config.optimizer}, "
        f"lr {config.lr:g}, amp {config.amp}, on {device}",
        f"run folder: {folder}",
    ):
        console.print(escape(line), soft_wrap=True)


def _how_to_shorten(config: TrainConfig) -> str:
    """The end of a line that says how long the training will take."""
    device = parallel.choose_device(config.device)
    faster = " or a GPU" if device.type == "cpu" else ""
    return (
        f"on {device}, without the evaluations; fewer --steps, a smaller --size, --backbone, "
        f"--channels or --blocks{faster} shorten it"
    )


def _finish(
    console: Console,
    metrics: Metrics,
    folder: Path,
    validation_set: DetectionDataset,
    pictures: int,
    device: str,
) -> None:
    records = RunFolder(folder).records()
    evaluations = {r["step"]: r["evaluation"] for r in records if "evaluation" in r}
    best = read_checkpoint(folder / BEST)["step"]
    last = max(evaluations)
    write_json(
        folder / "metrics.json",
        {
            "last": {"step": last, **evaluations[last]},
            "best": {"step": best, **evaluations[best]},
        },
    )
    curves.draw(records, folder / "curve.png", f"Training in {folder}")
    print_metrics(console, metrics, f"after {last} steps (the best AP was after {best})")
    written = f"{folder}: curve.png, metrics.json, log.jsonl, best.pt, last.pt"
    if pictures:
        _draw_pictures(folder, validation_set, pictures, device)
        written += f", {folder / 'pictures'}"
    console.print(escape(written), soft_wrap=True)


def _draw_pictures(folder: Path, validation_set: DetectionDataset, count: int, device: str) -> None:
    """The first scenes: on the left the ground truth, on the right what the best weights find."""
    model, config = load_model(folder, parallel.choose_device(device))
    make_folder(folder / "pictures")
    for index in range(min(count, len(validation_set))):
        image, target = validation_set[index]
        found = predict(model, image, THRESHOLD)
        pair = [drawing.draw(image, objects, config["classes"]) for objects in (target, found)]
        drawing.save(drawing.beside(*pair), folder / "pictures" / f"{index + 1:06d}.png")
