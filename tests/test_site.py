"""make docs builds the site, and fails upon a link that leads nowhere."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

pytest.importorskip("mkdocs", reason="make docs needs mkdocs; make venv installs it")
pytest.importorskip("mkdocstrings")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What make docs reads, as a copy that a test may spoil."""
    ignored = shutil.ignore_patterns("lib", "__pycache__")
    for folder in ("docs", "dyhead_cuda", "examples", "benchmarks", "tests/golden"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    files = ("mkdocs.yml", "Makefile", "CITATION.cff")
    for path in [*(ROOT / name for name in files), *ROOT.glob("*.md")]:
        shutil.copy(path, tmp_path)
    return tmp_path


def make_docs(checkout: Path) -> subprocess.CompletedProcess[str]:
    command = ["make", "docs", "VENV=none", f"PYTHON={sys.executable}"]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True)


def test_the_site_has_all_pages_and_what_they_link(checkout: Path) -> None:
    result = make_docs(checkout)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "excluded" not in result.stderr, result.stderr
    site = checkout / "build" / "site"
    home = (site / "index.html").read_text()
    assert "No GPU has run the CUDA kernels yet" in home
    local = [link for link in re.findall(r'(?:href|src)="([^":#]+)"', home) if link != "."]
    assert "files/examples/accelerate.py" in local
    assert "images/demo.png" in local
    assert [link for link in local if not (site / link).exists()] == []
    api = (site / "api.html").read_text()
    assert 'id="dyhead_cuda.modules.DyHead"' in api
    assert "Example:" not in api  # shown as sections of examples
    assert ":func:" not in api


def test_links_that_lead_nowhere_are_errors(checkout: Path) -> None:
    nowhere = ("none.md", "design.md#none", "../README.md#none", "../none.txt")
    with (checkout / "docs" / "start.md").open("a") as page:
        page.write("".join(f"\nSee [this]({link}).\n" for link in nowhere))
    result = make_docs(checkout)
    assert result.returncode != 0
    assert result.stderr.count("WARNING") == len(nowhere), result.stderr
