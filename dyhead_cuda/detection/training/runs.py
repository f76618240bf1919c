"""The folder of a training run: its configuration, log and checkpoints.

``config.json``: what is trained, on what and how. ``log.jsonl``: one line per step and evaluation.
``last.pt``: all that a resumed run needs. ``best.pt``: the weights of the highest AP so far. Each
file is replaced as a whole, so that a kill at any time leaves one that can be read. Nothing is
written before the first step is done: a start that fails leaves no run.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dyhead_cuda.detection.data import DataConfig
from dyhead_cuda.detection.files import explained, plain, write_atomically, write_json, writing
from dyhead_cuda.detection.models.config import ModelConfig
from dyhead_cuda.detection.settings import Settings
from dyhead_cuda.detection.training.checkpoint_file import read_checkpoint, write_checkpoint
from dyhead_cuda.detection.training.config import TrainConfig
from dyhead_cuda.detection.training.errors import RunError
from dyhead_cuda.detection.training.run_lock import held

LAST, BEST, CONFIG, LOG = "last.pt", "best.pt", "config.json", "log.jsonl"

# These do not change what is trained, so a run may be resumed with other values.
_FREE = (
    "training.device",
    "training.workers",
    "training.eval_every",
    "training.checkpoint_every",
)
_STEPS = "training.steps"  # may grow

_SECTIONS: dict[str, type[Settings]] = {
    "model": ModelConfig,
    "data": DataConfig,
    "training": TrainConfig,
}

# What a user does after the cause of a failed write is mended.
_THEN = "then run the same command again: the run goes on from its last checkpoint"

_logger = logging.getLogger("dyhead_cuda.detection")


class RunFolder:
    """The files of one run, in a folder that need not be there.

    Args:
        path: the folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps other processes out of the folder inside, see :func:`.run_lock.held`.

        The folder is made if it is not there, and removed at the end if nothing was written to it.

        Raises:
            RunError: the folder is in use or cannot be written to.
        """
        try:
            missing = [each for each in (self.path, *self.path.parents) if not each.exists()]
        except OSError as error:
            raise self._unusable(error) from None
        try:
            self._make()
            with held(self.path):
                yield
        finally:
            for folder in missing:
                with suppress(OSError):  # it holds something
                    folder.rmdir()

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unusable(error) from None

    def _unusable(self, error: OSError) -> RunError:
        return RunError(f"cannot write to the run folder {self.path}: {explained(error)}")

    def begin(self, config: Mapping[str, Any], restart: bool = False) -> dict[str, Any] | None:
        """The checkpoint that a run of this configuration goes on from; nothing is written.

        A run without a checkpoint is none: there is nothing that could go on. The run here may
        have fewer steps than ``config``; a warning says what that means.

        Args:
            config: JSON-able, by section.
            restart: do not go on with the run that is here.

        Returns:
            The last checkpoint, on the CPU; None to start a new run.

        Raises:
            RunError: the run here has another configuration, or its files are damaged.
        """
        if restart or not (self.path / LAST).exists():
            return None
        path = self.path / CONFIG
        if not path.exists():
            raise RunError(f"{self.path} holds {LAST} but no {CONFIG}; restart, or another folder")
        before = completed(read_json(path), config)
        differing = differences(before, config)
        if differing:
            raise RunError(
                f"{self.path} holds a run of another configuration: {'; '.join(differing)}; "
                "use the same options, another folder, or restart (--restart), which deletes it"
            )
        self.records()  # is an error here, before the work, if the log is damaged
        checkpoint = read_checkpoint(self.path / LAST)
        _tell_if_longer(self.path, before, config, checkpoint["step"])
        return checkpoint

    def start(self, config: Mapping[str, Any], step: int) -> None:
        """Writes the configuration, and cuts the log at the step that the run goes on from.

        Args:
            config: what :meth:`begin` got.
            step: of the checkpoint; at 0 what is here of another run is deleted.

        Raises:
            RunError: the folder cannot be made.
            WriteError: a file could not be written.
        """
        self._make()
        for name in (LAST, BEST, CONFIG, LOG) if step == 0 else ():
            with writing(self.path / name, _THEN):
                (self.path / name).unlink(missing_ok=True)
        for leftover in self.path.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        write_json(self.path / CONFIG, config, _THEN)
        kept = [record for record in self.records() if record["step"] <= step]
        text = "".join(_line(record) for record in kept)
        write_atomically(self.path / LOG, lambda file: file.write(text.encode()), _THEN)
        _logger.info("%s: %s at step %d", self.path, "resumed" if step else "new run", step)

    def records(self) -> list[dict[str, Any]]:
        """The lines of the log; one that a kill has cut off is left out."""
        try:
            lines = (self.path / LOG).read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        try:
            return [_from_json(line) for line in lines if line.endswith(b"\n")]
        except ValueError as error:
            raise RunError(
                f"{self.path / LOG} is damaged ({error}): remove the bad line, or restart"
            ) from None

    def log(self, record: Mapping[str, Any]) -> None:
        """Appends a line; nan and inf are written as null.

        Raises:
            WriteError: it could not be written; part of it may be there, and is left out.
        """
        path = self.path / LOG
        with writing(path, _THEN), path.open("ab") as file:
            file.write(_line(record).encode())

    def save_last(self, checkpoint: Mapping[str, Any]) -> None:
        """Replaces the checkpoint to resume from, after writing the log to the disk.

        Raises:
            WriteError: it could not be written; the checkpoint before is still there.
        """
        log = self.path / LOG
        with writing(log, _THEN), log.open("ab") as file:
            os.fsync(file.fileno())
        write_checkpoint(self.path / LAST, checkpoint, _THEN)

    def save_best(self, checkpoint: Mapping[str, Any]) -> None:
        """Replaces the best weights; ``checkpoint["ap"]`` is their AP.

        Raises:
            WriteError: it could not be written; the weights before are still there.
        """
        write_checkpoint(self.path / BEST, checkpoint, _THEN)

    def best_ap(self) -> float:
        """The AP of best.pt, -inf without one.

        It is kept nowhere else: with a second place a kill could come between the two.
        """
        path = self.path / BEST
        if not path.exists():
            return -math.inf
        ap = read_checkpoint(path).get("ap")
        if not isinstance(ap, float):
            raise RunError(f"expected an AP in {path}, got {ap!r}; move the file away, or restart")
        return ap


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two configurations, as "training.lr is 0.1, got 0.2"."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        name = f"{prefix}{key}"
        old, new = plain(before.get(key)), plain(now.get(key))
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{name}.")
        elif old == new or name in _FREE:
            continue
        elif name != _STEPS:
            found.append(f"{name} is {old!r}, got {new!r}")
        elif not _grows(old, new):
            found.append(f"{name} is {old!r}, got {new!r} (a run can be made longer, not shorter)")
    return found


def _grows(old: Any, new: Any) -> bool:
    return isinstance(old, int) and isinstance(new, int) and old < new


def completed(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """A description that lacks settings of ``now``, which came later, with their defaults."""
    completed = dict(before)
    for section, kind in _SECTIONS.items():
        old, new = before.get(section), now.get(section)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            later = {k: v for k, v in kind.defaults().items() if k in new and k not in old}
            known = {**old, **later}
            # The class knows where older files mean something else by a value.
            with suppress(ValueError, TypeError):
                read = kind.from_dict(known).to_dict()
                known = {name: read[name] for name in known}
            completed[section] = known
    return completed


def _tell_if_longer(
    path: Path, before: Mapping[str, Any], now: Mapping[str, Any], step: int
) -> None:
    """Logs a warning if the run gets more steps."""
    old, new = (each.get("training", {}).get("steps") for each in (before, now))
    if old != new:
        _logger.warning(
            "%s: a run of %s steps gets %s; from step %d on the learning rate is that of a run of "
            "%s, so the result is not that of such a run from its start",
            path,
            old,
            new,
            step,
            new,
        )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        RunError: the file cannot be read or holds something else.
    """
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise RunError(f"expected a JSON object in {path}, got {type(value).__name__}")
    return value


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(plain(record)) + "\n"


def _from_json(line: bytes) -> dict[str, Any]:
    record = json.loads(line)
    if not (isinstance(record, dict) and isinstance(record.get("step"), int)):
        raise ValueError(f"expected an object with a step, got {line[:60]!r}")
    return record
