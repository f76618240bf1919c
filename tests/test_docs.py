"""The documentation keeps to the tree: links, paths, names, commands, numbers and examples."""

from __future__ import annotations

import ast
import pkgutil
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

import dyhead_cuda
from dyhead_cuda import compat, detection, functional, modules, reference
from dyhead_cuda.__main__ import COMMANDS
from dyhead_cuda.version import __version__
from tests.helpers.paths import ROOT

GUIDES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [*GUIDES, ROOT / "CHANGELOG.md"]  # which also names what was somewhere else before
NOT_RUN = "# Not run by the tests:"  # the first line of what needs a package that is not there
IN_TURN = ROOT / "docs" / "export.md"  # whose blocks go on from each other: tests/onnx

FOLDERS = ("csrc", "cmake", "dyhead_cuda", "benchmarks", "examples", "tests", "docs", ".ci")
ENDINGS = "py|md|h|cuh|cu|cpp|inc|cmake|toml|yml|txt|json|in"
PATH = re.compile(rf"(?:{'|'.join(map(re.escape, FOLDERS))})/[\w./-]*|[\w.-]+\.(?:{ENDINGS})")
PLACEHOLDER = re.compile(r"(?<![A-Za-z])X(?![A-Za-z])")  # csrc/host/X.cpp

names = pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)


def without_code_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def backticked(page: Path) -> list[str]:
    found = re.findall(r"`([^`]+)`", without_code_blocks(page.read_text()))
    return [" ".join(text.split()) for text in found]


def links(page: Path) -> Iterator[tuple[Path, str]]:
    """Target and anchor of every relative link."""
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code_blocks(page.read_text())):
        if not re.match(r"\w+:", target):
            path, _, anchor = target.partition("#")
            yield (page.parent / path if path else page).resolve(), anchor


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings."""
    headings = re.findall(r"^#+ (.*)$", without_code_blocks(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def existing_names() -> set[str]:
    folders = [folder for folder in FOLDERS if folder != ".ci"]
    inside = {path.name for folder in folders for path in (ROOT / folder).rglob("*")}
    return inside | {path.name for path in ROOT.iterdir()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_point_to_what_exists(page: Path) -> None:
    missing = [
        f"{path}#{anchor}"
        for path, anchor in links(page)
        if not path.exists() or (anchor and anchor not in anchors(path))
    ]
    assert not missing


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached = {ROOT / "README.md"}
    waiting = list(reached)
    while waiting:
        new = {path for path, _ in links(waiting.pop()) if path.suffix == ".md"} - reached
        reached |= new
        waiting += new
    assert set(PAGES) <= reached, "link these pages, from README.md or from one that it links"


@names
def test_paths_exist(page: Path) -> None:
    known = existing_names()
    missing = [
        text
        for text in backticked(page)
        if PATH.fullmatch(text)
        and not PLACEHOLDER.search(text)
        and not ((ROOT / text).exists() if "/" in text else text in known)
    ]
    assert not missing


@names
def test_names_of_the_package_exist(page: Path) -> None:
    for text in backticked(page):
        if match := re.match(r"dyhead_cuda(?:\.\w+)+", text):
            pkgutil.resolve_name(match[0])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    indented = re.findall(r"^ {4}(.*)$", page.read_text(), re.MULTILINE)
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for text in [*indented, *backticked(page)]:
        for target in re.findall(r"(?:^|; )(?:\w+=\S+ )*make ([a-z0-9-]+)", text):
            assert target in targets, text
    if page.name == "CHANGELOG.md":
        return
    for text in [*indented, *backticked(page)]:
        for command in re.findall(r"python -m dyhead_cuda (\w+)", text):
            assert command in COMMANDS, text


def test_the_readme_executes_nothing_of_a_checkpoint() -> None:
    text = (ROOT / "README.md").read_text()
    assert "compat.load_checkpoint(" in text
    assert "torch.load(" not in text


WITH_EXAMPLES = [page for page in GUIDES if page != IN_TURN and python_blocks(page)]


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=lambda page: page.name)
def test_examples_stand_alone(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block can be pasted into a new Python as it is."""
    monkeypatch.chdir(tmp_path)  # for what they write
    for block in python_blocks(page):
        if NOT_RUN in block:
            assert page.name != "README.md"
        else:
            exec(compile(block, page.name, "exec"), {"__name__": "__main__"})


def test_pages_for_newcomers_have_examples() -> None:
    assert {"README.md", "start.md", "detectors.md"} <= {page.name for page in WITH_EXAMPLES}


def test_the_first_screen_says_what_one_must_know() -> None:
    text = (ROOT / "README.md").read_text()
    first = text[: text.index("## Use")]
    for needed in ("make demo", "make test", "No GPU has run", "pip install", "Linux", "Python"):
        assert needed in first, needed
    assert "installs\nnothing into other environments" in first
    assert len(text.splitlines()) < 110, "what is longer belongs into docs/"


def test_every_example_is_linked() -> None:
    linked = {path for page in ("README.md", "docs/start.md") for path, _ in links(ROOT / page)}
    assert set((ROOT / "examples").glob("*.py")) <= linked


def test_the_citation_is_of_this_version() -> None:
    text = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.*)$", text, re.MULTILINE)[1] == __version__  # type: ignore[index]
    assert "arXiv:2106.08322" in text


def test_the_api_has_every_public_name() -> None:
    """The page that is made of docstrings names what it shows; nothing public is missing."""
    listed = set(re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE))
    shown = {id(pkgutil.resolve_name(name)) for name in listed}
    assert len(shown) == len(listed), "a name is there twice"
    types = {
        "ATTENTIONS",
        "Activation",
        "Attention",
        "HighOffset",
        "Init",
        "ResizeMode",
        "WithoutTask",
    }
    types |= {"Targets", "UnifiedParameters", "Upsample"}
    for module in (dyhead_cuda, compat, detection, functional, modules, reference):
        for name in set(module.__all__) - types:
            value = getattr(module, name)
            if not isinstance(value, str | ModuleType):
                assert id(value) in shown, f"{module.__name__}.{name} is missing in docs/api.md"


def test_pictures_are_small_and_drawn_by_the_script(tmp_path: Path) -> None:
    pictures = runpy.run_path(str(ROOT / "docs" / "pictures.py"))
    committed = {path.name: path.stat().st_size for path in (ROOT / "docs" / "images").iterdir()}
    assert set(committed) == {
        *("demo.png", "detections.png", "attention.png"),  # of make demo
        *("quirk.png", "offsets.png"),
    }
    assert max(committed.values()) < 200_000
    assert committed["quirk.png"] + committed["offsets.png"] < 200_000
    for name in ("quirk", "offsets"):
        pictures[name](tmp_path / f"{name}.png")
        with (
            Image.open(tmp_path / f"{name}.png") as new,
            Image.open(ROOT / "docs" / "images" / f"{name}.png") as old,
        ):
            assert new.size == old.size


@names
def test_names_in_examples_exist(page: Path) -> None:
    for block in python_blocks(page):
        for node in ast.walk(ast.parse(block)):
            name = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            if re.fullmatch(r"dyhead_cuda(?:\.\w+)+", name):
                pkgutil.resolve_name(name)


def table_rows(page: Path, first_column: str) -> list[dict[str, str]]:
    """The rows of all tables whose first column has this title, by the titles of their columns."""
    rows: list[dict[str, str]] = []
    header: list[str] = []
    for line in page.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line[:1] == "|" else []
        if not cells:
            header = []
        elif not header:
            header = cells
        elif header[0] == first_column and not set(line) <= set("|-: "):
            rows.append(dict(zip(header, cells, strict=True)))
    return rows


def test_numbers_of_the_readme_are_those_of_the_committed_results() -> None:
    measured = table_rows(ROOT / "docs" / "performance.md", "case")
    shown = table_rows(ROOT / "README.md", "case")
    assert shown
    for row in shown:
        assert any(row.items() <= full.items() for full in measured), (
            f"expected the numbers of docs/performance.md, got {row}"
        )
