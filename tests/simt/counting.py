"""What a device would charge for emulated kernels, by place in their sources.

``build.counted()`` builds kernels that count; :func:`count` runs code with them. What is counted,
and how, is in ``counters.h``.

Example: where the forward kernel has bank conflicts, and what it loads.

    counts = counting.count("simt.deform_conv.forward(...)")
    print(counting.table(counts.select(kernel="deform_fwd_kernel")))
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from . import build

# Between what the code itself writes and the counts.
_MARK = "---- counts ----"
# Frames of these say how an access is made, not where.
_MEANS = ("simt.h", "primitives.cuh", "hopper.cuh", "launch.cuh", "bit_cast", "dtypes.h")


@dataclass(frozen=True)
class Record:
    """The accesses of one kind that one place in a kernel makes.

    Attributes:
        kernel: its name with template arguments.
        function: in which the access stands, without namespaces and arguments.
        calls: that function and those that it is inlined into, innermost first.
        file: the source file's name.
        line: its number in the file as it is now. Not a name: it changes with the file.
        text: the source line, without the spaces around it.
        access: ``"global load"``, ``"global store"``, ``"atomic"``, ``"async read"``, ``"async
            write"``, ``"shared load"``, ``"shared store"``, ``"ldmatrix"``, ``"shuffle"``,
            ``"mma"``, ``"operand read"`` or ``"barrier"``.
        bytes: of a lane's access.
        instructions: of warps; of blocks for barriers.
        lanes: that took part, summed over instructions.
        sectors: of 32 bytes in global memory, the union over the lanes of each instruction.
        lines: of 128 bytes, likewise.
        l2_sectors: of the sectors, those that the L1 cache did not have.
        wavefronts: clocks of the path to shared memory.
        ideal_wavefronts: what they would be without bank conflicts.
        flop: two per multiplication and addition.
    """

    kernel: str
    function: str
    calls: tuple[str, ...]
    file: str
    line: int
    text: str
    access: str
    bytes: int
    instructions: int
    lanes: int
    sectors: int
    lines: int
    l2_sectors: int
    wavefronts: int
    ideal_wavefronts: int
    flop: int


NUMBERS = tuple(f.name for f in fields(Record) if f.name not in ("line", "bytes"))[6:]


@dataclass(frozen=True)
class Counts:
    """All that some launches did.

    Attributes:
        records: by place.
        kernels: by kernel name: ``launches``, ``blocks``, ``sampled_blocks`` (those that ran),
            ``threads`` and ``shared_bytes`` of a block, and ``arrays``: by name of the array its
            ``bytes`` and the sectors of ``loads``, ``l2_loads`` (those that the L1 cache did not
            have), ``stores``, ``atomics``, ``distinct_read`` and ``distinct_written`` (once per
            launch).
    """

    records: tuple[Record, ...]
    kernels: dict[str, dict[str, Any]]

    def select(self, kernel: str = "", access: str = "", text: str = "") -> list[Record]:
        """The records whose kernel, access and calls or source line contain these texts."""
        return [
            r
            for r in self.records
            if kernel in r.kernel
            and access in r.access
            and (text in r.text or any(text in call for call in r.calls))
        ]

    def total(self, number: str, kernel: str = "", access: str = "", text: str = "") -> int:
        """The sum of a number, as ``"sectors"``, over the records that :meth:`select` finds."""
        return sum(getattr(r, number) for r in self.select(kernel, access, text))


# Names that counted code sees beside simt and np.
_PROGRAM = """
steps = {{}}

def step(name):
    steps[name] = [simt.counters.read(), simt.counters.kernels()]
    simt.counters.reset(**{options})

simt.counters.reset(**{options})
{code}
step("")
import json
print({mark!r})
print(json.dumps(steps))
"""


def count(code: str, kernels: build.Kernels | None = None, **options: Any) -> Counts:
    """Runs Python code with counting kernels, and counts what it does after its last ``step``.

    Args:
        code: ``simt`` is the module of the kernels, ``np`` is numpy.
        kernels: of :func:`build.counted` or :func:`build.mutate`; by default all.
        options: of :func:`count_steps`.

    Raises:
        RuntimeError: the code fails.
    """
    return count_steps(code, kernels, **options)[""]


def count_steps(
    code: str,
    kernels: build.Kernels | None = None,
    *,
    vector_atomics: bool = True,
    l1_bytes: int = 65536,
    sampled_blocks: int = 0,
) -> dict[str, Counts]:
    """:func:`count` for code that calls ``step(name)``: what it did before each, by name.

    Args:
        code: as of :func:`count`.
        kernels: likewise.
        vector_atomics: whether four neighbouring sums are one access, as on sm_90, or four.
        l1_bytes: of the L1 cache, for each block by itself.
        sampled_blocks: how many blocks of a launch run and count, spread over its grid; 0 for all.
            What the others would write keeps the bits that it had.
    """
    options = {
        "vector_atomics": vector_atomics,
        "l1_bytes": l1_bytes,
        "sampled_blocks": sampled_blocks,
    }
    program = _PROGRAM.format(code=code, mark=_MARK, options=options)
    result = (kernels or build.counted()).run_python(program)
    if result.returncode != 0:
        raise RuntimeError(f"the counted code failed:\n{result.stdout}")
    steps: dict[str, Any] = json.loads(result.stdout.rpartition(_MARK)[2])
    frames = _all_frames(steps)
    return {
        name: Counts(
            tuple(merged(_record(record, frames) for record in records)),
            {frames[tuple(k.pop("kernel"))][0][0]: k for k in launched},
        )
        for name, (records, launched) in steps.items()
    }


def merged(records: Iterable[Record]) -> list[Record]:
    """Records of one place in the source, which the compiler may have copied, added up."""
    places: dict[tuple[Any, ...], Record] = {}
    for r in records:
        key = (r.kernel, r.calls, r.file, r.text, r.access, r.bytes)
        known = places.get(key)
        if known is not None:
            sums = {name: getattr(known, name) + getattr(r, name) for name in NUMBERS}
            r = Record(**{**r.__dict__, **sums})
        places[key] = r
    return sorted(places.values(), key=lambda r: (r.kernel, r.file, r.line, r.access, r.bytes))


Frame = tuple[str, Path, int]
Place = tuple[str, int]  # a library and an offset in it


def _all_frames(steps: dict[str, Any]) -> dict[Place, list[Frame]]:
    """The frames of each kernel and each place in one, innermost first."""
    offsets: dict[str, set[int]] = {}
    for records, launched in steps.values():
        for record in records:
            library, offset = record["place"]
            offsets.setdefault(library, set()).add(offset - 1)  # inside the call
        for library, offset in (entry["kernel"] for entry in [*records, *launched]):
            offsets.setdefault(library, set()).add(offset)
    return {
        (library, offset): frames
        for library, addresses in offsets.items()
        for offset, frames in _frames(library, sorted(addresses)).items()
    }


def _record(record: dict[str, Any], frames: dict[Place, list[Frame]]) -> Record:
    library, offset = record["place"]
    found = frames[library, offset - 1]
    own = [f for f in found if not any(mean in str(f[1]) for mean in _MEANS)] or found
    function, path, line = own[0]
    return Record(
        kernel=frames[tuple(record["kernel"])][0][0],
        function=function,
        calls=tuple(f[0] for f in own),
        file=path.name,
        line=line,
        text=_source_line(path, line),
        access=record["access"],
        bytes=record["bytes"],
        **{name: record[name] for name in NUMBERS},
    )


def _frames(library: str, offsets: list[int]) -> dict[int, list[Frame]]:
    command = ["addr2line", "-a", "-f", "-i", "-C", "-e", library, *map(hex, offsets)]
    lines = subprocess.run(command, text=True, capture_output=True, check=True).stdout.splitlines()
    frames: dict[int, list[Frame]] = {}
    at: list[Frame] = []
    position = 0
    while position < len(lines):
        if re.fullmatch(r"0x[0-9a-f]+", lines[position]):
            at = frames.setdefault(int(lines[position], 16), [])
            position += 1
            continue
        path, _, number = lines[position + 1].partition(" ")[0].rpartition(":")
        line = int(number) if number.isdigit() else 0
        at.append((_short(lines[position]), Path(path), line))
        position += 2
    return frames


def _short(function: str) -> str:
    """A demangled name without return type, namespaces and arguments."""
    name = re.sub(r"\[(?:abi|with)[^]]*\]| const(?=$|::)|\(anonymous namespace\)::", "", function)
    name = name.replace("{anonymous}::", "")
    # Arguments of functions, from the innermost parentheses on.
    while (shorter := re.sub(r"\([^()]*\)", "", name)) != name:
        name = shorter
    name = re.sub(r"(?:dyhead::(?:cuda|simt_test|simt)?(?:::)?|unnamed>::)", "", name)
    return name.removeprefix("void ").strip()


@cache
def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


def _source_line(path: Path, line: int) -> str:
    lines = _lines(path)
    return lines[line - 1].strip() if 0 < line <= len(lines) else ""


def table(records: Iterable[Record], key: Callable[[Record], str] | None = None) -> str:
    """Counts as text, largest first, for people who look for the place that costs.

    Args:
        records: of :class:`Counts`.
        key: what to add up by; by default kernel, function and source line.
    """
    name = key or (lambda r: f"{r.kernel.partition('<')[0]} {r.function}: {r.text[:60]}")
    rows: dict[tuple[str, str, int], dict[str, int]] = {}
    for r in records:
        row = rows.setdefault((name(r), r.access, r.bytes), dict.fromkeys(NUMBERS, 0))
        for number in NUMBERS:
            row[number] += getattr(r, number)
    shown = ("instructions", "sectors", "l2_sectors", "wavefronts", "ideal_wavefronts")
    text = [f"{'access':<14}{'bytes':>6}" + "".join(f"{n[:12]:>14}" for n in shown) + "  place"]
    order = sorted(rows.items(), key=lambda i: -max(i[1]["sectors"], i[1]["wavefronts"]))
    for (place, access, size), row in order:
        numbers = "".join(f"{row[n]:>14,}" for n in shown)
        text.append(f"{access:<14}{size:>6}{numbers}  {place}")
    return "\n".join(text)
