"""What the CUDA library's machine code is made of: wide accesses, tensor cores, nothing spilled."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from dyhead_cuda.library import read_build_record
from tests.helpers.machine_code import (
    LIBRARY,
    find_disassembler,
    machine_code,
    main_loop,
    main_loops,
)

VECTOR_OF_TYPE = {"d": 2, "f": 4, "8bfloat16": 8, "7float16": 8}  # as names are mangled: 16 bytes
# Kernels kernel<T, V> on vectors of V values of T.
VECTOR_KERNELS = (
    "dynamic_relu_fwd",
    "dynamic_relu_bwd",
    "fuse_branches_fwd",
    "fuse_branches_bwd_pixels",
    "fuse_branches_bwd_merge",
)
# In these no value that the launch itself writes may be read through the read-only path, which
# might show an old one: only the wide loads of rows take it.
WRITTEN_IN_THE_LAUNCH = ("dynamic_relu_fwd", "dynamic_relu_bwd")
# What multiplies tiles, by kind of arithmetic as names are mangled.
TILE_KERNELS = ("deform_fwd", "deform_bwd_input", "deform_bwd_weights")
# Of 16 bytes from global to shared memory, past the L1 cache and registers.
WIDE_COPY = "LDGSTS.E.BYPASS.128"
# In these samples are loaded during the products of the step before.
OVERLAPPED_KERNELS = ("deform_fwd", "deform_bwd_weights")
# Instructions of main loops for each product on tensor cores, by architecture and kernel:
# `python -m tests.helpers.machine_code` prints them.
BUDGETS = Path(__file__).with_suffix(".json")
# Another nvcc orders and fuses a few instructions differently.
SLACK = 1.1
TENSOR_INSTRUCTION = {
    "8bfloat16": "HMMA.16816.F32.BF16",
    "7float16": "HMMA.16816.F32",
    "4Tf32": "HMMA.1688.F32.TF32",
}


@cache
def instructions_of(code: str) -> frozenset[str]:
    """All instructions that occur; each line has its address as a comment, then a predicate."""
    return frozenset(re.findall(r"\*/ +(?:@!?\w+ +)?([A-Z]\S*)", code))


def instructions(code: str, name: str) -> set[str]:
    """The variants of an instruction that occur, as LDG.E.128 is one of LDG."""
    return {found for found in instructions_of(code) if re.fullmatch(rf"{name}(\..*)?", found)}


def architectures() -> list[str]:
    """Those that the library was built for, and those whose instructions are tested in detail."""
    built = read_build_record().get("cuda", {}).get("archs", [])
    return list(dict.fromkeys(["80", "90a", *built]))


@pytest.fixture(params=["80", "90a"])
def kernels(request: pytest.FixtureRequest) -> dict[str, str]:
    if not LIBRARY.exists():
        pytest.skip("the CUDA library is not built")
    if find_disassembler() is None:
        pytest.skip("no cuobjdump on PATH, beside nvcc or in triton")
    found = machine_code(request.param)
    if not found:
        pytest.skip(f"the CUDA library is built without sm_{request.param}")
    return found


def of_template(
    kernels: dict[str, str], names: tuple[str, ...], arguments: str
) -> Iterator[tuple[re.Match[str], str]]:
    """Instances of kernel templates `name`_kernel whose arguments match a pattern."""
    pattern = re.compile(rf"\d({'|'.join(names)})_kernelI(?:NS0?_)?{arguments}EEv")
    for name, code in kernels.items():
        if match := pattern.search(name):
            yield match, code


@pytest.mark.parametrize("kernels", architectures(), indirect=True)
def test_no_local_memory(kernels: dict[str, str]) -> None:
    for name, code in kernels.items():
        assert instructions(code, "EXIT") | instructions(code, "BPT"), name  # or a trap
        spilled = instructions(code, "LDL") | instructions(code, "STL")
        assert not spilled, f"{name}: accesses of local memory {spilled}"


def test_copied_levels_move_16_bytes(kernels: dict[str, str]) -> None:
    codes = [code for _, code in of_template(kernels, ("pack_levels",), "[tjm]Lb0E")]
    assert len(codes) == 3  # elements of 2, 4 and 8 bytes
    for code in codes:
        for access in ("LDG", "STG"):
            assert any(".128" in variant for variant in instructions(code, access))


def test_vector_kernels_access_16_bytes(kernels: dict[str, str]) -> None:
    seen = set()
    for match, code in of_template(kernels, VECTOR_KERNELS, r"(\w+?)E?Li(\d+)E"):
        kernel, storage, vector = match[1], match[2], int(match[3])
        seen.add((kernel, storage, vector))
        if vector == 1:
            continue
        loads, stores = instructions(code, "LDG"), instructions(code, "STG")
        assert any(".128" in load for load in loads), f"{match[0]}: {loads}"
        assert any(".128" in store for store in stores), f"{match[0]}: {stores}"
        if kernel in WRITTEN_IN_THE_LAUNCH:
            narrow = {load for load in loads if "CONSTANT" in load and ".128" not in load}
            assert not narrow, f"{match[0]}: {narrow}"
    assert seen == {
        (kernel, storage, vector)
        for kernel in VECTOR_KERNELS
        for storage, widest in VECTOR_OF_TYPE.items()
        for vector in (1, widest)
    }


def test_tile_kernels(kernels: dict[str, str]) -> None:
    """16-byte loads in the sampler, asynchronous copies of weights, products on tensor cores."""
    seen = set()
    arguments = r"(\w+?)E?(?:Li\d+E)*Lb([01])E(?:Lb([01])E)?"
    for match, code in of_template(kernels, TILE_KERNELS, arguments):
        kernel, operand, vectors = match[1], match[2], match[3] == "1"
        copies = match[4] == "1"  # samples of plain convolutions
        seen.add((kernel, operand, vectors))
        assert instructions(code, "LDGSTS"), match[0]
        if copies:
            assert any(i.startswith(WIDE_COPY) for i in instructions(code, "LDGSTS")), match[0]
        elif vectors:
            loads = instructions(code, "LDG")
            # A lane of the input kernel owns two pieces of 8 bytes of halves.
            halves = kernel == "deform_bwd_input" and operand in ("8bfloat16", "7float16")
            width = ".64" if halves else ".128"
            assert any(width in load and "CONSTANT" in load for load in loads), match[0]
        if operand in TENSOR_INSTRUCTION:
            found = instructions(code, "HMMA")
            assert TENSOR_INSTRUCTION[operand] in found, f"{match[0]}: {found}"
            # Only 16-bit values can be transposed as they are loaded.
            if not (kernel == "deform_bwd_weights" and operand == "4Tf32"):
                assert instructions(code, "LDSM"), match[0]
        else:
            assert instructions(code, "DFMA" if operand == "d" else "FFMA"), match[0]
    operands = (*TENSOR_INSTRUCTION, "f", "d")
    assert seen == {(k, o, v) for k in TILE_KERNELS for o in operands for v in (False, True)}


def test_plain_kernel(kernels: dict[str, str]) -> None:
    """Copies of 16 bytes past the L1 cache, products on tensor cores, nothing blended."""
    seen = set()
    for match, code in of_template(kernels, ("plain_fwd",), r"(\w+?)E?"):
        operand = match[2]
        seen.add(operand)
        copies = instructions(code, "LDGSTS")
        assert any(copy.startswith(WIDE_COPY) for copy in copies), f"{operand}: {copies}"
        assert TENSOR_INSTRUCTION[operand] in instructions(code, "HMMA"), operand
        assert instructions(code, "LDSM"), operand
        wide = {load for load in instructions(code, "LDG") if ".128" in load}
        assert not wide, f"{operand}: {wide}"
    assert seen == set(TENSOR_INSTRUCTION)


def wgmma_kernels(kernels: dict[str, str], name: str) -> Iterator[tuple[str, str]]:
    """The code for sm_90a of the kernels `name`; other architectures have only a trap."""
    seen = set()
    for match, code in of_template(kernels, (name,), r"(\w+?)E?"):
        seen.add(match[2])
        if kernels is machine_code("90a"):
            yield match[0], code
        else:
            assert not instructions(code, "HGMMA"), match[0]
            assert instructions(code, "BPT"), match[0]
    assert seen == {"8bfloat16", "7float16"}


def test_wgmma_kernel(kernels: dict[str, str]) -> None:
    """Nothing serialises the products, and no thread fences the device in the main loop."""
    for name, code in wgmma_kernels(kernels, "deform_fwd_wgmma"):
        products = instructions(code, "HGMMA")
        assert all("64x256x16.F32" in product for product in products), products
        assert any("MULTICAST" in copy for copy in instructions(code, "UBLKCP"))
        assert instructions(code, "USETMAXREG")
        loop = main_loop(code)
        assert loop is not None
        assert loop.wgmma
        assert (loop.products, loop.drained, loop.fences) == (4, 0, 0), loop
        assert loads_under_way(code, "HGMMA") >= 8, name


def test_wgmma_input_kernel(kernels: dict[str, str]) -> None:
    """A chunk's products follow each other; a thread fences its block once, for all of them."""
    for _, code in wgmma_kernels(kernels, "deform_bwd_input_wgmma"):
        products = instructions(code, "HGMMA")
        assert all("64x144x16.F32" in product for product in products), products
        fences = instructions(code, "MEMBAR")
        assert fences == {"MEMBAR.ALL.CTA"}, fences
        loop = main_loop(code)
        assert loop is not None
        assert (loop.products, loop.drained, loop.fences) == (8, 0, 1), loop
        assert all("F32x4" in name for name in instructions(code, "RED[A-Z]*") if "F32" in name)


def loads_under_way(code: str, product: str = "HMMA") -> int:
    """How many 16-byte loads are first used after the start of a product on tensor cores."""
    lines = re.findall(r"/\*[0-9a-f]{4,}\*/\s+([^;]*);", code)
    count = 0
    for i, line in enumerate(lines):
        load = re.search(r"LDG\.E\.128\.CONSTANT R(\d+),", line)
        if load is None:
            continue
        loaded = {f"R{int(load[1]) + k}" for k in range(4)}
        for later in lines[i + 1 :]:
            if loaded & set(re.findall(r"\bR\d+\b", later)):
                break
            if product in later:
                count += 1
                break
    return count


def test_products_do_not_wait_for_samples(kernels: dict[str, str]) -> None:
    pattern = r"(8bfloat16|7float16|4Tf32)E(?:Li\d+E)+Lb1E(?:Lb0E)?"
    for match, code in of_template(kernels, OVERLAPPED_KERNELS, pattern):
        # Four corners of what a thread blends in a step, four units at most.
        assert loads_under_way(code) >= 8, match[0]


def test_scattered_sums_are_vectors_where_the_device_has_them(kernels: dict[str, str]) -> None:
    halves = r"(8bfloat16|7float16|4Tf32)E(?:Li\d+E)+Lb1E"
    for match, code in of_template(kernels, ("deform_bwd_input",), halves):
        sums = {name for name in instructions(code, "RED[A-Z]*") if ".ADD.F32" in name}
        assert sums, match[0]
        if kernels is machine_code("90a"):
            assert all("F32x4" in name for name in sums), f"{match[0]}: {sums}"


def test_main_loops_stay_within_their_budgets() -> None:
    """No main loop gets more instructions for each of its products, unseen."""
    if not LIBRARY.exists() or find_disassembler() is None:
        pytest.skip(
            "the CUDA library is not built, or no cuobjdump on PATH, beside nvcc or in triton"
        )
    budgets = json.loads(BUDGETS.read_text())
    lines = []
    for arch in set(budgets) & set(architectures()):
        codes = machine_code(arch)
        if not codes:
            continue
        found = main_loops(arch)
        assert found.keys() == budgets[arch].keys()
        lines += [
            f"sm_{arch} {name}: {number} instructions for a product, at most {budgets[arch][name]}"
            for name, number in found.items()
            if number > SLACK * budgets[arch][name]
        ]
    assert not lines, "\n".join(lines)
