"""The facts that ``python -m dyhead_cuda info`` tells."""

from __future__ import annotations

import json

import pytest
import torch

from dyhead_cuda import info, library
from dyhead_cuda.version import __version__


def test_the_facts_are_those_of_this_machine() -> None:
    facts = json.loads(json.dumps(info.gather()))
    assert facts["versions"]["dyhead_cuda"] == __version__
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["cpu"]["threads"] == torch.get_num_threads()
    assert set(facts["libraries"]) == set(library.NAMES)
    assert len(facts["gpus"]) == torch.cuda.device_count()


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((7, 5), None),
        ((8, 0), "sm_80"),
        ((8, 6), "sm_86"),
        ((8, 7), "sm_86"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90a"),
        ((10, 0), "sm_100"),
        ((10, 3), "sm_100"),
        ((11, 0), None),
        ((12, 0), "sm_120"),
        ((12, 1), "sm_120"),
        ((13, 0), "PTX of compute_120"),
    ],
)
def test_covering_code(capability: tuple[int, int], expected: str | None) -> None:
    assert info.covering_code(["80", "86", "89", "90a", "100", "120"], capability) == expected


def test_code_for_a_specific_target_covers_nothing_else() -> None:
    assert info.covering_code(["80", "90a"], (10, 0)) is None
    assert info.covering_code(["90", "90a"], (9, 0)) == "sm_90a"
    assert info.covering_code([], (8, 0)) is None
