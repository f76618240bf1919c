"""The NEON kernels as the cross compiler makes them: the matrix product stays in registers."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch

from tests.aarch64.machine import COMPILER, TOOLCHAIN
from tests.helpers.builds import run
from tests.helpers.paths import ROOT

DISASSEMBLER = COMPILER.replace("g++", "objdump")
OBJECT = "CMakeFiles/dyhead_cpu.dir/csrc/cpu/vector_kernels_neon.cpp.o"
TILE = 6 * 4  # vectors of sums

pytestmark = pytest.mark.skipif(
    None in map(shutil.which, (COMPILER, DISASSEMBLER, "cmake", "ninja")),
    reason=f"needs cmake, ninja and {COMPILER} (apt-get install g++-aarch64-linux-gnu)",
)


def loops(text: str) -> list[list[str]]:
    """The instructions of each innermost loop of a function's disassembly."""
    code = [(int(a, 16), t) for a, t in re.findall(r"^ *([0-9a-f]+):\t(.+)$", text, re.MULTILINE)]
    at = {address: index for index, (address, _) in enumerate(code)}
    found: list[tuple[int, int]] = []
    for index, (_, instruction) in enumerate(code):
        jump = re.match(r"(?:b\.\w+|cbn?z\s+\w+,)\s+([0-9a-f]+)", instruction)
        begin = at.get(int(jump[1], 16), index + 1) if jump else index + 1
        if begin <= index and not (found and found[-1][0] >= begin):
            found.append((begin, index + 1))
    return [[instruction for _, instruction in code[a:b]] for a, b in found]


@pytest.fixture(scope="module")
def products(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[str]]]:
    """The loops of the matrix products of float ("f") and double ("d") that multiply."""
    directory = tmp_path_factory.mktemp("aarch64")
    arguments = [
        f"-DCMAKE_TOOLCHAIN_FILE={TOOLCHAIN}",
        f"-DCMAKE_CXX_COMPILER={COMPILER}",
        f"-DDYHEAD_TORCH_DIR={Path(torch.__file__).parent}",
        "-DDYHEAD_WERROR=on",
    ]
    for command in (
        ["cmake", "-GNinja", "-S", ROOT, "-B", directory, *arguments],
        ["cmake", "--build", directory, "--target", OBJECT],
    ):
        result = run(command)
        assert result.returncode == 0, result.stdout + result.stderr
    text = run([DISASSEMBLER, "-d", "--no-show-raw-insn", directory / OBJECT]).stdout
    functions = re.findall(
        r"^[0-9a-f]+ <\S*4gemmI([fd])\S*>:\n(.*?)\n\n", text, re.MULTILINE | re.DOTALL
    )
    return {
        name: [loop for loop in loops(body) if any(i.startswith("fmla") for i in loop)]
        for name, body in functions
    }


@pytest.mark.parametrize("name", ["f", "d"])
def test_the_matrix_product_keeps_its_tile_in_registers(
    products: dict[str, list[list[str]]], name: str
) -> None:
    assert len(products[name]) == 2  # k_stride is 1, or not
    for loop in products[name]:
        assert sum(i.startswith("fmla") for i in loop) == TILE
        # No sum is spilled, none is multiplied and added apart, and little else is done.
        assert not [i for i in loop if "sp" in i or re.match(r"f(mul|add)\b", i)]
        assert len(loop) <= 1.6 * TILE
