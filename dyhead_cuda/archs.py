"""Compute capabilities: which code of a build runs on a GPU, and what to build for one.

``setup.py`` runs this file alone, so it imports nothing of the package.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

MINIMUM = (8, 0)  # asynchronous copies and tensor cores with bfloat16

# Embedded GPUs, which run no machine code of others of their major version, nor others theirs.
_EMBEDDED = ((8, 7), (10, 1))


def target_of(capability: tuple[int, int]) -> str:
    """The entry of ``DYHEAD_CUDA_ARCHS`` for a GPU; on Hopper with its specific instructions.

    Args:
        capability: compute capability, major and minor.

    Example:
        >>> target_of((8, 6)), target_of((9, 0))
        ('86', '90a')
    """
    major, minor = capability
    return f"{major}{minor}{'a' if capability == (9, 0) else ''}"


def covering_code(archs: Sequence[str], capability: tuple[int, int]) -> str | None:
    """Which code of a build a GPU runs.

    Machine code for X.Y runs on every X.Z with Z >= Y, but on an embedded GPU only if it is for
    that one. Machine code for an "a" target runs on X.Y alone, for an "f" target as the plain one.
    The last of ``archs`` is also there as PTX, which the driver compiles for any newer GPU: that of
    an "a" target for none, that of an "f" target for those of its major version.

    Args:
        archs: the entries of ``DYHEAD_CUDA_ARCHS`` of the build, in order.
        capability: compute capability of the GPU, major and minor.

    Returns:
        "sm_80", "PTX of compute_120" or the like; None if there is nothing that it runs.

    Source: CUDA C++ Programming Guide, binary and PTX compatibility.

    Example:
        >>> covering_code(["80", "90a"], (8, 6)), covering_code(["80", "90a"], (7, 5))
        ('sm_80', None)
    """
    best: tuple[int, str] | None = None
    for arch in archs:
        code, suffix = _parse(arch)
        fits = code == capability
        if suffix != "a" and capability not in _EMBEDDED and code not in _EMBEDDED:
            fits = fits or (code[0] == capability[0] and code[1] < capability[1])
        if fits:
            # The later of two that fit is closer; a specific target is preferred to the plain one.
            best = max(best or (0, ""), (20 * code[0] + 2 * code[1] + bool(suffix), f"sm_{arch}"))
    if best is not None:
        return best[1]
    if archs:
        code, suffix = _parse(archs[-1])
        same_family = suffix == "f" and code[0] == capability[0]
        if code < capability and (not suffix or same_family):
            return f"PTX of compute_{archs[-1]}"
    return None


def _parse(arch: str) -> tuple[tuple[int, int], str]:
    """Compute capability and suffix of an entry of ``DYHEAD_CUDA_ARCHS``."""
    match = re.fullmatch(r"(\d+)(\d)([af]?)", arch)
    if match is None:
        raise ValueError(f'expected an architecture such as "80", "90a" or "100f", got "{arch}"')
    return (int(match[1]), int(match[2])), match[3]
