"""The public docstrings of compat: complete, and their examples run."""

from __future__ import annotations

import doctest
import inspect

import pytest

from dyhead_cuda import compat
from dyhead_cuda.detection import atss_from_mmdet


@pytest.mark.parametrize("name", compat.__all__)
def test_docstring_is_complete_and_its_example_runs(name: str) -> None:
    function = getattr(compat, name)
    text = inspect.getdoc(function) or ""
    for section in ("Args:", "Returns:", "Raises:", "Example:"):
        assert section in text, section
    if name.startswith(("from_", "accelerate")):
        assert "Source:" in text
    described = text.partition("Args:")[2].partition("Returns:")[0]
    for argument in inspect.signature(function).parameters:
        assert argument in described, argument
    (test,) = doctest.DocTestFinder(recurse=False).find(function, name, globs={})
    assert test.examples
    results = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test)
    assert results.failed == 0


def test_the_detector_of_mmdet_says_how_its_labels_count() -> None:
    assert "labels are 1-based" in (inspect.getdoc(atss_from_mmdet) or "")
