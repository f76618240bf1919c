"""``python -m benchmarks runtimes``: the exported head in other runtimes, against this package.

One float32 head on a CPU: eager, through torch.compile, as a program of torch.export, as the ONNX
file that docs/export.md makes in onnxruntime, and in OpenVINO, whose PyTorch front end takes the
published layers on torchvision's operator. The rounds alternate between all of them, so that what
disturbs the machine disturbs each; ratios are of medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import readme
from benchmarks.cases import peers
from benchmarks.cases.problems import OURS, randomised
from benchmarks.cases.shapes import SHAPE_SETS
from benchmarks.machine import environment, one_line, product_rate
from benchmarks.measuring.timing import usual_effort
from benchmarks.readme import table
from dyhead_cuda import DyHead
from dyhead_cuda.pyramid import BlockParameters

Run = Callable[[], Sequence[Tensor]]

TOLERANCE = 1e-4  # relative, of float32 results against the float32 reference of this package
COMPILED = "torch.compile"
EXPORTED = "torch.export"
ONNXRUNTIME = "onnxruntime"
OPENVINO = "OpenVINO"
NOT_INSTALLED = "not installed"


class _Layers(nn.Module):
    """The published layers on torchvision's operator, of tensors, as OpenVINO takes modules."""

    def __init__(self, blocks: Sequence[BlockParameters], num_groups: int) -> None:
        super().__init__()
        self.members, self.num_groups = blocks, num_groups

    def forward(self, *levels: Tensor) -> tuple[Tensor, ...]:
        features = list(levels)
        operator = peers.deform_convs()["torchvision"]
        for parameters in self.members:
            features = peers.published_block(features, parameters, operator, self.num_groups)
        return tuple(features)


def _onnxruntime(head: nn.Module, levels: list[Tensor], folder: Path) -> Run:
    import onnxruntime

    path = folder / "head.onnx"
    torch.onnx.export(
        head, (levels,), path, dynamo=True, opset_version=21, external_data=False, verbose=False
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    arrays = {name: x.numpy() for name, x in zip(names, levels, strict=True)}
    return lambda: [torch.from_numpy(array) for array in session.run(None, arrays)]


def _openvino(layers: nn.Module, levels: list[Tensor]) -> Run:
    import openvino  # type: ignore[import-not-found]

    model = openvino.convert_model(layers, example_input=tuple(levels))
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    arrays = [x.numpy() for x in levels]
    return lambda: [torch.from_numpy(array) for array in compiled(arrays).values()]


def _runs(head: DyHead, levels: list[Tensor], folder: Path) -> Iterator[tuple[str, Run | str]]:
    """What is measured, by name: a function, or why there is none."""
    yield OURS, lambda: head(levels)
    compiled = torch.compile(head, fullgraph=True, dynamic=False)
    yield COMPILED, lambda: compiled(levels)
    program = torch.export.export(head, (levels,)).module()
    yield EXPORTED, lambda: program(levels)
    if all(find_spec(name) is not None for name in ("onnx", "onnxscript", "onnxruntime")):
        yield ONNXRUNTIME, _onnxruntime(head, levels, folder)
    else:
        yield ONNXRUNTIME, NOT_INSTALLED
    if find_spec("openvino") is not None:
        blocks = [block.parameters_tuple() for block in head.blocks]  # type: ignore[operator]
        yield OPENVINO, _openvino(_Layers(blocks, head.blocks[0].num_groups), levels)  # type: ignore[arg-type]
    else:
        yield OPENVINO, NOT_INSTALLED


def measure(shapes: str, blocks: int, rounds: int) -> dict[str, Any]:
    """The medians of alternating rounds, in seconds, with errors relative to this package.

    Args:
        shapes: a name of ``SHAPE_SETS``.
        blocks: of the head.
        rounds: of which the first is not measured.
    """
    chosen = SHAPE_SETS[shapes]
    torch.manual_seed(0)
    head = DyHead(chosen.channels, chosen.channels, blocks, num_groups=chosen.num_groups)
    randomised(head).requires_grad_(False).eval()
    levels = [torch.randn(1, chosen.channels, *size) for size in chosen.levels]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        found = dict(_runs(head, levels, Path(folder)))
        expected = head(levels)
        runs = {name: run for name, run in found.items() if not isinstance(run, str)}
        times: dict[str, list[float]] = {name: [] for name in runs}
        errors = {name: _error(run(), expected) for name, run in runs.items()}
        for _ in range(rounds):
            for name, run in runs.items():
                begin = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - begin)
    rows = {
        name: {"seconds": statistics.median(times[name][1:]), "error": errors[name]}
        if name in runs
        else {"remark": run}
        for name, run in found.items()
    }
    return {"shapes": shapes, "blocks": blocks, "rounds": rounds - 1, "rows": rows}


def _error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative error of a level."""
    error = max(
        float((a.double() - b.double()).norm() / b.double().norm())
        for a, b in zip(found, expected, strict=True)
    )
    if not error <= TOLERANCE:
        raise RuntimeError(f"expected the numbers of this package to {TOLERANCE}, got {error}")
    return error


def section(data: dict[str, Any], link: str) -> str:
    """The table of a results file, in Markdown.

    Args:
        data: what :func:`run` writes.
        link: to the file.
    """
    facts, names = data["environment"], list(data["heads"][0]["rows"])
    header = ["head", OURS, *names[1:]]
    lines = []
    for head in data["heads"]:
        cells = [f"{head['shapes']}, {head['blocks']} block" + "s" * (head["blocks"] > 1)]
        own = head["rows"][OURS]["seconds"]
        cells.append(f"{own * 1e3:.0f} ms")
        for name in names[1:]:
            row = head["rows"][name]
            cells.append(f"{row['seconds'] / own:.2f} x" if "seconds" in row else row["remark"])
        lines.append(cells)
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    return "\n".join(
        [
            f"{one_line(facts)}, {versions}, {facts['date'][:10]}, commit {facts['commit']}:",
            "",
            f"    {facts['command']}",
            "",
            table(header, lines),
            "",
            "Inference in float32, batch 1, medians of alternating rounds; other columns say how "
            "many times longer they take. Large matrix products reach "
            f"{data['product_tflop_per_s']:.2f} TFLOP/s in the same run. [all numbers]({link})",
        ]
    )


def _versions() -> dict[str, str]:
    return {
        name: str(__import__(name).__version__).partition("-")[0]
        for name in ("onnxruntime", "openvino", "torchvision")
        if find_spec(name) is not None
    }


def run(arguments: argparse.Namespace) -> int:
    """Measures and writes; with ``--report`` only writes the table of ``--json`` as it is."""
    path: Path = arguments.json
    if not arguments.report:
        device = torch.device("cpu")
        data = {
            "environment": environment(sys.argv[1:], device),
            "versions": _versions(),
            "product_tflop_per_s": product_rate("float32", device, usual_effort(device)),
            "heads": [
                measure(arguments.shapes, blocks, 1 + arguments.rounds)
                for blocks in arguments.blocks
            ],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data, indent=2) + "\n")
    data = json.loads(path.read_text())
    if arguments.write is None:
        print(section(data, str(path)))
        return 0
    link = os.path.relpath(path, arguments.write.parent).replace(os.sep, "/")
    readme.write_section(arguments.write, readme.RUNTIMES, section(data, link))
    return 0
