"""The folder of a training run: its configuration, log and checkpoints.

``config.json``: what is trained, on what and how. ``log.jsonl``: one line per step and evaluation.
``last.pt``: all that a resumed run needs. ``best.pt``: the weights of the highest AP so far. Each
file is replaced as a whole, so that a kill at any time leaves one that can be read.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from dyhead_cuda.detection.files import explained, plain, write_atomically, write_json, writing
from dyhead_cuda.detection.training.checkpoint_file import read_checkpoint, write_checkpoint
from dyhead_cuda.detection.training.errors import RunError
from dyhead_cuda.detection.training.run_lock import held

LAST, BEST, CONFIG, LOG = "last.pt", "best.pt", "config.json", "log.jsonl"

# These do not change what is trained, so a run may be resumed with other values.
_FREE = ("training.device", "training.workers", "training.checkpoint_every")

# What a user does after the cause of a failed write is mended.
_THEN = "then run the same command again: the run goes on from its last checkpoint"

_logger = logging.getLogger("dyhead_cuda.detection")


class RunFolder:
    """The files of one run; made if it does not exist.

    Args:
        path: the folder.

    Raises:
        RunError: it cannot be written to.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                f"cannot write to the run folder {self.path}: {explained(error)}"
            ) from None

    def lock(self) -> AbstractContextManager[None]:
        """Keeps other processes out of the folder, see :func:`.run_lock.held`."""
        return held(self.path)

    def begin(self, config: Mapping[str, Any], restart: bool = False) -> dict[str, Any] | None:
        """Starts a run, or continues the one in the folder after cutting its log at the checkpoint.

        Args:
            config: JSON-able, by section.
            restart: delete the run that is here.

        Returns:
            The last checkpoint, on the CPU; None before the first.

        Raises:
            RunError: the run here has another configuration, or its files are damaged.
        """
        if restart:
            for name in (LAST, BEST, CONFIG, LOG):
                (self.path / name).unlink(missing_ok=True)
        for leftover in self.path.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        path = self.path / CONFIG
        if path.exists():
            differing = differences(read_json(path), config)
            if differing:
                raise RunError(
                    f"{self.path} holds a run of another configuration: {'; '.join(differing)}; "
                    "use the same options, another folder, or restart (--restart), which deletes it"
                )
        elif (self.path / LAST).exists():
            raise RunError(f"{self.path} holds {LAST} but no {CONFIG}; restart, or another folder")
        write_json(path, config, _THEN)
        checkpoint = read_checkpoint(self.path / LAST) if (self.path / LAST).exists() else None
        step = checkpoint["step"] if checkpoint else 0
        kept = [record for record in self.records() if record["step"] <= step]
        text = "".join(_line(record) for record in kept)
        write_atomically(self.path / LOG, lambda file: file.write(text.encode()), _THEN)
        _logger.info("%s: %s at step %d", self.path, "resumed" if checkpoint else "new run", step)
        return checkpoint

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
        elif old != new and name not in _FREE:
            found.append(f"{name} is {old!r}, got {new!r}")
    return found


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
