"""``python -m benchmarks model``: bounds of the CUDA kernels' times, from counts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks.cases.heads import block_work
from benchmarks.cases.problems import Setting
from benchmarks.cases.shapes import SHAPE_SETS, ShapeSet
from benchmarks.model.devices import DEVICES, STAYS_IN_L2, Device
from benchmarks.model.times import kernel_time, stack_time
from benchmarks.model.work import KernelWork, count_block
from benchmarks.readme import MODEL, table, write_section
from dyhead_cuda.library import read_build_record
from dyhead_cuda.sources import digest
from tests.helpers.machine_code import LIBRARY, find_disassembler, machine_code
from tests.helpers.paths import ROOT
from tests.simt.build import compiler

FORWARD, BACKWARD = " fwd", " bwd"


def run(arguments: argparse.Namespace) -> int:
    """Counts, and prints or writes the tables; returns the exit status."""
    missing = _missing([DEVICES[name] for name in arguments.devices])
    if missing:
        print(f"benchmarks: {missing}", file=sys.stderr)
        return 2
    shapes = SHAPE_SETS[arguments.shapes]
    tables = []
    for name in arguments.devices:
        device = DEVICES[name]
        works = {
            batch: count_block(
                device, shapes, batch, arguments.sampled, STAYS_IN_L2 * device.l2_bytes
            )
            for batch in arguments.batch
        }
        tables.append(_summary(device, shapes, works))
        tables.extend(_kernels(device, batch, work) for batch, work in works.items())
    text = "\n\n".join(tables)
    print(text)
    if arguments.write:
        write_section(arguments.write, MODEL, text)
    return 0


def _missing(devices: Sequence[Device]) -> str | None:
    """What the model of these devices needs and this machine has not, in a sentence."""
    if compiler() is None:
        return "the model needs g++, which compiles the emulated kernels"
    if not LIBRARY.exists():
        return f"the model reads the machine code of {LIBRARY.name}: build it with `make build`"
    if find_disassembler() is None:
        return "the model needs cuobjdump, of the CUDA toolkit or of triton: `pip install triton`"
    if read_build_record().get("cuda", {}).get("sources") != digest(ROOT, "cuda"):
        return f"{LIBRARY.name} was built from other sources than those here: `make build`"
    for device in devices:
        if not machine_code(device.arch):
            return (
                f"{LIBRARY.name} has no code for sm_{device.arch}, which the model of an "
                f"{device.name} reads: build it with DYHEAD_CUDA_ARCHS={device.arch}, or choose "
                "other --devices"
            )
    return None


def _summary(device: Device, shapes: ShapeSet, works: dict[int, list[KernelWork]]) -> str:
    rows = []
    for batch, work in works.items():
        forward_flop = block_work(Setting("block", shapes, batch)).flops
        for title, direction, flop in (
            ("forward", FORWARD, forward_flop),
            ("backward", BACKWARD, 2 * forward_flop),
        ):
            time = stack_time(
                [w for w in work if w.step.endswith(direction)], flop, shapes.blocks, device
            )
            rows.append(
                [
                    f"batch {batch}, {title}",
                    f"{time.flop / 1e12:.2f}",
                    str(time.launches),
                    milliseconds(time.bound),
                    milliseconds(time.expected),
                    f"{time.roofline:.0%}",
                ]
            )
    header = [
        f"{device.name}, {shapes.blocks} blocks",
        "TFLOP",
        "launches of a block",
        "bound, ms",
        "expected, ms",
        "of the roofline",
    ]
    return table(header, rows)


def _kernels(device: Device, batch: int, works: Sequence[KernelWork]) -> str:
    rows = []
    for work in works:
        time = kernel_time(work, device)
        rows.append(
            [
                f"{work.step}: {work.kernel}",
                time.limit,
                milliseconds(time.bound),
                milliseconds(time.tensor),
                milliseconds(time.path),
                milliseconds(time.issue),
                f"{work.l2_bytes / 1e6:.0f}",
                f"{work.reduced_bytes / 1e6:.0f}",
                f"{work.memory_bytes / 1e6:.0f}",
                f"{work.blocks} / {work.resident}",
                f"{work.per_product:.1f}" if work.per_product else "",
            ]
        )
    header = [
        f"{device.name}, a block, batch {batch}",
        "limit",
        "bound, ms",
        "tensor",
        "path",
        "issue",
        "L2, MB",
        "reductions, MB",
        "memory, MB",
        "blocks / at once",
        "instructions per product",
    ]
    return table(header, rows, text_columns=2)


def milliseconds(seconds: float) -> str:
    """With three digits after the point, and nothing for nothing."""
    return f"{seconds * 1e3:.3f}" if seconds else ""
