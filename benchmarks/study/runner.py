"""Trains what the study compares, several at a time, and writes the results of each."""

from __future__ import annotations

import functools
import multiprocessing
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.study import measures, results
from benchmarks.study.setup import Setup, Trial, fingerprint
from benchmarks.study.variants import VARIANTS
from dyhead_cuda.detection.data import DetectionDataset
from dyhead_cuda.detection.training.runs import RunFolder
from dyhead_cuda.detection.training.trainer import (
    Interrupted,
    Listener,
    Record,
    TrainingError,
    train,
)

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """How to train, whatever is trained.

    Attributes:
        setup: the detector, the data and the training.
        folder: of the trainings, with their checkpoints.
        results: folder of the results.
        device: "cpu" or "cuda".
        facts: "machine", "commit" and "date", for the results.
        deadline: in seconds of ``time.time()``: what is not finished then is saved, to go on later.
    """

    setup: Setup
    folder: Path
    results: Path
    device: str
    facts: dict[str, Any]
    deadline: float


def train_all(job: Job, trials: Sequence[Trial], processes: int, tell: Tell) -> int:
    """Runs trainings in their order, and goes on with those that were stopped.

    Args:
        job: how.
        trials: what.
        processes: trainings at a time; each gets its share of the processor's threads.
        tell: called with a line when one ends.

    Returns:
        How many were finished before the deadline.

    Raises:
        dyhead_cuda.detection.training.runs.RunError: another process has the same training, or its
            files are damaged.
        dyhead_cuda.detection.training.trainer.TrainingError: a loss is not finite in a training
            that is not of a search.
        dyhead_cuda.detection.training.trainer.Interrupted: a signal came.
    """
    if not trials:
        return 0
    processes = min(processes, len(trials))
    threads = max(1, torch.get_num_threads() // processes)
    # Spawn, because torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    begin, done = time.monotonic(), 0
    with ProcessPoolExecutor(
        processes, context, initializer=torch.set_num_threads, initargs=(threads,)
    ) as pool:
        futures = {pool.submit(_train_one, job, trial): trial for trial in trials}
        try:
            for future in as_completed(futures):
                said = future.result()
                if said is None:
                    continue
                done += 1
                left = (time.monotonic() - begin) / done * (len(trials) - done)
                tell(
                    f"[{done}/{len(trials)}] {futures[future].title}: {said}; "
                    f"about {left / 60:.0f} min left"
                )
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return done


def _train_one(job: Job, trial: Trial) -> str | None:
    """What came out, in a word or two; None if there was no time for it."""
    settings = job.setup.settings(trial)
    mark = fingerprint(settings)
    folder = job.folder / f"{trial.path}-{mark}"  # a training never goes on with other settings
    if time.time() >= job.deadline:
        return None
    record: Record = {
        "setup": mark,
        "name": trial.name,
        "seed": trial.seed,
        "lr": trial.lr,
        **job.facts,
        "settings": settings,
    }
    try:
        record |= _trained(job, trial, folder)
        said = f"AP {record['summary']['AP']:.1%}"
    except Interrupted:
        if time.time() >= job.deadline:
            return None
        raise
    except TrainingError as error:
        if not trial.search:
            raise
        record["failed"] = said = str(error)  # as a rate may that is too high
    results.write(job.results, f"{trial.path}.json", record)
    return said


def _trained(job: Job, trial: Trial, folder: Path) -> Record:
    setup = job.setup
    sets = _sets(setup)
    train(
        setup.training(trial, job.device),
        setup.model(VARIANTS[trial.name]),
        setup.data(),
        folder,
        sets=sets,
        listeners=[_stop_at(job.deadline)],
    )
    found = measures.measure(folder, sets[1], setup.batch_size, job.device)
    evaluations = [each for each in RunFolder(folder).records() if "evaluation" in each]
    curve = [[each["step"], each["evaluation"]["summary"]["AP"]] for each in evaluations]
    return {**found, "curve": curve}


@functools.cache
def _sets(setup: Setup) -> tuple[DetectionDataset, DetectionDataset]:
    """The scenes, drawn once for all trainings of a process."""
    data = setup.data()
    return data.open("train"), data.open("val")


def _stop_at(deadline: float) -> Listener:
    """Has a training stop after the step that it is at, as Ctrl-C does, when time is up."""
    asked = False

    def listen(_: Record) -> None:
        nonlocal asked
        if not asked and time.time() >= deadline:
            asked = True  # a second signal would end the process at once
            signal.raise_signal(signal.SIGINT)

    return listen
