"""One process at a time writes to a run folder.

The lock is one of the kernel (``flock``) on the file ``.lock`` in the folder, so it ends with the
process that holds it, however that ends; the file that a killed process leaves is taken over. The
file says who holds it, for the message that others get.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

from dyhead_cuda.detection.files import explained
from dyhead_cuda.detection.training.errors import RunError

NAME = ".lock"

_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_logger = logging.getLogger("dyhead_cuda.detection")

# The descriptors of this process by folder and thread. A thread may take its own lock again.
_held: dict[tuple[str, int], int] = {}


def _close_in_child() -> None:
    """A forked worker that outlives the training by a moment must not keep its lock."""
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Holds the lock of a run folder, which is there.

    Raises:
        RunError: another process holds it: which, where, since when, and what to do; or it cannot
            be written to.
    """
    key = (os.path.realpath(folder), threading.get_ident())
    if key in _held:
        yield
        return
    path = folder / NAME
    try:
        descriptor = _locked(path)
    except OSError as error:
        raise _unusable(folder, error) from None
    if descriptor is None:
        yield
        return
    _held[key] = descriptor
    try:
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, _myself().encode(), 0)
        except OSError as error:
            raise _unusable(folder, error) from None
        yield
    finally:
        # Not in a child that was forked inside: the file is the parent's.
        if _held.pop(key, None) is not None:
            path.unlink(missing_ok=True)  # before others can have it
            os.close(descriptor)


def _unusable(folder: Path, error: OSError) -> RunError:
    return RunError(f"cannot write to the run folder {folder}: {explained(error)}")


def _locked(path: Path) -> int | None:
    """A descriptor of the file with the lock; None where the file system has no locks."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(path, descriptor):
                return descriptor
        except BlockingIOError:
            message = _in_use(path, descriptor)
            os.close(descriptor)
            raise RunError(message) from None
        except OSError as error:
            os.close(descriptor)
            if error.errno not in _UNSUPPORTED:
                raise
            _logger.warning(
                "%s cannot be locked (%s): see to it that one training at a time uses the folder",
                path,
                error.strerror,
            )
            return None
        # Its holder removed the file between opening and locking it.
        os.close(descriptor)


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _myself() -> str:
    since = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since})


def _in_use(path: Path, descriptor: int) -> str:
    who = "another process"
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        who = f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        _logger.debug("%s: its holder has not written its name yet", path)
    return (
        f"{path.parent} is in use by another training: {who}; wait until it ends, stop it, or use "
        "another folder (--out)"
    )
