"""The command line around the commands: help, usage, and packages that are not installed."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from benchmarks import __main__ as benchmarks
from dyhead_cuda import __main__ as package
from tests.helpers.missing import EXTRAS, run_without

PROGRAMS = {"dyhead_cuda": list(package.COMMANDS), "benchmarks": list(benchmarks.ACTIONS)}
USAGES = [(program, name) for program, names in PROGRAMS.items() for name in (None, *names)]

# Runs each command line and prints its exit status and what it wrote.
RUN = """
import contextlib, importlib, io, json
said = []
for program, argv in {lines!r}:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = importlib.import_module(f"{{program}}.__main__").main(argv)
        except SystemExit as stopped:
            status = stopped.code
    said.append([status, out.getvalue(), err.getvalue()])
print(json.dumps(said))
"""


def run_all(lines: list[tuple[str, list[str]]]) -> list[Any]:
    done = run_without(EXTRAS, RUN.format(lines=lines))
    assert done.returncode == 0, done.stderr
    said: list[Any] = json.loads(done.stdout)
    return said


@pytest.fixture(scope="module")
def helps() -> dict[tuple[str, str | None], Any]:
    """What every --help says where no extra is installed."""
    lines = [(program, [*([name] if name else []), "--help"]) for program, name in USAGES]
    return dict(zip(USAGES, run_all(lines), strict=True))


@pytest.mark.parametrize(("program", "name"), USAGES)
def test_help_needs_no_extra(
    program: str, name: str | None, helps: dict[tuple[str, str | None], Any]
) -> None:
    status, out, err = helps[program, name]
    assert (status, err) == (0, "")
    assert f"usage: python -m {program} {name or '['}" in out
    for listed in PROGRAMS[program] if name is None else ():
        assert listed in out


def test_help_shows_the_options_of_the_command(
    helps: dict[tuple[str, str | None], Any],
) -> None:
    for key, option in (
        (("dyhead_cuda", "train"), "--offset-lr"),
        (("dyhead_cuda", "scenes"), "--objects"),
        (("dyhead_cuda", "attend"), "--points"),
        (("dyhead_cuda", "export"), "boxes [n, 4] float32"),
        (("benchmarks", None), "--peers"),
        (("benchmarks", "compare"), "--threshold"),
        (("benchmarks", "study"), "--seeds"),
    ):
        assert option in helps[key][1]


def test_help_and_dry_run_of_the_gpu_check_need_no_extra() -> None:
    for option, expected in (("--help", "usage: make gpu-check"), ("--dry-run", "build_ext")):
        done = run_without(EXTRAS, f"from benchmarks.gpu_check import main; main([{option!r}])")
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout


EXPORT = ("--format", "onnx", "--size", "dynamic", "--out", "a.onnx")
RUNS: dict[tuple[str, tuple[str, ...]], str | None] = {
    ("dyhead_cuda", ("info",)): None,
    ("dyhead_cuda", ("check", "--device", "cpu")): None,
    ("dyhead_cuda", ("demo",)): "demo",
    ("dyhead_cuda", ("train",)): "detection",
    ("dyhead_cuda", ("scenes", "--out", "scenes")): "detection",
    ("dyhead_cuda", ("eval", "run")): "detection",
    ("dyhead_cuda", ("predict", "a.png", "--checkpoint", "run")): "detection",
    ("dyhead_cuda", ("attend", "a.png", "--checkpoint", "run")): "detection",
    ("dyhead_cuda", ("export", "run", *EXPORT)): "detection",
    ("benchmarks", ("--quick",)): "bench",
    ("benchmarks", ("compare", *["benchmarks/results/cpu.json"] * 2)): None,
    ("benchmarks", ("report", "benchmarks/results/cpu.json")): "bench",
    ("benchmarks", ("plot", "benchmarks/results/cpu.json")): "bench",
    ("benchmarks", ("targets", "benchmarks/results/cpu.json")): None,
    ("benchmarks", ("runtimes",)): "bench,detection",
    ("benchmarks", ("threads",)): "bench",
    ("benchmarks", ("model", "--help")): None,
    ("benchmarks", ("study",)): "bench,detection",
    ("benchmarks", ("first-weights",)): "bench,detection",
}


def test_what_runs_without_extras_and_what_names_the_one_it_needs() -> None:
    assert {(program, name) for program, (name, *_) in RUNS if name != "--quick"} == {
        (program, name) for program, name in USAGES if name
    }
    said = run_all([(program, list(argv)) for program, argv in RUNS])
    for ((program, argv), extra), (status, out, err) in zip(RUNS.items(), said, strict=True):
        if extra is None:
            assert (status, err) == (0, ""), argv
            assert out
        else:
            assert (status, out) == (2, ""), argv
            (line,) = err.splitlines()
            assert line.startswith(f"python -m {program}")
            assert line.endswith(f": run pip install 'dyhead_cuda[{extra}]'")
            missing = line.split(" needs ")[1].partition(":")[0]
            assert missing.partition(".")[0] in EXTRAS


def test_public_names_of_detection_say_what_is_missing() -> None:
    script = """
from dyhead_cuda import detection
from dyhead_cuda.detection import names
assert names.DETECTORS
for name in ("ATSS", "read_start", "train", "evaluate", "CocoFolder"):
    try:
        getattr(detection, name)
    except ModuleNotFoundError as error:
        print(error)
"""
    done = run_without(EXTRAS, script)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 5
    assert all(line.endswith("run pip install 'dyhead_cuda[detection]'") for line in lines)


def test_a_command_imports_only_what_it_needs() -> None:
    script = (
        "import sys; from dyhead_cuda.__main__ import main; main(['info']); "
        "print(sorted({'dyhead_cuda.commands.demo', 'matplotlib', 'torchvision', 'skimage'} "
        "& set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("program", "argv", "usage"),
    [
        (package, [], "python -m dyhead_cuda [-h]"),
        (package, ["no-such-command"], "python -m dyhead_cuda [-h]"),
        (package, ["info", "--no-such-option"], "python -m dyhead_cuda info [-h]"),
        (package, ["train", "--no-such-option", "1"], "python -m dyhead_cuda train [-h]"),
        (package, ["eval", "run", "--threshold", "1"], "python -m dyhead_cuda eval [-h]"),
        (benchmarks, ["--no-such-option"], "python -m benchmarks [-h]"),
        (benchmarks, ["no-such-action"], "python -m benchmarks [-h]"),
        (benchmarks, ["targets", "a.json", "--force"], "python -m benchmarks targets [-h]"),
    ],
)
def test_wrong_usage_exits_with_2_and_the_usage_of_the_command(
    program: Any, argv: list[str], usage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        program.main(argv)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"usage: {usage}")
    unknown = [word for word in argv if word.startswith("--")]
    assert not unknown or f"error: unrecognized arguments: {unknown[0]}" in said
