"""The machine code of the CUDA library's kernels, read with ``cuobjdump``.

``python -m tests.helpers.machine_code`` prints how many instructions the main loops have for each
product, ``--write`` makes them the budgets that ``tests/test_machine_code.py`` checks.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import dyhead_cuda

LIBRARY = Path(dyhead_cuda.__file__).parent / "lib" / "libdyhead_cuda.so"
# Of a warp's instruction, by its shape; four warps share the 64 rows of a product of a warpgroup.
_FLOP = {
    "HMMA.16816": 2 * 16 * 8 * 16,
    "HMMA.1688": 2 * 16 * 8 * 8,
    "HGMMA.64x256x16": 2 * 16 * 256 * 16,
    "HGMMA.64x144x16": 2 * 16 * 144 * 16,
}


def find_disassembler() -> Path | None:
    """cuobjdump of the CUDA toolkit, or the one that Triton, and so torch, brings along."""
    folders = []
    if nvcc := shutil.which("nvcc"):
        folders.append(Path(nvcc).resolve().parent)
    if (triton := importlib.util.find_spec("triton")) and triton.origin:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, folders)])
    found = shutil.which("cuobjdump", path=path)
    return Path(found) if found else None


def _cuobjdump(*arguments: str) -> str:
    tool = find_disassembler()
    assert tool is not None
    # cuobjdump looks for nvdisasm on PATH.
    path = os.pathsep.join([str(tool.parent), os.environ.get("PATH", "")])
    run = subprocess.run(
        [str(tool), *arguments, str(LIBRARY)],
        env={**os.environ, "PATH": path},
        text=True,
        capture_output=True,
        check=False,
    )
    return run.stdout


@cache
def machine_code(arch: str) -> dict[str, str]:
    """The instructions of each kernel, by its mangled name; none for an architecture left out."""
    functions = _cuobjdump("-sass", "-arch", f"sm_{arch}").split("Function : ")[1:]
    return {name: code for name, _, code in (f.partition("\n") for f in functions)}


@cache
def registers(arch: str) -> dict[str, int]:
    """The registers of a thread of each kernel, by its mangled name."""
    text = _cuobjdump("-res-usage", "-arch", f"sm_{arch}")
    return {name: int(n) for name, n in re.findall(r"Function (\S+):\s+REG:(\d+)", text)}


def short_names(mangled: Sequence[str]) -> dict[str, str]:
    """Names without namespaces and arguments, such as ``deform_fwd_kernel<float, 128, 32, true>``.

    Args:
        mangled: the names of kernels.
    """
    run = subprocess.run(
        ["c++filt"], input="\n".join(mangled), text=True, capture_output=True, check=True
    )
    found = (re.search(r"(\w+)(<.*>)?\(", line) for line in run.stdout.splitlines())
    names = (match[1] + (match[2] or "") if match else "" for match in found)
    plain = (re.sub(r"\w+::|\((?:int|bool)\)", "", name) for name in names)
    return dict(zip(mangled, plain, strict=True))


@cache
def _lines(code: str) -> tuple[tuple[int, str], ...]:
    """Each instruction with its address."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", code)
    return tuple((int(address, 16), text) for address, text in found)


@dataclass(frozen=True)
class MainLoop:
    """The innermost loop that multiplies on tensor cores.

    Attributes:
        instructions: of one turn of a warp.
        products: how many of them are products on tensor cores.
        flop: of these products.
        shared_loads: how many load fragments from shared memory (``ldmatrix``).
        wgmma: whether the products are those of warpgroups.
        drained: how many instructions wait until no product of a warpgroup is under way.
        fences: how many order the memory accesses of a thread for others of the device.
    """

    instructions: int
    products: int
    flop: int
    shared_loads: int
    wgmma: bool = False
    drained: int = 0
    fences: int = 0

    @property
    def per_product(self) -> float:
        return self.instructions / self.products


def main_loop(code: str) -> MainLoop | None:
    """The loop with the fewest instructions that has products, or None where none has.

    Args:
        code: of a kernel.
    """
    loops = []
    for address, text in _lines(code):
        target = re.search(r"\bBRA\b[^0]*0x([0-9a-f]+)", text)
        if target is None or int(target[1], 16) > address:
            continue
        body = [line for at, line in _lines(code) if int(target[1], 16) <= at <= address]
        shapes = [found[0] for line in body if (found := re.search(r"HG?MMA\.[\dx]+", line))]
        if shapes:
            loads = sum("LDSM" in line for line in body)
            flop = sum(_FLOP[shape] for shape in shapes)
            wgmma = any(shape.startswith("HGMMA") for shape in shapes)
            drained = sum("DEPBAR.LE gsb0, 0x0" in line for line in body)
            fences = sum("MEMBAR" in line for line in body)
            loops.append(MainLoop(len(body), len(shapes), flop, loads, wgmma, drained, fences))
    return min(loops, key=lambda loop: loop.instructions, default=None)


def main_loops(arch: str) -> dict[str, float]:
    """Instructions for each product in the main loops, by the kernels' :func:`short_names`."""
    codes = machine_code(arch)
    loops = {name: main_loop(codes[mangled]) for mangled, name in short_names(list(codes)).items()}
    return {name: round(loop.per_product, 2) for name, loop in sorted(loops.items()) if loop}


def main() -> None:
    """Prints or writes the budgets."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.helpers.machine_code", description=__doc__
    )
    parser.add_argument("--write", action="store_true", help="the numbers become the budgets")
    arguments = parser.parse_args()
    text = json.dumps({arch: main_loops(arch) for arch in ("80", "90a")}, indent=1) + "\n"
    if arguments.write:
        (Path(__file__).parents[1] / "test_machine_code.json").write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
