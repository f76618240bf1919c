"""The tests of each kernel notice the bugs of bugs.py, and no harmless change."""

from __future__ import annotations

import pytest

from tests.helpers.paths import ROOT

from .bugs import GEMM_TILE, SUITES
from .build import mutate

BUGS = [(suite, bug) for suite, of in SUITES.items() for bug in of.bugs]


@pytest.mark.spawns
@pytest.mark.usefixtures("simt")
@pytest.mark.parametrize(("suite", "bug"), BUGS)
def test_planted_bug_is_noticed(suite: str, bug: str) -> None:
    planted = SUITES[suite].bugs[bug]
    SUITES[suite].build(planted).assert_noticed(*SUITES[suite].pytest_arguments(planted))


@pytest.mark.spawns
@pytest.mark.usefixtures("simt")
@pytest.mark.parametrize("suite", SUITES)
def test_harmless_change_passes(suite: str) -> None:
    change = SUITES[suite].harmless
    run = SUITES[suite].build(change).run_pytest(*SUITES[suite].pytest_arguments(change))
    assert run.returncode == 0, run.stdout
    assert "passed" in run.stdout


def test_every_operator_has_bugs() -> None:
    operators = {path.parent.name for path in (ROOT / "csrc" / "cuda").glob("*/*.cu")}
    assert operators <= set(SUITES)


def test_pattern_must_match_once() -> None:
    with pytest.raises(ValueError, match="exactly one occurrence of 'no such text', found 0"):
        mutate(GEMM_TILE, "no such text", "")
    with pytest.raises(ValueError, match="exactly one occurrence of 'ldmatrix', found"):
        mutate(GEMM_TILE, "ldmatrix", "")
