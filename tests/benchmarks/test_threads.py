"""``python -m benchmarks threads``: recorded tasks, worked off on more threads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import readme
from benchmarks.__main__ import main
from benchmarks.measuring import threads
from benchmarks.measuring.threads import Recording, TaskList
from tests.helpers.paths import ROOT

RESULTS = Path("benchmarks") / "results" / "threads" / "cpu.json"


def test_a_free_thread_takes_the_next_task() -> None:
    tasks = TaskList(0, 16, 1, (5, 2, 2, 6))
    assert [tasks.time_on(n) for n in (1, 2, 3, 4, 64)] == [16, 11, 9, 7, 7]


def test_what_runs_outside_the_lists_gains_nothing() -> None:
    lists = (TaskList(10, 50, 0, (10,) * 4), TaskList(50, 60, 0, (10,)))
    recording = Recording(100, lists)
    assert recording.alone == 50
    assert recording.time_on(1, recording.alone) == 100
    assert recording.time_on(2, recording.alone) == 80
    assert recording.time_on(64, 5) == 25


PROGRAM = """
#include "cpu/parallel.h"
int main() {
  volatile double sum = 0;
  dyhead::cpu::parallel_for_each(3, [&](int64_t i) {
    for (int64_t k = 0; k < (i + 1) * 2000000; ++k) sum = sum + 1;
  });
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_library_records_each_task(tmp_path: Path) -> None:
    (tmp_path / "tasks.cpp").write_text(PROGRAM)
    program, file = tmp_path / "tasks", tmp_path / "record"
    subprocess.run(
        [
            *("g++", "-std=c++20", "-O1", "-DDYHEAD_RECORD_TASKS", "tasks.cpp", "-o", program),
            *("-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{ROOT / 'csrc'}"),
            f"-isystem{Path(torch.__file__).parent / 'include'}",
        ],
        cwd=tmp_path,
        check=True,
    )
    record = os.environ | {"DYHEAD_TASK_RECORD": str(file)}
    for environment in (record, record, os.environ):
        subprocess.run([program], env=environment, check=True)
    first, second = (TaskList.read(line) for line in file.read_text().splitlines())
    assert first.begin < first.end
    assert first.scratch + sum(first.tasks) == first.end - first.begin
    for each in (first, second):
        assert len(each.tasks) == 3
        assert each.tasks[0] < each.tasks[2]


def test_a_library_that_records_nothing_is_an_error(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        with pytest.raises(RuntimeError, match="DYHEAD_INSTRUMENT=tasks"):
            threads.record("yolo", "float32", False, 1, tmp_path / "none")
    finally:
        torch.set_num_threads(before)


def test_a_build_that_fails_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def failing(command: list[str], **_: Any) -> None:
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(subprocess, "run", failing)
    assert main(["threads", "--json", str(tmp_path / "none.json")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "nothing was measured" in line
    assert not (tmp_path / "none.json").exists()


def test_the_docs_show_the_committed_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = json.loads((ROOT / RESULTS).read_text())
    text = (ROOT / "docs" / "performance.md").read_text()
    assert readme.replace_section(text, readme.THREADS, threads.section(data)) == text, (
        "run python -m benchmarks threads --report --write docs/performance.md"
    )
    page = tmp_path / "page.md"
    page.write_text("\n".join(readme.markers(readme.THREADS)))
    options = ["threads", "--report", "--json", str(ROOT / RESULTS)]
    assert main([*options, "--write", str(page)]) == 0
    assert threads.section(data) in page.read_text()
    assert main(options) == 0
    assert threads.section(data) in capsys.readouterr().out
