"""Which code of a build runs on which GPU, and what to build for one."""

from __future__ import annotations

import pytest

from dyhead_cuda import library
from dyhead_cuda.archs import covering_code, target_of

DEFAULT = ["80", "86", "89", "90a", "100", "120"]


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((7, 5), None),
        ((8, 0), "sm_80"),
        ((8, 6), "sm_86"),
        ((8, 7), None),  # embedded
        ((8, 8), "sm_86"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90a"),
        ((10, 0), "sm_100"),
        ((10, 1), None),  # embedded
        ((10, 3), "sm_100"),
        ((11, 0), None),
        ((12, 0), "sm_120"),
        ((12, 1), "sm_120"),
        ((13, 0), "PTX of compute_120"),
    ],
)
def test_the_default_build(capability: tuple[int, int], expected: str | None) -> None:
    assert covering_code(DEFAULT, capability) == expected


@pytest.mark.parametrize(
    ("archs", "capability", "expected"),
    [
        (["80", "90a"], (10, 0), None),
        (["80", "90a"], (9, 0), "sm_90a"),
        (["90", "90a"], (9, 0), "sm_90a"),
        (["90a", "90"], (9, 0), "sm_90a"),
        (["100a"], (10, 3), None),
        (["100f"], (10, 3), "sm_100f"),
        (["100f"], (11, 0), None),
        (["100", "110f"], (12, 0), None),
        (["86"], (8, 0), None),
        (["80"], (9, 0), "PTX of compute_80"),
        (["80", "87"], (8, 7), "sm_87"),
        (["87"], (8, 9), "PTX of compute_87"),
        (["80", "86"], (8, 7), "PTX of compute_86"),
        ([], (8, 0), None),
    ],
)
def test_other_builds(archs: list[str], capability: tuple[int, int], expected: str | None) -> None:
    assert covering_code(archs, capability) == expected


def test_an_entry_that_is_none_raises() -> None:
    with pytest.raises(ValueError, match='such as "80", "90a" or "100f", got "sm_80"'):
        covering_code(["sm_80"], (8, 0))


@pytest.mark.parametrize(
    ("capability", "target"),
    [((8, 0), "80"), ((9, 0), "90a"), ((10, 0), "100"), ((11, 0), "110"), ((12, 1), "121")],
)
def test_what_is_built_for_a_gpu_runs_on_it(capability: tuple[int, int], target: str) -> None:
    assert target_of(capability) == target
    assert covering_code([target], capability) == f"sm_{target}"


def test_the_reason_says_how_to_build(monkeypatch: pytest.MonkeyPatch) -> None:
    record = {"cuda": {"built": True, "archs": ["80", "90a"]}}
    monkeypatch.setattr(library, "read_build_record", lambda: record)
    assert library.lacks_code_for((8, 6)) == ""
    reason = library.lacks_code_for((11, 0))
    assert "built for 80, 90a, and none of it runs on a GPU of compute capability 11.0" in reason
    assert "set DYHEAD_CUDA_ARCHS=110 and run make build" in reason
    # There is nothing to build for these.
    reason = library.lacks_code_for((7, 5))
    assert reason == "the kernels need compute capability 8.0 or newer, this GPU has 7.5"
    record["cuda"] = {"built": True}
    assert library.lacks_code_for((7, 5)) == ""
