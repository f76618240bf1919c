"""The files of checkpoints: ``torch.save``'s, with a checksum that is verified when one is read.

A file is the zip archive that ``torch.save`` writes. Its archive comment is ``sha256:`` and the
SHA-256, in hexadecimal, of all bytes of the file as it is without the comment. So it covers
tensors, configuration and every other byte; ``torch.load`` and all zip programs read the file as
before; and a file that another program has saved again has no comment, rather than a wrong one.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
import stat
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from dyhead_cuda.detection.files import write_atomically
from dyhead_cuda.detection.training.errors import RunError

_ZIP = b"PK\x03\x04"  # how a zip archive begins
_END = b"PK\x05\x06"  # its last record, of 22 bytes, ends with the comment's length, 2 bytes
_END_BYTES, _LENGTH_BYTES = 22, 2
_PREFIX = b"sha256:"
_COMMENT_BYTES = len(_PREFIX) + 64
_LENGTH = _COMMENT_BYTES.to_bytes(_LENGTH_BYTES, "little")
_CHUNK = 1 << 20
_SHOWN = 300  # characters of other libraries' messages

_logger = logging.getLogger("dyhead_cuda.detection")


def write_checkpoint(path: Path, checkpoint: Mapping[str, Any], then: str = "") -> None:
    """Replaces a checkpoint with its checksum, atomically.

    Args:
        path: the file.
        checkpoint: tensors and plain values.
        then: what to do once the cause of an error is mended.

    Raises:
        WriteError: it could not be written; what was there is still there.
    """

    def write(file: BinaryIO) -> None:
        torch.save(checkpoint, file)
        size = file.tell()
        digest = _digest(file, size, b"")
        file.seek(size - _LENGTH_BYTES)
        file.write(_LENGTH + _PREFIX + digest.encode())

    write_atomically(path, write, then)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint, on the CPU; nothing but tensors and plain values is unpickled.

    One without a checksum, as earlier versions and other programs write them, is read with a note
    in the log.

    Raises:
        RunError: there is none, or it is damaged or of something else.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a device or a pipe may have no end
            raise RunError(f"expected a checkpoint, but {path} is no regular file")
        with path.open("rb") as file:
            _check_bytes(file, path)
            checkpoint = _load(file, path)
    except FileNotFoundError:
        raise RunError(f"expected a checkpoint, but {path} does not exist") from None
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read the checkpoint {path}: {one_line(error)}") from None
    _check_content(checkpoint, path)
    return checkpoint


def one_line(error: BaseException) -> str:
    """What an exception says, or its type, in one line of limited length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _check_bytes(file: BinaryIO, path: Path) -> None:
    """Raises RunError unless the file is a zip archive, with the right checksum if it has one."""
    start = file.read(len(_ZIP))
    if start != _ZIP:
        what = f"begins with {start!r}" if start else "is empty"
        raise RunError(
            f"expected a checkpoint of python -m dyhead_cuda train, but {path} {what}, which no "
            "file of torch.save does; it is another file, or a damaged one"
        )
    size = file.seek(0, 2)
    if _is_cut_off(file, size):
        raise RunError(f"the checkpoint {path} is damaged: its end is missing")
    whole = size - _COMMENT_BYTES  # without the comment
    if whole >= _END_BYTES:
        file.seek(whole - _END_BYTES)
        end = file.read(_END_BYTES)
        stated = file.read(_COMMENT_BYTES)
        if end.startswith(_END) and end.endswith(_LENGTH) and stated.startswith(_PREFIX):
            found = _digest(file, whole - _LENGTH_BYTES, bytes(_LENGTH_BYTES))
            if _PREFIX + found.encode() != stated:
                raise RunError(
                    f"the checkpoint {path} is damaged: its bytes do not have the checksum that "
                    "was written with them; take a copy of it, or train again (--restart)"
                )
            return
    _logger.info("%s has no checksum, so that damages of its numbers would not be seen", path)


def _is_cut_off(file: BinaryIO, size: int) -> bool:
    """Whether the archive's comment is not as long as its last record says."""
    file.seek(max(0, size - _END_BYTES - _COMMENT_BYTES))
    tail = file.read()
    place = tail.rfind(_END)
    comment = tail[place + _END_BYTES :]
    stated = tail[place + _END_BYTES - _LENGTH_BYTES : place + _END_BYTES]
    return place >= 0 and int.from_bytes(stated, "little") != len(comment)


def _digest(file: BinaryIO, size: int, end: bytes) -> str:
    """SHA-256 of the first ``size`` bytes of a file, and of some more."""
    digest = hashlib.sha256()
    file.seek(0)
    while size > 0:
        chunk = file.read(min(size, _CHUNK))
        if not chunk:
            raise OSError("it became shorter while it was read")
        digest.update(chunk)
        size -= len(chunk)
    digest.update(end)
    return digest.hexdigest()


def _load(file: BinaryIO, path: Path) -> Any:
    file.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, on what damaged files seem to be
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # The rest of torch's message advises to execute what is in the file.
        _, _, reason = str(error).partition("WeightsUnpickler error: ")
        reason = (reason or str(error)).partition("\n")[0]
        raise RunError(
            f"cannot read the checkpoint {path}: it is damaged, or holds more than tensors and "
            f"plain values: {reason[:_SHOWN]}"
        ) from None
    except Exception as error:  # whatever torch's reader raises for what somebody has in a file
        raise RunError(
            f"cannot read the checkpoint {path}: it is damaged or no file of torch.save: "
            f"{one_line(error)}"
        ) from None


def _check_content(checkpoint: Any, path: Path) -> None:
    """Raises RunError unless it is a checkpoint of a training."""
    expected = f"expected a checkpoint of python -m dyhead_cuda train, got {path}, which holds"
    if not isinstance(checkpoint, dict):
        raise RunError(f"{expected} a {type(checkpoint).__name__}")
    missing = [name for name in ("step", "config", "model") if name not in checkpoint]
    if missing:
        names = [str(name)[:40] for name in list(checkpoint)[:5]]
        more = ", ..." if len(checkpoint) > len(names) else ""
        raise RunError(
            f"{expected} {', '.join(names) or 'nothing'}{more} and no {', '.join(missing)}"
        )
    step = checkpoint["step"]
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise RunError(f"{expected} a step that is {_shown(step)}")
    for name in ("config", "model"):
        if not isinstance(checkpoint[name], Mapping):
            raise RunError(f"{expected} a {name} that is {_shown(checkpoint[name])}, not a dict")
    for name, value in checkpoint["model"].items():
        if not isinstance(value, torch.Tensor):
            raise RunError(f"{expected} a weight {str(name)[:40]!r} that is {_shown(value)}")


def _shown(value: Any) -> str:
    """A value in a message."""
    return (
        repr(value)[:40]
        if value is None or isinstance(value, (int, str))
        else (f"a {type(value).__name__}")
    )
