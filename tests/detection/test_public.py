"""The public names of detection: all importable, documented, with examples that run."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
from typing import Any

import pytest

from dyhead_cuda import detection
from dyhead_cuda.detection.models import checkpoints

PACKAGES = ("dyhead_cuda.detection", "dyhead_cuda.detection.models")
RECIPES = ("MICROSOFT_R50", "MICROSOFT_SWINT", "MMDET_R50", "MMDET_R50_CAFFE", "MMDET_SWINL")
# Functions and classes, by the module that defines them: only once if two packages have them.
NAMES = sorted(
    {
        (getattr(package, name).__module__, name)
        for package in map(importlib.import_module, PACKAGES)
        for name in package.__all__
        if name not in RECIPES
    }
)
# A protocol is never called.
CALLED = [(module, name) for module, name in NAMES if name != "DetectionDataset"]


def public(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize(
    "package", [*PACKAGES, "dyhead_cuda.detection.data", "dyhead_cuda.detection.training"]
)
def test_all_names_can_be_imported(package: str) -> None:
    module = importlib.import_module(package)
    assert len(module.__all__) == len(set(module.__all__))
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        module.no_such_name  # noqa: B018


def test_recipes_are_public() -> None:
    for name in RECIPES:
        assert name in detection.__all__
        assert isinstance(getattr(detection, name), detection.Recipe)
    assert detection.MMDET_R50 is checkpoints.MMDET_R50


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_examples_run(module: str, name: str) -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = finder.find(
        public(module, name), name, module=importlib.import_module(module), globs={}
    )
    examples = [test for test in found if test.examples]
    assert examples, f"expected an example in the docstring of {module}.{name}"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    said: list[str] = []
    for test in examples:
        runner.run(test, out=said.append)
    assert not runner.failures, "".join(said)


@pytest.mark.parametrize(("module", "name"), CALLED)
def test_every_argument_is_documented(module: str, name: str) -> None:
    object_ = public(module, name)
    text = inspect.getdoc(object_) or ""
    section = re.search(r"^Args:\n((?:[ ]+.*\n|\n)*)", text + "\n", re.MULTILINE)
    assert section, f"expected a section Args in {module}.{name}"
    heads = re.findall(r"^ {4}([\w, ]+):", section[1], re.MULTILINE)
    documented = {word.strip() for head in heads for word in head.split(",")}
    assert set(inspect.signature(object_).parameters) <= documented
    assert inspect.isclass(object_) or "\nReturns:\n" in text


def test_forward_says_what_it_takes_and_returns() -> None:
    for kind in (
        detection.ATSS,
        detection.FCOS,
        detection.FasterRCNN,
        detection.Pyramid,
        detection.RetinaNet,
    ):
        text = inspect.getdoc(kind.forward) or ""
        assert "Args:\n" in text
        assert "Returns:\n" in text
