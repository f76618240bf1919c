"""Trains a detector: checkpoints, exact resume, mixed precision, many processes.

Everything that a step depends on is either in the last checkpoint (weights, optimizer, loss scale,
random states) or follows from the step's number (learning rate, images), so that a resumed run
takes the very steps that an uninterrupted one would have taken; on CPUs bit by bit.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from dyhead_cuda.detection.data import (
    DataConfig,
    DetectionDataset,
    check_sizes,
    collate,
    draw_sizes,
)
from dyhead_cuda.detection.evaluation import Metrics, evaluate
from dyhead_cuda.detection.models.config import ModelConfig, build, build_empty
from dyhead_cuda.detection.training import averaging, parallel, random_state, signals
from dyhead_cuda.detection.training.checkpoint_file import one_line, read_checkpoint
from dyhead_cuda.detection.training.config import TrainConfig
from dyhead_cuda.detection.training.errors import RunError
from dyhead_cuda.detection.training.parallel import Processes
from dyhead_cuda.detection.training.recipe import (
    Stream,
    batches,
    evaluation_due,
    learning_rate,
    make_optimizer,
)
from dyhead_cuda.detection.training.runs import BEST, LAST, RunFolder

if TYPE_CHECKING:
    from dyhead_cuda.detection.models.starting import Start

AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}

Record = dict[str, Any]
Listener = Callable[[Record], None]


class TrainingError(Exception):
    """Training cannot continue: the step, what went wrong, and what to try."""


class Interrupted(Exception):
    """Training was asked to stop by a signal, and its state is saved.

    Attributes:
        signal: the signal's number; 0 where another process got it.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number

    def __reduce__(self) -> tuple[Any, ...]:  # so that a pool of processes can pass it on
        return type(self), (str(self), self.signal)


def train(
    config: TrainConfig,
    model: ModelConfig,
    data: DataConfig,
    folder: str | Path,
    *,
    restart: bool = False,
    start: Start | None = None,
    sets: tuple[DetectionDataset, DetectionDataset] | None = None,
    listeners: Sequence[Listener] = (),
) -> Metrics:
    """Trains a detector, or resumes the run in ``folder``.

    A run that is resumed has the settings that it has, but for ``device``, ``workers``,
    ``eval_every``, ``checkpoint_every``, and ``steps``, of which there may be more. Then the
    learning rate is from there on that of a run of so many steps, which for a finished run with a
    cosine jumps up from 0; the result is not that of such a run from its start. ``folder`` is
    written to once the first step is done.

    Under torchrun each process trains on a batch of its own, and gradients are averaged.

    Args:
        config: how to train.
        model: the detector to make; it has as many classes as the data.
        data: what to train and measure on.
        folder: of the run, see :mod:`dyhead_cuda.detection.training.runs`.
        restart: delete the run in ``folder`` first.
        start: the detector whose weights a new run starts from, see
            :func:`~dyhead_cuda.detection.models.read_start`. None: what ``model`` says.
        sets: what ``data`` opens, for training and validation, where it is open already.
        listeners: called in the first process with each record that is logged: of a step "step",
            "epoch", "loss", "losses" (by name), "lr", "grad_norm", "seconds",
            "images_per_second"; of an evaluation "step" and "evaluation", the metrics. During an
            evaluation also with "step", "evaluated" and "to_evaluate", in images.

    Returns:
        The metrics after the last step, without detections.

    Raises:
        TrainingError: a loss or gradient is not finite.
        Interrupted: a SIGINT or SIGTERM came.
        RunError: another process trains in the folder, or it holds a run of another configuration,
            or damaged files.
        WriteError: a file could not be written, for example as the disk is full; what was written
            before is whole, and the run goes on from its last checkpoint.
        RankError: another of several processes has ended.
        ValueError: the data or what it starts from do not fit the model, or there is no such
            device.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from dyhead_cuda.detection import DataConfig, ModelConfig, TrainConfig, train
        >>> small = {"channels": 16, "blocks": 1, "last_level": 5, "min_size": 64, "max_size": 64}
        >>> model = ModelConfig("atss", 10, "timm/test_resnet.r160_in1k", **small)
        >>> one = {"num_images": 1}
        >>> data = DataConfig("digits", {"size": [64, 64]}, train=one, val=one)
        >>> with TemporaryDirectory() as folder:
        ...     metrics = train(TrainConfig(steps=1, batch_size=1), model, data, folder)
        >>> 0 <= metrics.summary["AP"] <= 1
        True
    """
    with parallel.join(config.device) as processes, ExitStack() as stack:
        training_set, validation_set = sets or (data.open("train"), data.open("val"))
        for which, dataset in (("train", training_set), ("val", validation_set)):
            if len(dataset.classes) != model.num_classes:
                raise ValueError(
                    f"expected data of {model.num_classes} classes, as the model has, got "
                    f"{len(dataset.classes)} in {which}"
                )
        description = {
            "model": model.to_dict(),
            "data": data.to_dict(),
            "training": config.to_dict(),
            "classes": list(training_set.classes),
            "processes": processes.count,
        }
        if data.multi_scale is not None:
            check_sizes(model.min_size, data.multi_scale)
        if start is not None:
            start.check(model)
            description["start"] = start.source
        run = processes.on_first(lambda: RunFolder(folder))
        processes.on_first(lambda: stack.enter_context(run.lock()))
        checkpoint = processes.on_first(lambda: run.begin(description, restart))
        torch.manual_seed(config.seed)
        # Weights from a checkpoint need no download.
        network = build(model) if checkpoint is None and start is None else build_empty(model)
        if checkpoint is None and start is not None:
            start.load_into(network, training_set.classes)
        if data.multi_scale is not None:
            draw_sizes(network, data.multi_scale)
        trainer = Trainer(config, network, training_set, validation_set, run, processes)
        return trainer.run(description, checkpoint, listeners)


def load_model(
    path: str | Path, device: torch.device | str = "cpu"
) -> tuple[nn.Module, dict[str, Any]]:
    """A trained detector, in evaluation mode.

    Args:
        path: a checkpoint, or a run folder, of which the best weights are taken; the last before
            its first evaluation. Where training averages weights, these are the averaged ones.
        device: where to put it.

    Returns:
        The model, and the run's configuration: "model", "data", "training", "classes" (the name of
        label i + 1) and "processes".

    Raises:
        RunError: there is no such checkpoint, or it is damaged.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from dyhead_cuda.detection import DataConfig, ModelConfig, TrainConfig
        >>> from dyhead_cuda.detection import load_model, train
        >>> small = {"channels": 16, "blocks": 1, "last_level": 5, "min_size": 64, "max_size": 64}
        >>> model = ModelConfig("atss", 10, "timm/test_resnet.r160_in1k", **small)
        >>> one = {"num_images": 1}
        >>> data = DataConfig("digits", {"size": [64, 64]}, train=one, val=one)
        >>> with TemporaryDirectory() as folder:
        ...     metrics = train(TrainConfig(steps=1, batch_size=1), model, data, folder)
        ...     detector, config = load_model(folder)
        >>> type(detector).__name__, config["classes"][:3]
        ('ATSS', ['0', '1', '2'])
    """
    path = Path(path)
    if path.is_dir():
        path = path / (BEST if (path / BEST).exists() else LAST)
    checkpoint = read_checkpoint(path)
    config = checkpoint["config"]
    try:
        settings = ModelConfig.from_dict(config["model"])
        _check_classes(config["classes"], settings.num_classes)
        model = build_empty(settings)
        model.load_state_dict(checkpoint["model"])
    except Exception as error:  # whatever the settings of somebody's file lead to
        what = f"no {error}" if isinstance(error, KeyError) else one_line(error)
        raise RunError(f"cannot make a model from the checkpoint {path}: {what}") from error
    return model.to(device).eval(), config


def _check_classes(classes: Any, count: int) -> None:
    named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    if not named or len(classes) != count:
        raise ValueError(f"expected the names of {count} classes, got {str(classes)[:100]}")


class Trainer:
    """The training loop.

    Args:
        config: how to train.
        model: with torchvision's interface of detectors; moved to the device of ``processes``.
        training_set, validation_set: what to learn from, and what to measure.
        run: where to log and save.
        processes: this process among all.
        metric: with the interface of :func:`dyhead_cuda.detection.evaluation.evaluate`.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        training_set: DetectionDataset,
        validation_set: DetectionDataset,
        run: RunFolder,
        processes: Processes,
        metric: Callable[..., Metrics] = evaluate,
    ) -> None:
        self.config, self.folder, self.processes = config, run, processes
        self.metric = metric
        self.training_set, self.validation_set = training_set, validation_set
        device = processes.device
        self.model = model.to(device)
        self.replica: nn.Module = self.model
        self.average = averaging.average_of(self.model, config.ema) if config.ema else None
        # What is measured, and kept as the best.
        self.result: nn.Module = self.average.module if self.average else self.model
        self.optimizer = make_optimizer(config, self.model)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
        self.step = 0
        self.started = False

    def run(
        self,
        description: Mapping[str, Any],
        checkpoint: Mapping[str, Any] | None = None,
        listeners: Sequence[Listener] = (),
    ) -> Metrics:
        """Trains to the last step; see :func:`train`.

        Args:
            description: the configuration that the checkpoints shall carry.
            checkpoint: what :meth:`RunFolder.begin` found.
            listeners: for the records.
        """
        config = self.config
        random_state.seed(config.seed + self.processes.rank)
        if checkpoint is not None:
            self._restore(checkpoint)
        first = self.step
        metrics = self.processes.on_first(self._logged_metrics)
        with (
            self._replicated(),
            _determinism(config.deterministic),
            signals.remembered() as request,
        ):
            if metrics is None and evaluation_due(config, self.step):
                self._start(description, first)
                metrics = self._evaluate(description, listeners)
            started = time.perf_counter()
            for batch in self._loader():
                record = self._train_step(*batch)
                self._start(description, first)
                seconds = time.perf_counter() - started
                images = config.batch_size * self.processes.count
                record |= {"seconds": seconds, "images_per_second": images / seconds}
                self._log(record, listeners)
                due, last = evaluation_due(config, self.step), self.step == config.steps
                stop = self.processes.any(request.number > 0)
                if due or stop or self.step % config.checkpoint_every == 0:
                    # Save before the evaluation: it may take long, and a resumed run repeats it.
                    self._save(description)
                if stop and not last:
                    raise Interrupted(
                        f"stopped after step {self.step} of {config.steps}, which is saved in "
                        f"{self.folder.path}; run the same command to go on from there",
                        request.number,
                    )
                if due:
                    metrics = self._evaluate(description, listeners)
                started = time.perf_counter()
        assert metrics is not None, "the last step is always followed by an evaluation"
        return metrics

    @contextmanager
    def _replicated(self) -> Iterator[None]:
        """Averages gradients over the processes inside.

        The replica goes before the process group does: it must not be the last to hold the group,
        whose threads it would end while they wait for Python's lock.
        """
        device = self.processes.device
        if self.processes.count > 1:
            self.replica = DistributedDataParallel(
                self.model,
                device_ids=[device.index] if device.type == "cuda" else None,
                # A step may leave parameters unused, for example when none of its images has boxes.
                find_unused_parameters=True,
            )
        try:
            yield
        finally:
            self.replica = self.model

    def _loader(self) -> DataLoader[Any]:
        config, processes = self.config, self.processes
        return DataLoader(
            Stream(self.training_set, config.seed),
            batch_sampler=batches(config, self.step, processes.rank, processes.count),
            collate_fn=collate,
            num_workers=config.workers,
            pin_memory=processes.device.type == "cuda",
            # Its own generator: drawing the seed of the workers must not change the steps.
            generator=torch.Generator(),
        )

    def _train_step(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> Record:
        config, device = self.config, self.processes.device
        rate = learning_rate(config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_factor"]
        self.replica.train()
        with torch.autocast(device.type, AMP_DTYPES[config.amp], enabled=config.amp != "off"):
            losses: dict[str, Tensor] = self.replica(
                [image.to(device, non_blocking=True) for image in images],
                [
                    {name: value.to(device, non_blocking=True) for name, value in target.items()}
                    for target in targets
                ],
            )
        values = torch.stack([loss.float() for loss in losses.values()])
        # Every process sees the same means, so all stop together and none waits for another.
        means = self.processes.mean(values.detach().clone()).tolist()
        by_name = dict(zip(losses, means, strict=True))
        self._check("loss", sum(means), by_name)

        self.optimizer.zero_grad()
        self.scaler.scale(values.sum()).backward()
        self.scaler.unscale_(self.optimizer)
        norm = float(
            nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm or math.inf)
        )
        self._check("gradient's norm", norm, by_name)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update_parameters(self.model)
        done = self.step * len(images) * self.processes.count
        self.step += 1
        return {
            "step": self.step,
            "epoch": done // len(self.training_set),
            "loss": sum(means),
            "losses": by_name,
            "lr": rate,
            "grad_norm": norm,
        }

    def _check(self, what: str, value: float, losses: Mapping[str, float]) -> None:
        """Raise unless ``value`` is finite, or may become so when the loss scale falls."""
        if math.isfinite(value) or (self.scaler.is_enabled() and self.scaler.get_scale() >= 1):
            return
        named = ", ".join(f"{name} {loss:g}" for name, loss in losses.items())
        raise TrainingError(
            f"the {what} is {value} at step {self.step + 1}; losses: {named}; the last checkpoint "
            "is from before. Try a lower lr, more warmup_steps, a smaller clip_norm, or amp off"
        )

    def _start(self, description: Mapping[str, Any], step: int) -> None:
        """Begins to write to the run folder, which a start that fails leaves as it was."""
        if not self.started:
            self.processes.on_first(lambda: self.folder.start(description, step))
            self.started = True

    def _evaluate(self, description: Mapping[str, Any], listeners: Sequence[Listener]) -> Metrics:
        def show(done: int, total: int) -> None:
            if self.processes.first:
                for listener in listeners:
                    listener({"step": self.step, "evaluated": done, "to_evaluate": total})

        # Each process has seen other images, but all must measure what the first one saves. Of the
        # model in training, a replica copies them before the next step anyway.
        self.processes.copy_from_first(self.result.buffers())
        with random_state.kept():
            metrics = self.metric(
                self.result,
                self.validation_set,
                device=self.processes.device,
                batch_size=self.config.batch_size,
                workers=self.config.workers,
                progress=show,
            )
        metrics = replace(metrics, detections=[])
        self.processes.on_first(lambda: self._keep_if_best(metrics, description))
        values = asdict(metrics)
        del values["detections"]
        self._log({"step": self.step, "evaluation": values}, listeners)
        return metrics

    def _keep_if_best(self, metrics: Metrics, description: Mapping[str, Any]) -> None:
        ap = metrics.summary["AP"]
        ap = -1.0 if math.isnan(ap) else ap  # no objects in the validation set
        if ap > self.folder.best_ap():
            weights = self.result.state_dict()
            config = dict(description)
            self.folder.save_best({"step": self.step, "ap": ap, "config": config, "model": weights})

    def _logged_metrics(self) -> Metrics | None:
        """The metrics of an evaluation after the current step, if the log has one."""
        if self.step == 0:
            return None  # what is in the folder is deleted
        for record in reversed(self.folder.records()):
            if "evaluation" in record and record["step"] == self.step:
                return _metrics(record["evaluation"])
        return None

    def _log(self, record: Record, listeners: Sequence[Listener]) -> None:
        if self.processes.first:
            self.folder.log(record)
            for listener in listeners:
                listener(record)

    def _save(self, description: Mapping[str, Any]) -> None:
        checkpoint = {
            "step": self.step,
            "config": dict(description),
            "model": self.result.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": self.processes.gather(random_state.capture()),
        }
        if self.average is not None:
            checkpoint["unaveraged"] = self.model.state_dict()
        self.processes.on_first(lambda: self.folder.save_last(checkpoint))

    def _restore(self, checkpoint: Mapping[str, Any]) -> None:
        try:
            self.result.load_state_dict(checkpoint["model"])
            if self.average is not None:
                self.model.load_state_dict(checkpoint["unaveraged"])
                self.average.n_averaged.fill_(checkpoint["step"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.scaler.load_state_dict(checkpoint["scaler"])
            random_state.restore(checkpoint["random"][self.processes.rank])
        except Exception as error:  # whatever the contents of somebody's file lead to
            what = f"no {error}" if isinstance(error, KeyError) else one_line(error)
            raise RunError(
                f"the checkpoint in {self.folder.path} does not fit this run: {what}; move it "
                "away, or restart (--restart), which deletes the run"
            ) from error
        self.step = checkpoint["step"]


def _metrics(sections: Mapping[str, Mapping[str, float | None] | None]) -> Metrics:
    """Metrics from a log, which has null where they have nan."""
    values: dict[str, Any] = {
        section: scores and {k: math.nan if v is None else v for k, v in scores.items()}
        for section, scores in sections.items()
    }
    return Metrics(**values, detections=[])


@contextmanager
def _determinism(wanted: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    if wanted:
        # cuBLAS is deterministic only with workspaces of a fixed size.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)
