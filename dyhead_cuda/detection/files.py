"""Files that are written as a whole or not at all, and one line that says why one was not."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

_SPACE = "free some space there, or choose a folder on another disk"
_OTHER = "choose another folder"
_FIXES = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), or choose another folder",
    errno.EACCES: "give yourself the right to write there, or choose another folder",
    errno.EPERM: "give yourself the right to write there, or choose another folder",
    errno.EROFS: "choose a folder on a disk that is not mounted read-only",
    errno.ENOENT: "make its folder first, or choose another",
    errno.ENOTDIR: "a file is where a folder should be: move it away, or choose another folder",
    errno.EEXIST: "a file is where a folder should be: move it away, or choose another folder",
    errno.EISDIR: "a folder is where the file should be: move it away, or choose another name",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.EIO: "look after the disk (dmesg), or choose a folder on another one",
}


class WriteError(OSError):
    """A file that could not be written: which one, what happened, and how to fix it."""

    def __init__(self, message: str, number: int | None = None) -> None:
        super().__init__(message)
        self.errno = number

    def __reduce__(self) -> tuple[Any, ...]:  # so that a pool of processes can pass it on
        return type(self), (str(self), self.errno)


@contextmanager
def writing(path: Path, then: str = "") -> Iterator[None]:
    """Turns an OSError inside into a :class:`WriteError` of the file.

    Args:
        path: what is written inside, and nothing else.
        then: what to do once the cause is mended.
    """
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        message = "; ".join(filter(None, (explained(error), then)))
        raise WriteError(f"cannot write {path}: {message}", error.errno) from error


def explained(error: OSError) -> str:
    """What an error of the system says, and how to fix it."""
    what = error.strerror or str(error) or type(error).__name__
    return f"{what}; {_FIXES.get(error.errno or 0, _OTHER)}"


def make_folder(path: Path) -> None:
    """Makes a folder, with those above it, unless it is there.

    Raises:
        WriteError: it cannot be made.
    """
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


def write_atomically(path: Path, write: Callable[[BinaryIO], Any], then: str = "") -> None:
    """Replaces a file atomically: it is on the disk at return, and never half written.

    A device or pipe is not replaced, but written to.

    Args:
        path: the file.
        write: gets a file that can be written, and read unless it is a device or pipe.
        then: what to do once the cause of an error is mended.

    Raises:
        WriteError: it could not be written; what was there is still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path, then):
            if _is_special(path):
                with path.open("wb") as file:
                    _write(file, write)
                return
            with temporary.open("w+b") as file:
                _write(file, write)
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
    finally:
        with suppress(OSError):  # the error that matters is on its way
            temporary.unlink(missing_ok=True)


def _is_special(path: Path) -> bool:
    return path.exists() and not path.is_file() and not path.is_dir()


def _write(file: BinaryIO, write: Callable[[BinaryIO], Any]) -> None:
    watched = _Watched(file)
    try:
        write(watched)  # type: ignore[arg-type]
    except Exception:
        # torch and Pillow report a full disk as many things.
        if watched.error is not None:
            raise watched.error from None
        raise
    file.flush()


class _Watched:
    """A file that remembers the error of the system that ended the writing."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        try:
            self._file.flush()
        except OSError as error:
            self.error = self.error or error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _sync_folder(folder: Path) -> None:
    """So that the new name outlives a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Mapping[str, Any], then: str = "") -> None:
    """Replaces a file of readable JSON; nan and inf become null.

    Raises:
        WriteError: it could not be written.
    """
    text = json.dumps(plain(value), indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()), then)


def plain(value: Any) -> Any:
    """As JSON returns it: lists for tuples, and null for nan and inf, which JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory was not enough, on the host or on a GPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in text
        or "Storage size calculation overflowed" in text
        or "invalid size, integer multiplication overflow" in text
        or "numel: integer multiplication overflow" in text
    )
