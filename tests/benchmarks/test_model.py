"""The model of the CUDA kernels' times: its arithmetic, and the samples that it counts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import main
from benchmarks.model import command
from benchmarks.model.devices import DEVICES, KB
from benchmarks.model.times import kernel_time, stack_time
from benchmarks.model.work import KernelWork
from tests.helpers import machine_code
from tests.helpers.machine_code import MainLoop, main_loop
from tests.simt.build import compiler

H100 = DEVICES["h100"]
NOTHING = KernelWork(
    step="convolutions fwd",
    kernel="k",
    launches=1,
    blocks=132,
    resident=1,
    flop=0,
    path_clocks=0,
    issue_slots=0,
    l2_bytes=0,
    reduced_bytes=0,
    memory_bytes=0,
    per_product=0,
)


def test_each_resource_can_be_the_limit() -> None:
    second = {
        "flop": ("tensor", 132 * 1.7e9 * 4096 * 0.62),
        "path_clocks": ("path", 132 * 1.7e9),
        "issue_slots": ("issue", 132 * 1.7e9 * 4),
        "l2_bytes": ("l2", 5.5e12),
        "reduced_bytes": ("reductions", 3.0e12),
        "memory_bytes": ("memory", 3.0e12),
    }
    for name, (limit, amount) in second.items():
        values: dict[str, Any] = {name: amount}
        time = kernel_time(dataclasses.replace(NOTHING, **values), H100)
        assert (time.limit, time.bound) == (limit, pytest.approx(1.0)), name
    assert kernel_time(NOTHING, H100).limit == "launch"


def test_the_last_round_counts_whole() -> None:
    work = dataclasses.replace(NOTHING, path_clocks=1.7e9, l2_bytes=5.5e12)
    one, more = (kernel_time(dataclasses.replace(work, blocks=n), H100) for n in (132, 133))
    # 133 blocks: one multiprocessor has two of them, twice 1 / 133 of the work.
    assert more.path / one.path == pytest.approx(2 * 132 / 133)
    assert more.l2 == one.l2  # shared by all
    # Fewer blocks than multiprocessors: each does its own part, however many others idle.
    few = kernel_time(dataclasses.replace(work, blocks=1), H100)
    assert few.path == pytest.approx(1.0)


def test_stack() -> None:
    work = dataclasses.replace(NOTHING, path_clocks=132 * 1.7e9)
    time = stack_time([work, work], flop=989e12, blocks=3, device=H100)
    assert (time.bound, time.expected) == (pytest.approx(6.0), pytest.approx(7.5))
    assert time.roofline == pytest.approx(3 / 7.5)
    assert time.launches == 2


@pytest.mark.parametrize(
    ("threads", "registers", "shared_bytes", "blocks"),
    [(256, 255, 0, 1), (256, 64, 0, 4), (256, 32, 100 * KB, 2), (1024, 32, 0, 2), (32, 16, 0, 32)],
)
def test_resident_blocks(threads: int, registers: int, shared_bytes: int, blocks: int) -> None:
    assert H100.resident_blocks(threads, registers, shared_bytes) == blocks


def test_main_loop_is_the_innermost_with_products() -> None:
    instructions = ["LDG.E R1, [R2]", "MOV R3, R4", "LDSM.16.M88.4 R4, [R9]"]
    instructions += ["HMMA.16816.F32.BF16 R8, R4, R5, R8"] * 2
    instructions += ["@P0 BRA 0x0010", "@!P1 BRA 0x0000", "BRA 0x0070"]
    code = "\n".join(f" /*{16 * i:04x}*/  {text} ;" for i, text in enumerate(instructions))
    assert main_loop(code) == MainLoop(instructions=5, products=2, flop=8192, shared_loads=1)
    assert main_loop(code.replace("HMMA", "FFMA")) is None


def test_what_is_missing_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said() -> str:
        assert main(["model", "--devices", "a100"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    here = Path(command.__file__)
    record = {"cuda": {"sources": "as they are"}}
    monkeypatch.setattr(command, "compiler", lambda: None)
    assert "g++" in said()
    monkeypatch.setattr(command, "compiler", lambda: "g++")
    monkeypatch.setattr(command, "LIBRARY", Path("libdyhead_cuda.so"))
    assert "make build" in said()
    monkeypatch.setattr(command, "LIBRARY", here)
    monkeypatch.setattr(command, "find_disassembler", lambda: None)
    assert "cuobjdump" in said()
    monkeypatch.setattr(command, "find_disassembler", lambda: here)
    monkeypatch.setattr(command, "read_build_record", lambda: record)
    monkeypatch.setattr(command, "digest", lambda *_: "changed")
    assert "other sources" in said()
    monkeypatch.setattr(command, "digest", lambda *_: "as they are")
    monkeypatch.setattr(command, "machine_code", lambda _: {})
    assert "no code for sm_80" in said()


@pytest.mark.skipif(compiler() is None, reason="g++ not found: it compiles the emulated kernels")
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not machine_code.LIBRARY.exists() or machine_code.find_disassembler() is None:
        pytest.skip("no CUDA library, or no cuobjdump on PATH, beside nvcc or in triton")
    if not machine_code.machine_code("90a"):
        pytest.skip("the CUDA library is built without sm_90a")
    page = tmp_path / "page.md"
    page.write_text("<!-- model: begin -->\n<!-- model: end -->\n")
    arguments = ["--devices", "h100", "--shapes", "tiny", "--batch", "1", "--sampled", "1"]
    assert main(["model", *arguments, "--write", str(page)]) == 0
    text = page.read_text()
    assert text.splitlines()[1] == capsys.readouterr().out.splitlines()[0]
    assert "H100 SXM, 2 blocks" in text
    assert "convolutions fwd: deform_fwd_kernel<bfloat16" in text
    assert "convolutions bwd: deform_bwd_input_kernel<bfloat16" in text
