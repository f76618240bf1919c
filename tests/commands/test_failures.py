"""What goes wrong outside the program is one line: full disks, damaged files, wild numbers."""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dyhead_cuda import __main__ as command_line
from dyhead_cuda.commands.options import run_or_file
from dyhead_cuda.detection import export_files
from dyhead_cuda.detection.data import DigitScenes, write_coco
from dyhead_cuda.detection.figures import curves
from dyhead_cuda.detection.training import progress, runs
from dyhead_cuda.detection.training.run_lock import held
from tests.helpers.detection.finders import save_run
from tests.helpers.paths import ROOT

QUICK = [
    *("--backbone", "timm/test_resnet.r160_in1k", "--channels=16", "--blocks=1", "--levels=3-5"),
    *("--images=4", "--val-images=2", "--scene-size=64", "--batch-size=2", "--device=cpu"),
    *("--steps=4", "--checkpoint-every=1", "--warmup-steps=1"),
]


def command(*arguments: object) -> int:
    try:
        return command_line.main([str(argument) for argument in arguments])
    except SystemExit as ended:
        return int(ended.code or 0)


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of errors that a command has written."""
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose disk was full when the second of four steps was to be saved."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        fill_disk(patch, "last.pt", after=1)
        assert command("train", *QUICK, "--out", folder) == 1
    return folder


def fill_disk(patch: pytest.MonkeyPatch, name: str, after: int = 0) -> None:
    """From the ``after``-th file of that name on, writing it goes to a device that is full."""
    usual = Path.open
    seen = 0

    def open_file(path: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
        nonlocal seen
        if name in path.name and mode != "r" and mode != "rb":
            seen += 1
            if seen > after:
                path.touch()
                return usual(Path("/dev/full"), mode, *rest, **options)
        return usual(path, mode, *rest, **options)

    patch.setattr(Path, "open", open_file)


FILES = ["config.json", "log.jsonl", "last.pt", "best.pt", "metrics.json", "curve.png"]


@pytest.mark.parametrize("name", [*FILES, "000001.png"])
def test_a_full_disk_is_one_line_and_the_run_goes_on(
    name: str,
    stopped: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    options = [*QUICK, "--pictures=1", "--out", run]
    with monkeypatch.context() as patch:
        fill_disk(patch, name, after=1 if name == "log.jsonl" else 0)
        assert command("train", *options) == 1
    line = error_line(capsys)
    assert f"cannot write {run}" in line
    assert f"{name}: No space left on device; free some space there" in line
    if name in FILES[:4]:
        assert "run the same command again: the run goes on from its last checkpoint" in line
    assert runs.read_checkpoint(run / "last.pt")["step"] >= 1
    assert not list(run.glob("**/.*"))
    assert command("train", *options) == 0
    steps = [r["step"] for r in runs.RunFolder(run).records() if "loss" in r]
    assert steps == [1, 2, 3, 4]


def test_a_limit_on_files_in_a_process_of_its_own(tmp_path: Path) -> None:
    """Nothing is replaced by the test here; torch says of it what it likes."""
    done = subprocess.run(
        [sys.executable, "-m", "dyhead_cuda", "train", *QUICK, "--out", str(tmp_path / "run")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert f"cannot write {tmp_path / 'run' / 'last.pt'}: File too large; raise the limit" in line
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.json", "log.jsonl"}


def test_events_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    files = "tensorboard.compat.tensorflow_stub.io.gfile.LocalFileSystem"
    monkeypatch.setattr(f"{files}._write", full)
    noise: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", noise.append)
    with pytest.raises(OSError, match=rf"cannot write {tmp_path}: No space left"):
        write_events(tmp_path)
    assert noise == []


def write_events(folder: Path) -> None:
    with progress.tensorboard(folder) as listener:
        for step in range(1000):
            listener({"step": step, "loss": 1.0})


@pytest.mark.parametrize("name", ["config.json", "log.jsonl", "last.pt", "curve.png", "pictures"])
def test_what_is_in_the_way_is_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / name).touch() if name == "pictures" else (run / name).mkdir()
    assert command("train", *QUICK, "--pictures=1", "--out", run) in (1, 2)
    assert name in error_line(capsys)


def test_a_folder_in_use_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done: list[int] = []
    with held(tmp_path):  # by this thread, so that another one is kept out
        thread = threading.Thread(
            target=lambda: done.append(command("train", *QUICK, "--out", tmp_path))
        )
        thread.start()
        thread.join()
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    assert done == [2]
    assert f"process {os.getpid()} on " in error_line(capsys)


def test_the_folder_is_in_use_until_all_is_written(
    stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    there: list[bool] = []
    monkeypatch.setattr(curves, "draw", lambda *_: there.append((tmp_path / ".lock").exists()))
    assert command("train", *QUICK, "--out", tmp_path) == 0
    assert there == [True]
    assert not (tmp_path / ".lock").exists()


def _save(**fields: Any) -> Callable[[Path, Path], Any]:
    def save(path: Path, good: Path) -> None:
        torch.save({**torch.load(good, weights_only=True), **fields}, path)

    return save


def _flip(path: Path, good: Path) -> None:
    content = bytearray(good.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


CHECKPOINTS: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "text": (lambda path, good: path.write_text("root:x:0:0"), "begins with b'root'"),
    "cut": (lambda path, good: path.write_bytes(good.read_bytes()[:-2000]), "cannot read"),
    "one bit": (_flip, "is damaged: its bytes do not have the checksum"),
    "a folder": (lambda path, good: path.mkdir(), "does not exist"),
    "no configuration": (_save(config=None), "a config that is None"),
    "another's": (lambda path, good: torch.save({"state_dict": {}}, path), "holds state_dict"),
    "no model": (_save(config={}), "no 'model'"),
    "no settings": (_save(config={"model": 3, "classes": []}), "cannot make a model"),
    "no classes": (_save(config={"model": {"detector": "atss", "num_classes": 3}}), "'classes'"),
    "no such detector": (_save(config={"model": {"detector": "x", "num_classes": 3}}), "'x'"),
    "no weights": (_save(model={}), "Missing key(s)"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, with a photograph and a data set beside it."""
    folder = tmp_path_factory.mktemp("good")
    write_coco(DigitScenes("val", 2, size=(64, 64)), folder)
    Image.new("RGB", (64, 64), "red").save(folder / "red.png")
    return save_run("atss", folder)


def commands_with(checkpoint: Path, good: Path, out: Path) -> dict[str, list[object]]:
    """Each command that takes a checkpoint."""
    image = good.parent / "red.png"
    return {
        "eval": ["eval", checkpoint, "--data", good.parent],
        "predict": ["predict", image, "--checkpoint", checkpoint, "--out", out],
        "attend": ["attend", image, "--checkpoint", checkpoint, "--out", out],
        "export": ["export", checkpoint, "--format=pt2", "--size=64x64", "--out", out / "a.pt2"],
    }


@pytest.mark.parametrize("name", ["eval", "predict", "attend", "export"])
@pytest.mark.parametrize("case", CHECKPOINTS)
def test_what_is_no_checkpoint_is_one_line(
    case: str, name: str, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, message = CHECKPOINTS[case]
    path = tmp_path / "given.pt"
    make(path, good)
    assert command(*commands_with(path, good, tmp_path / "out")[name]) == 2
    line = error_line(capsys)
    assert message in line
    assert str(path) in line
    assert len(line) < 700
    assert not (tmp_path / "out").exists()


def test_train_names_a_damaged_checkpoint(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    _flip(tmp_path / "last.pt", stopped / "last.pt")
    assert command("train", *QUICK, "--out", tmp_path) == 2
    line = error_line(capsys)
    assert "last.pt is damaged" in line
    assert "--restart" in line


def test_eval_of_a_run_that_names_no_data(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("eval", good) == 2
    assert "name the data with --data" in error_line(capsys)


@pytest.mark.parametrize("name", ["predict", "attend", "export"])
def test_where_nothing_can_be_written(
    name: str, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert command(*commands_with(good, good, tmp_path / "file" / "out")[name]) == 2
    line = error_line(capsys)
    assert str(tmp_path / "file") in line
    assert "a file is where a folder should be" in line


def test_export_looks_first_whether_it_can_write(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.pt2"
    out.mkdir()
    assert command("export", good, "--format=pt2", "--size=64x64", "--out", out) == 2
    assert f"--out as a file, got the folder {out}" in error_line(capsys)


def test_a_file_that_does_not_load_is_one_line(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As with an --opset that no program knows."""

    def load(*_: Any) -> None:
        raise NotImplementedError("opset 60")

    monkeypatch.setattr(export_files, "load", load)
    assert command(*commands_with(good, good, tmp_path)["export"]) == 2
    assert "the file that was written does not load: opset 60" in error_line(capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["nowhere/found.json", "."])
def test_eval_looks_first_whether_it_can_write(
    place: str, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--data", good.parent, "--json", tmp_path / place]
    assert command("eval", good.parent / "no such run", *options) == 2
    assert "--json as a file in a folder that is there" in error_line(capsys)


@pytest.mark.parametrize("name", ["predict", "attend"])
def test_a_full_disk_in_other_commands(
    name: str,
    good: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fill_disk(monkeypatch, "red")
    assert command(*commands_with(good, good, tmp_path)[name]) == 2
    line = error_line(capsys)
    assert f"cannot write {tmp_path}/red" in line
    assert "No space left on device" in line
    assert list(tmp_path.iterdir()) == []


def test_no_memory_is_one_line(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def allocate(*_: Any, **__: Any) -> None:
        torch.empty(2**60)

    monkeypatch.setattr("dyhead_cuda.commands.predict.detect", allocate)
    assert command(*commands_with(good, good, tmp_path)["predict"]) == 2
    line = error_line(capsys)
    assert "there is not enough memory" in line
    assert "shrink the images" in line


HOSTILE = ("2147483648", "-2147483648", "9" * 5000, "1e400", "-1e400", "nan", "-inf", "0x10", "")
WILD = {
    "--size": ("2147483647", "2147483647x2147483647", "0x0", "-5"),
    "--batch-size": ("2147483647", "0"),
    "--workers": ("2147483647", "-1"),
    "--channels": ("2147483647",),
    "--blocks": ("2147483647", "-1"),
    "--convs": ("2147483647",),
    "--images": ("2147483647",),
    "--scene-size": ("2147483647", "31"),
    "--max-size": ("2147483647",),
    "--epochs": ("1e308", "0"),
    "--points": ("nan,1", "1,1e400", "1"),
    "--box": ("-1",),
    "--threshold": ("1.5", "-0.1"),
}


def numeric_options() -> list[tuple[str, str]]:
    """Every option with a type of its own that is no path, by command."""
    found = []
    for name, entry in command_line.COMMANDS.items():
        parser = argparse.ArgumentParser()
        entry.add_arguments(parser)
        found += [
            (name, action.option_strings[0])
            for action in parser._actions
            if action.type not in (None, Path, run_or_file) and action.option_strings
        ]
    return found


@pytest.mark.parametrize(("name", "option"), numeric_options())
def test_wild_numbers_are_refused_in_one_line(
    name: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    command_line.COMMANDS[name].add_arguments(parser)
    for action in parser._actions:
        action.required = False
    for text in (*HOSTILE, *WILD.get(option, ())):
        try:
            value = getattr(parser.parse_args([f"{option}={text}"]), option[2:].replace("-", "_"))
        except SystemExit as ended:
            status = ended.code
            line = capsys.readouterr().err.splitlines()[-1]
        else:  # 2 ** 31 is a number of no range, and a seed of the demonstration
            assert isinstance(value, float) or (name, option) == ("demo", "--seed")
            assert value == float(text) == 2**31
            continue
        assert status == 2
        assert f"argument {option}" in line
        assert len(line) < 300
