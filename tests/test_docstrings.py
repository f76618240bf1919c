"""Docstrings of the layer's public names: complete, with examples that run."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
from dataclasses import is_dataclass
from typing import Any, get_type_hints

import pytest
from torch import nn

import dyhead_cuda
from dyhead_cuda import functional, modules, reference
from dyhead_cuda.inspect import counters, figure, record
from tests.helpers.paths import ROOT

TYPES = (
    *("Activation", "Attention", "HighOffset", "Init", "ResizeMode", "Targets", "Upsample"),
    "WithoutTask",
)
ELSEWHERE = ("accelerate", "LeftOut")  # tests/compat; a placeholder, which nobody makes
RESULTS = (record.BlockRun, record.LevelRecord, record.Samples)  # which functions return
CHECKED = re.compile(r"\bchecks\.\w|raise \w")
FORMULAS = (functional, reference)  # whose functions compute what somebody has published


def names_of(module: Any) -> list[str]:
    """The public names of a module that are functions or classes."""
    names = getattr(module, "__all__", None)
    if names is None:
        names = [
            name
            for name, value in vars(module).items()
            if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
        ]
    return [
        name
        for name in names
        if callable(getattr(module, name)) and name not in (*TYPES, *ELSEWHERE)
    ]


PUBLIC = [
    (module.__name__, name)
    for module in (dyhead_cuda, functional, modules, reference, record, figure, counters)
    for name in names_of(module)
]
each_name = pytest.mark.parametrize(("module", "name"), PUBLIC, ids=lambda part: part)


def public(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def text_of(value: Any) -> str:
    return (inspect.getdoc(value) or "") + "\n"


def section(text: str, title: str) -> str:
    found = re.search(rf"^{title}:\n((?: +.*\n|\n)*)", text, re.MULTILINE)
    return found[1] if found else ""


def documented_arguments(value: Any) -> set[str]:
    heads = re.findall(r"^ {4}(\w[\w, ]*):", section(text_of(value), "Args"), re.MULTILINE)
    return {word.strip() for head in heads for word in head.split(",")}


def arguments(value: Any) -> set[str]:
    return set(inspect.signature(value).parameters) - {"self"}


def returns_something(function: Any) -> bool:
    hints = get_type_hints(function, vars(importlib.import_module(function.__module__)))
    return hints.get("return") is not type(None)


def test_the_public_names_are_found() -> None:
    assert len(PUBLIC) > 50
    assert {("dyhead_cuda", "DyHead"), ("dyhead_cuda.functional", "pyramid_blocks")} <= set(PUBLIC)


@each_name
def test_arguments_and_results_are_documented(module: str, name: str) -> None:
    value = public(module, name)
    assert arguments(value) == documented_arguments(value)
    if not inspect.isclass(value) and returns_something(value):
        assert section(text_of(value), "Returns")


@each_name
def test_tensors_have_shapes(module: str, name: str) -> None:
    value = public(module, name)
    hints = inspect.signature(value).parameters
    entries = re.split(r"^ {4}(?=\w)", section(text_of(value), "Args"), flags=re.MULTILINE)
    for entry in entries:
        argument = hints.get(entry.partition(":")[0])
        if argument is not None and argument.annotation in ("Tensor", "Tensor | None"):
            said = "[" in entry or "of any shape" in entry or "the same" in entry
            assert said, f"expected a shape in: {entry}"


@each_name
def test_formulas_have_a_source(module: str, name: str) -> None:
    if importlib.import_module(module) in FORMULAS and inspect.isfunction(public(module, name)):
        plain = ("median_level",)
        assert name in plain or re.search(r"^Source: \w", text_of(public(module, name)), re.M)


@each_name
def test_what_raises_says_so(module: str, name: str) -> None:
    """A function that calls a check says in its docstring that it raises."""
    value = public(module, name)
    found = [value.__init__, getattr(value, "forward", None)] if inspect.isclass(value) else [value]
    for function in filter(inspect.isfunction, found):
        if is_dataclass(value) or not CHECKED.search(inspect.getsource(function)):
            continue
        where = value if function.__name__ == "__init__" else function
        assert section(text_of(where), "Raises"), function.__qualname__


MODULES = [
    value
    for value in {public(*each) for each in PUBLIC}
    if inspect.isclass(value) and issubclass(value, nn.Module) and "forward" in vars(value)
]


@pytest.mark.parametrize("kind", sorted(MODULES, key=str))
def test_forwards_are_documented(kind: Any) -> None:
    assert documented_arguments(kind.forward) == arguments(kind.forward)
    assert section(text_of(kind.forward), "Returns")
    assert section(text_of(kind.forward), "Raises")


@each_name
def test_examples_run(module: str, name: str) -> None:
    value = public(module, name)
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = finder.find(value, name, module=importlib.import_module(value.__module__))
    examples = [test for test in found if test.examples]
    assert examples or value in RESULTS, f"expected an example in the docstring of {module}.{name}"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    said: list[str] = []
    for test in examples:
        runner.run(test, out=said.append)
    assert not runner.failures, "".join(said)


def test_no_example_is_left_out() -> None:
    """Every example of the layer's files belongs to a public name, so that it is run above."""
    files = [ROOT / "dyhead_cuda" / f"{name}.py" for name in ("pyramid", "numerics", "backends")]
    for folder in ("modules", "reference", "inspect"):
        files += (ROOT / "dyhead_cuda" / folder).glob("*.py")
    run = {text_of(public(*each)) for each in PUBLIC}
    for path in files:
        parts = path.relative_to(ROOT).with_suffix("").parts
        module = importlib.import_module(".".join(parts).removesuffix(".__init__"))
        for name, value in vars(module).items():
            own = getattr(value, "__module__", "") == module.__name__
            text = text_of(value) if own else ""
            assert ">>>" not in text or text in run, f"{path.name}: {name}"


def test_the_example_of_the_record_runs() -> None:
    assert doctest.testmod(record, optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0
