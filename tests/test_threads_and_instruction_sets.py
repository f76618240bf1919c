"""The CPU backend as a whole: dispatch, threads, compilation, instruction sets, memory."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from dyhead_cuda import DyHead, backend, functional, library
from dyhead_cuda.backends import Backend
from dyhead_cuda.pyramid import HIGH_OFFSETS, HighOffset
from tests.helpers.blocks import BLOCKS, Block, block_gradients, in_double
from tests.helpers.compare import TOLERANCE, assert_close, assert_gradients_close, gradients, leaf
from tests.helpers.convolutions import PlainConvolution
from tests.helpers.inputs import flat_parameters, halving_sizes, random_pyramid
from tests.helpers.paths import ROOT
from tests.helpers.spy import Spy
from tests.helpers.unified import attend, unified_inputs

library.require("cpu")


def calls_of_compiled_operators(run: Callable[[], object]) -> int:
    with Spy() as spy, torch.no_grad():
        run()
    return spy.calls


def test_auto_runs_the_compiled_operators() -> None:
    block = Block()
    features, parameters = block.tensors(torch.float32)
    unified = unified_inputs((1, 2, 4, 3, 3), 4)
    assert calls_of_compiled_operators(lambda: block.run("auto", features, parameters)) > 1
    assert calls_of_compiled_operators(lambda: block.run("reference", features, parameters)) == 0
    assert calls_of_compiled_operators(lambda: attend("auto", unified)) > 0
    auto, cpu = (block.run(name, features, parameters) for name in ("auto", "cpu"))
    assert all(torch.equal(a, b) for a, b in zip(auto, cpu, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_and_runs_give_the_same_bits(dtype: torch.dtype, threads: None) -> None:
    block = Block(
        sizes=tuple(halving_sizes(19, 24, 4)), in_channels=256, out_channels=256, num_groups=16
    )
    first = None
    for count in (1, 2, 7, 7):
        torch.set_num_threads(count)
        features, parameters = block.tensors(dtype)
        outs = block.run("cpu", features, parameters)
        results = [*outs, *block_gradients(outs, features, parameters)]
        first = first or results
        for i, (a, b) in enumerate(zip(first, results, strict=True)):
            assert torch.equal(a, b), (count, i)


def test_python_threads_at_once() -> None:
    blocks = [replace(BLOCKS["several chunks"], seed=seed) for seed in range(4)]
    tensors = [block.tensors(torch.float32) for block in blocks]

    def run(i: int) -> list[Tensor]:
        features, parameters = tensors[i]
        outs = blocks[i].run("auto", features, parameters)
        return [*outs, *block_gradients(outs, features, parameters)]

    alone = [run(i) for i in range(len(blocks))]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(run, list(range(len(blocks))) * 3))
    for i, results in enumerate(together):
        for a, b in zip(results, alone[i % len(blocks)], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("high_offset", HIGH_OFFSETS)
def test_head_compiles_in_one_graph(high_offset: HighOffset) -> None:
    head = DyHead(4, 8, 2, num_groups=2, high_offset=high_offset).double()
    features = [leaf(x) for x in random_pyramid(2, 4, halving_sizes(7, 6, 3))]
    torch._dynamo.reset()
    with backend("cpu"):
        compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
        actual, expected = compiled(features), head(features)
    assert_close(actual, expected)
    inputs = [*features, *head.parameters()]
    assert_gradients_close(gradients(actual, inputs), gradients(expected, inputs))


def test_blocks_hand_on_what_a_user_changed_between_them() -> None:
    block = Block(in_channels=8)
    features, parameters = block.tensors()
    with torch.no_grad():
        first = block.run("cpu", features, parameters)
        copies = [x.clone() for x in first]
        assert_close(
            block.run("cpu", first, parameters), block.run("reference", copies, parameters)
        )
        for x, copy in zip(first, copies, strict=True):
            x *= 2
            copy *= 2
        expected = block.run("reference", copies, parameters)
        assert_close(block.run("cpu", first, parameters), expected)
        # Levels that lie where those of one matrix would, but in another one.
        others = block.run("cpu", [x + 1 for x in features], parameters)
        mixed = [first[0], others[1], first[2]]
        expected_mixed = block.run("reference", [x.clone() for x in mixed], parameters)
        assert_close(block.run("cpu", mixed, parameters), expected_mixed)
        assert_close(
            block.run("cpu", [x[1:] for x in first], parameters), [x[1:] for x in expected]
        )
    # Features without gradients under parameters with them.
    actual, expected = (
        block.run("cpu", first, parameters),
        block.run("reference", copies, parameters),
    )
    assert_gradients_close(
        gradients(actual, flat_parameters(parameters)),
        gradients(expected, flat_parameters(parameters)),
    )


# --- capabilities of the processor ----------------------------------------------------------------

# What each needs, from narrow to wide.
CAPABILITIES = {"neon": set[str]()}
if platform.machine() in ("x86_64", "AMD64"):
    avx2 = {"avx2", "fma", "f16c"}
    avx512 = avx2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
    CAPABILITIES = {
        "default": set[str](),
        "avx2": avx2,
        "avx512": avx512,
        "avx512bf16": avx512 | {"avx512_bf16"},
        "amx": avx512 | {"avx512_bf16", "amx_tile", "amx_bf16"},
    }
NARROWEST = next(iter(CAPABILITIES))
Results = dict[torch.dtype, list[Tensor]]


def processor_flags() -> set[str]:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()


def results(name: Backend, double: bool = False) -> Results:
    """Outputs and gradients of one convolution and outputs of one block, in every type."""
    case = PlainConvolution(groups=2, in_multiple=70, out_multiple=37, margin=(11, 12))
    block = Block(in_channels=70, out_channels=36)
    found = {}
    for dtype in TOLERANCE:
        tensors = case.tensors(dtype)
        features, parameters = block.tensors(dtype)
        if double:
            tensors = {key: leaf(t, torch.float64) for key, t in tensors.items()}
            features, parameters = in_double(features, parameters)
        with backend(name):
            out = case.run(functional.modulated_deform_conv2d, tensors)
        grads = gradients(out, list(tensors.values()), dtype)
        found[dtype] = [out.detach(), *grads, *block.run(name, features, parameters)]
    return found


def run_python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def results_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Results]:
    """Results of the compiled kernels with one capability; each is computed once."""
    directory = tmp_path_factory.mktemp("capabilities")

    @cache
    def compute(capability: str) -> Results:
        path = directory / capability
        program = (
            "import torch; from dyhead_cuda import library; "
            "from tests.test_threads_and_instruction_sets import results; "
            f"assert library.cpu_capability() == {capability!r}; "
            f"torch.save(results('cpu'), {str(path)!r})"
        )
        run = run_python(program, DYHEAD_CPU_CAPABILITY=capability)
        assert run.returncode == 0, run.stderr[-3000:]
        return torch.load(path)

    return compute


@pytest.fixture(scope="module")
def exact_results() -> Results:
    return results("reference", double=True)


TINY_CALL = """
import torch
from dyhead_cuda import backend, functional
with backend("cpu"):
    x = torch.ones(1, 1, 1, 1)
    functional.modulated_deform_conv2d(x, torch.zeros(1, 2, 1, 1), x)
"""


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_capability_can_be_forced(
    capability: str, results_of: Callable[[str], Results], exact_results: Results
) -> None:
    lacking = CAPABILITIES[capability] - processor_flags()
    if lacking:
        run = run_python(TINY_CALL, DYHEAD_CPU_CAPABILITY=capability)
        assert run.returncode != 0
        assert (
            f"DYHEAD_CPU_CAPABILITY is {capability}, but this CPU and its system offer"
            in run.stderr
        )
        return
    actual, narrowest = results_of(capability), results_of(NARROWEST)
    for dtype in TOLERANCE:
        assert_close(actual[dtype], exact_results[dtype], dtype, factor=2)
        assert_close(actual[dtype], narrowest[dtype], dtype, factor=2)
    # Not the same bits, so that the variable has had an effect.
    other = {
        "avx2": ("default", torch.float32),
        "avx512bf16": ("avx512", torch.bfloat16),
        "amx": ("avx512bf16", torch.bfloat16),
    }
    if capability in other:
        name, dtype = other[capability]
        pairs = zip(actual[dtype], results_of(name)[dtype], strict=True)
        assert not all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.skipif(
    "amx" not in CAPABILITIES or bool(CAPABILITIES["amx"] - processor_flags()),
    reason="needs a CPU with AMX",
)
def test_without_permission_for_tiles_narrower_instructions_are_used() -> None:
    # Linux refuses where the stack of a signal handler could not hold the registers of AMX.
    program = """
import ctypes, torch

class Stack(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

memory = ctypes.create_string_buffer(8192)
stack = Stack(ctypes.addressof(memory), 0, len(memory))
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None) == 0
from dyhead_cuda import library
print(library.cpu_capability())
"""
    # Intel's products of pairs are slower than those of float32 without AMX, so nobody gets them
    # who does not ask.
    assert run_python(program, DYHEAD_CPU_CAPABILITY="").stdout == "avx512\n"
    for wanted in ("avx512bf16", "avx512"):
        assert run_python(program, DYHEAD_CPU_CAPABILITY=wanted).stdout == f"{wanted}\n"
    refused = run_python(program, DYHEAD_CPU_CAPABILITY="amx").stdout
    assert "DYHEAD_CPU_CAPABILITY is amx, but this CPU and its system offer avx512bf16" in refused


def test_an_unknown_capability_is_refused_at_first_use() -> None:
    # The variable is read once, so each value has a process; a fork needs no import of torch.
    program = f"""
import os, sys, traceback, torch, dyhead_cuda

for value in ("sse2", "AVX2", "avx512 ", ""):
    if (child := os.fork()) == 0:
        os.environ["DYHEAD_CPU_CAPABILITY"] = value
        if value:
            print(dyhead_cuda.library.cpu_capability(), file=sys.stderr)
        try:
            exec({TINY_CALL!r})
            print("accepted", repr(value), flush=True)
        except RuntimeError:
            traceback.print_exc()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""
    run = run_python(program)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "accepted ''\n"
    refused = [line for line in run.stderr.splitlines() if "expected DYHEAD_CPU" in line]
    # Once as what stands for the capability, and once raised.
    for line, value in zip(refused, ("sse2",) * 2 + ("AVX2",) * 2 + ("avx512 ",) * 2, strict=True):
        assert f"expected DYHEAD_CPU_CAPABILITY to be one of {', '.join(CAPABILITIES)}, " in line
        assert f"got {value}" in line


# --- memory ---------------------------------------------------------------------------------------


def peak_memory(train: bool) -> float:
    """MiB that a block needs at most, beyond its inputs, outputs, saved tensors and gradients."""
    sizes = ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))
    block = Block(sizes=sizes, batch=1, in_channels=256, out_channels=256, num_groups=16)
    torch.set_num_threads(2)
    for one in (replace(block, sizes=((10, 12), (5, 6))), block):  # the first loads what is lazy
        features, parameters = one.tensors(torch.float32)
        inputs = [*features, *flat_parameters(parameters)]
        cotangents = [torch.randn(1, 256, *size) for size in one.sizes]
        kept = {t.untyped_storage().data_ptr(): 0 for t in inputs}

        def keep(t: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes())
            return t

        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
        before = memory_status("VmRSS")
        with torch.set_grad_enabled(train), saved_tensors_hooks(keep, lambda t: t):
            outs = one.run("cpu", features, parameters)
        if train:
            for grad in torch.autograd.grad(outs, inputs, cotangents):
                keep(grad)
        for out in outs:
            keep(out)
        extra = memory_status("VmHWM") - before - sum(kept.values())
    return extra / 2**20


def memory_status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {key} in /proc/self/status")


@pytest.mark.parametrize("train", [False, True])
def test_peak_memory_stays_under_64_mib(train: bool) -> None:
    # The allocator is told to give memory back, so that what is resident is what is in use.
    module = "tests.test_threads_and_instruction_sets"
    program = f"from {module} import peak_memory; print(peak_memory({train}))"
    run = run_python(program, MALLOC_MMAP_THRESHOLD_="65536")
    assert run.returncode == 0, run.stderr[-3000:]
    # It cannot be less than the branches' outputs of 33 MiB, or the measure is wrong.
    assert 20 < float(run.stdout) < 64
