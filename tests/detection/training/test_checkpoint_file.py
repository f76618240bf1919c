"""Files of checkpoints: every damage is found, and whatever else a file is has its line."""

from __future__ import annotations

import logging
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dyhead_cuda.detection.training.checkpoint_file import read_checkpoint, write_checkpoint
from dyhead_cuda.detection.training.errors import RunError

FLIPS = 200
CHECKPOINT = {
    "step": 2,
    "config": {"model": {"attentions": ["scale", "task"]}, "training": {"lr": 0.1}},
    "model": {"weight": torch.arange(5000.0), "bias": torch.ones(3, dtype=torch.float64)},
    "random": [{"python": (3, tuple(range(100)), None)}],
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "last.pt", CHECKPOINT)
    return tmp_path / "last.pt"


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal, bit by bit where they are tensors."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def read_or_refuse(path: Path) -> dict[str, Any] | str:
    try:
        return read_checkpoint(path)
    except RunError as error:
        return str(error)


def test_any_program_reads_the_file(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert same(read_checkpoint(path), CHECKPOINT)
    assert same(torch.load(path, weights_only=True), CHECKPOINT)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"sha256:")
    assert caplog.records == []


def test_every_flipped_bit_is_found_or_harmless(path: Path) -> None:
    """Random bits, and all of the archive's end, where the checksum is."""
    content = path.read_bytes()
    rng = random.Random(0)
    bits = [rng.randrange(8 * len(content)) for _ in range(FLIPS)]
    bits += range(8 * (len(content) - 93), 8 * len(content))
    harmless = 0
    for bit in bits:
        flip(path, bit)
        found = read_or_refuse(path)
        if isinstance(found, str):
            assert str(path) in found
            assert "\n" not in found
        else:
            assert same(found, CHECKPOINT), bit
            harmless += 1
            # What follows is the checksum's own name and length: the rest is as it was written.
            assert bit // 8 >= len(content) - 73, bit
        flip(path, bit)
    assert path.read_bytes() == content
    assert harmless < len(bits) // 4


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_file_that_was_cut_off_is_found(share: float, path: Path) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(RunError):
        read_checkpoint(path)


def test_without_a_checksum_a_file_is_read_with_a_note(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As earlier versions wrote it, and as another program does that has changed it."""
    changed = {**CHECKPOINT, "step": 3}
    torch.save(changed, path)
    with caplog.at_level(logging.INFO, "dyhead_cuda.detection"):
        assert same(read_checkpoint(path), changed)
    (record,) = caplog.records
    assert f"{path} has no checksum" in record.getMessage()


def test_what_cannot_be_saved_leaves_what_was_there(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises((pickle.PicklingError, AttributeError)):  # by the version of Python
        write_checkpoint(path, {**CHECKPOINT, "model": lambda: None})
    assert path.read_bytes() == before
    assert [each.name for each in path.parent.iterdir()] == ["last.pt"]


class Unknown:
    """What a checkpoint must not bring to life."""


def _overwrite(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[: len(content) // 2] = bytes(len(content) // 2)
    path.write_bytes(content)


def _other(**fields: Any) -> Callable[[Path], None]:
    return lambda path: torch.save({**CHECKPOINT, **fields}, path)


def _replace_by(make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def replace(path: Path) -> None:
        path.unlink()
        make(path)

    return replace


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "no tensors")


OTHERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "overwritten": (_overwrite, "begins with b'\\x00"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "text": (lambda path: path.write_text("no checkpoint"), "begins with b'no c'"),
    "a pickle": (lambda path: path.write_bytes(pickle.dumps(CHECKPOINT["step"])), "begins with"),
    "an old file of torch": (
        lambda path: torch.save(CHECKPOINT, path, _use_new_zipfile_serialization=False),
        "begins with",
    ),
    "another zip": (_zip, "no file of torch.save"),
    "missing": (lambda path: path.unlink(), "does not exist"),
    "a folder": (_replace_by(Path.mkdir), "no regular file"),
    "a pipe": (_replace_by(os.mkfifo), "no regular file"),
    "a device": (_replace_by(lambda path: path.symlink_to("/dev/zero")), "no regular file"),
    "a circle of links": (_replace_by(lambda path: path.symlink_to(path)), "cannot read"),
    "a tensor": (lambda path: torch.save(torch.ones(3), path), "holds a Tensor"),
    "weights alone": (
        lambda path: torch.save({"weight": torch.ones(3)}, path),
        "holds weight and no step, config, model",
    ),
    "nothing": (lambda path: torch.save({}, path), "holds nothing and no step"),
    "another's keys": (
        lambda path: torch.save({"state_dict": {}, 5: 1}, path),
        "holds state_dict, 5 and no step, config, model",
    ),
    "an object": (_other(config=Unknown()), "more than tensors and plain values"),
    "no configuration": (_other(config=None), "holds a config that is None, not a dict"),
    "a list of weights": (_other(model=[torch.ones(3)]), "holds a model that is a list"),
    "weights that are none": (_other(model={"weight": "x"}), "a weight 'weight' that is 'x'"),
    "a step in words": (_other(step="2"), "holds a step that is '2'"),
    "a step that is true": (_other(step=True), "holds a step that is True"),
    "a step below 0": (_other(step=-1), "holds a step that is -1"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_is_no_checkpoint_is_refused(other: str, path: Path) -> None:
    change, message = OTHERS[other]
    change(path)
    with pytest.raises(RunError) as error:
        read_checkpoint(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 700
