"""Files are replaced as a whole or not at all, and an error names the file, the cause and the way.

What the training and the commands make of it is in tests/commands/test_failures.py.
"""

from __future__ import annotations

import errno
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from dyhead_cuda.detection import files
from dyhead_cuda.detection.files import WriteError

WRITERS: dict[str, Callable[[BinaryIO], Any]] = {
    "bytes": lambda file: file.write(bytes(100_000)),
    "a checkpoint": lambda file: torch.save({"x": torch.ones(100_000)}, file),
    "a picture": lambda file: Image.effect_noise((300, 300), 50).save(file, "png"),
    "a figure": lambda file: Figure().savefig(file, format="png"),
}


@pytest.mark.parametrize("what", WRITERS)
def test_a_full_disk_whatever_is_written(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To a device that is full, in place of the temporary file."""
    path = tmp_path / "kept"
    path.write_bytes(b"before")
    usual = Path.open
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda self, *args: usual(Path("/dev/full"), *args))
        with pytest.raises(WriteError) as error:
            files.write_atomically(path, WRITERS[what], "then go on")
    assert error.value.errno == errno.ENOSPC
    assert str(error.value) == (
        f"cannot write {path}: No space left on device; free some space there, or choose a folder "
        "on another disk; then go on"
    )
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["kept"]


def test_other_errors_pass_and_leave_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    path.write_bytes(b"before")

    def write(file: BinaryIO) -> None:
        file.write(b"half")
        raise KeyError("of the writer")

    with pytest.raises(KeyError, match="of the writer"):
        files.write_atomically(path, write)
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["kept"]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("nowhere/file", "No such file or directory; make its folder first"),
        ("file/below", "Not a directory; a file is where a folder should be"),
        ("folder", "Is a directory; a folder is where the file should be"),
        ("x" * 300, "File name too long; choose a shorter name"),
    ],
)
def test_what_to_do(place: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(WriteError, match=message):
        files.write_json(tmp_path / place, {})
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_a_device_is_written_and_not_replaced(tmp_path: Path) -> None:
    link = tmp_path / "null"
    link.symlink_to("/dev/null")
    files.write_json(link, {"a": 1})
    assert link.is_symlink()
    os.mkfifo(tmp_path / "pipe")
    child = os.fork()
    if child == 0:
        os._exit((tmp_path / "pipe").read_bytes() != b'{\n  "a": 1\n}\n')
    files.write_json(tmp_path / "pipe", {"a": 1})
    assert os.waitpid(child, 0)[1] == 0
    assert sorted(os.listdir(tmp_path)) == ["null", "pipe"]


def test_an_error_passes_between_processes() -> None:
    error = pickle.loads(pickle.dumps(WriteError("cannot write x", errno.ENOSPC)))
    assert (str(error), error.errno) == ("cannot write x", errno.ENOSPC)


def test_what_says_that_memory_is_short() -> None:
    for sizes in ((2**60,), (2**40, 2**40)):
        with pytest.raises(RuntimeError) as error:
            torch.empty(sizes)
        assert files.out_of_memory(error.value)
    assert files.out_of_memory(MemoryError())
    assert not files.out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not files.out_of_memory(ValueError("can't allocate memory"))
