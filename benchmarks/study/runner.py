"""Trains what the study compares, several at a time, and measures what each detector costs."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.study.setup import Setup
from benchmarks.study.variants import VARIANTS
from dyhead_cuda.detection import data
from dyhead_cuda.detection.models import build, count_parameters, gflops
from dyhead_cuda.detection.training.runs import RunFolder
from dyhead_cuda.detection.training.trainer import train

Tell = Callable[[str], None]


def run_folder(folder: Path, name: str, seed: int) -> Path:
    """Where the run of a variant and a seed is kept."""
    return folder / name / f"seed-{seed}"


def train_all(
    setup: Setup,
    names: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    jobs: int,
    device: str,
    tell: Tell,
) -> None:
    """Trains every variant with every seed; finished runs in ``folder`` are kept, others resumed.

    Seeds come first, so that a study that is stopped early has compared all variants.

    Args:
        setup: the detector, the data and the training.
        names: of :data:`VARIANTS`.
        seeds: one run each.
        folder: of all runs.
        jobs: processes; each gets its share of the processor's threads.
        device: see :class:`~dyhead_cuda.detection.TrainConfig`.
        tell: called with a line when a run ends.

    Raises:
        dyhead_cuda.detection.training.runs.RunError: a folder holds a run of another setup.
        dyhead_cuda.detection.training.trainer.TrainingError: a loss is not finite.
    """
    runs = [(name, seed) for seed in seeds for name in names]
    threads = max(1, torch.get_num_threads() // jobs)
    # Spawn, because torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    begin = time.monotonic()
    with ProcessPoolExecutor(
        min(jobs, len(runs)), context, initializer=torch.set_num_threads, initargs=(threads,)
    ) as pool:
        futures = {
            pool.submit(_train_one, setup, name, seed, folder, device): (name, seed)
            for name, seed in runs
        }
        try:
            for done, future in enumerate(as_completed(futures), 1):
                name, seed = futures[future]
                left = (time.monotonic() - begin) / done * (len(runs) - done)
                tell(
                    f"[{done}/{len(runs)}] {VARIANTS[name].label}, seed {seed}: "
                    f"AP {future.result():.1%}; about {left / 60:.0f} min left"
                )
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _train_one(setup: Setup, name: str, seed: int, folder: Path, device: str) -> float:
    target = run_folder(folder, name, seed)
    config, model = setup.training(seed, device), setup.model(VARIANTS[name])
    return train(config, model, setup.data(), target).summary["AP"]


def read_runs(folder: Path, names: Sequence[str], seeds: Sequence[int]) -> dict[str, list[Any]]:
    """What each finished run has logged: its seed, last metrics, and AP at each evaluation."""
    found: dict[str, list[Any]] = {}
    for name in names:
        found[name] = []
        for seed in seeds:
            records = RunFolder(run_folder(folder, name, seed)).records()
            evaluations = [record for record in records if "evaluation" in record]
            last = evaluations[-1]["evaluation"]
            found[name].append(
                {
                    "seed": seed,
                    "summary": last["summary"],
                    "per_class": last["per_class"],
                    "curve": [[r["step"], r["evaluation"]["summary"]["AP"]] for r in evaluations],
                }
            )
    return found


def costs(setup: Setup, names: Sequence[str], device: torch.device, rounds: int) -> dict[str, Any]:
    """Parameters, GFLOPs of one image, and milliseconds of a training step and of a prediction.

    All variants take turns, ``rounds`` times, so that a slow phase of the machine affects all.
    Times are medians for one batch of the setup's size.
    """
    batch = data.collate([setup.data().open("val")[i] for i in range(setup.batch_size)])
    images = [image.to(device) for image in batch[0]]
    targets = [{key: value.to(device) for key, value in target.items()} for target in batch[1]]
    detectors: dict[str, nn.Module] = {}
    found: dict[str, Any] = {}
    for name in names:
        torch.manual_seed(0)
        model = build(setup.model(VARIANTS[name]))
        found[name] = {
            "parameters": count_parameters(model),
            "gflops": gflops(model, setup.size, setup.size),
        }
        detectors[name] = model.to(device)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for _ in range(rounds + 1):
        for name, model in detectors.items():
            times[name].append((_step(model, images, targets), _prediction(model, images)))
    for name in names:
        steps, predictions = zip(*times[name][1:], strict=True)  # the first round warms up
        found[name]["step_ms"] = 1e3 * statistics.median(steps)
        found[name]["prediction_ms"] = 1e3 * statistics.median(predictions)
    return found


def _step(model: nn.Module, images: list[Any], targets: list[Any]) -> float:
    model.train()
    return _seconds(lambda: torch.stack([*model(images, targets).values()]).sum().backward(), model)


def _prediction(model: nn.Module, images: list[Any]) -> float:
    model.eval()
    with torch.inference_mode():
        return _seconds(lambda: model(images), model)


def _seconds(action: Callable[[], object], model: nn.Module) -> float:
    device = next(model.parameters()).device
    start = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
