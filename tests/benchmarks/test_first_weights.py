"""What first weights blur, and the table of short trainings from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command_line
from benchmarks import first_weights, readme
from dyhead_cuda import DyHead, DyHeadBlock
from tests.helpers.paths import ROOT


def test_local_weights_blur_less() -> None:
    published, local = (first_weights.blur(init, 4) for init in ("mmdet", "local"))
    assert published["correlation"] > 0.4 > 0.1 > local["correlation"]
    assert published["near"] < 0.4 < 0.9 < local["near"]
    for shares in (published, local):
        assert 0 < shares["near"] <= 1 - shares["other"] + 1e-6


def test_changes_of_the_first_weights() -> None:
    for name, (own, others, last) in {
        "six": (1, 1, True),
        "six-local": (5, 1, True),
        "six-large": (3.5, 3.5, True),
        "six-large-last": (3.5, 3.5, False),
        "six-strong": (5, 1, True),
        "six-identity": (3.5, 3.5, True),
    }.items():
        row = first_weights.ROWS[name]
        blocks = [
            m for m in DyHead(16, 16, 2, init=row.init).modules() if isinstance(m, DyHeadBlock)
        ]
        with torch.no_grad():
            row.change(blocks)
        assert (blocks[-1].mid.norm.weight == own).all()
        assert (blocks[-1].low.norm.weight == others).all()
        assert bool((blocks[0].mid.norm.weight == own).all()) == last


def test_a_training_starts_from_them_and_is_kept(tmp_path: Path) -> None:
    ap = first_weights.average_precision("two-local", 2e-3, tmp_path, steps=1, images=12)
    assert 0 <= ap <= 1
    (folder,) = tmp_path.iterdir()
    before = (folder / "last.pt").stat().st_mtime_ns
    assert first_weights.average_precision("two-local", 2e-3, tmp_path, 1, 12) == ap
    assert (folder / "last.pt").stat().st_mtime_ns == before


def test_the_docs_show_the_committed_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = ROOT / "benchmarks" / "results" / "first_weights" / "cpu.json"
    found = json.loads(path.read_text())
    text = (ROOT / "docs" / "study.md").read_text()
    shown = readme.replace_section(text, readme.FIRST_WEIGHTS, first_weights.section(found))
    assert shown == text, "run python -m benchmarks first-weights --report --write docs/study.md"
    page = tmp_path / "page.md"
    page.write_text("\n".join(readme.markers(readme.FIRST_WEIGHTS)))
    options = ["--report", "--json", str(path), "--write", str(page)]
    assert command_line.main(["first-weights", *options]) == 0
    assert first_weights.section(found) in page.read_text()
    assert command_line.main(["first-weights", "--report", "--json", str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err
