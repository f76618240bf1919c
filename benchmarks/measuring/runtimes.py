"""``python -m benchmarks runtimes``: the operator, heads and a detector elsewhere.

On a CPU: eager, through torch.compile, as a program of torch.export, as the ONNX file that
docs/export.md makes in onnxruntime, and in OpenVINO, whose PyTorch front end takes the published
layers on torchvision's operator. The rounds alternate between all of them, so that what disturbs
the machine disturbs each; ratios are of medians.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import readme
from benchmarks.cases import peers
from benchmarks.cases.heads import block_work
from benchmarks.cases.operators import deform_conv
from benchmarks.cases.problems import OURS, Setting, randomised
from benchmarks.cases.shapes import SHAPE_SETS
from benchmarks.machine import environment, one_line
from benchmarks.measuring import fma
from benchmarks.readme import table
from dyhead_cuda import DyHead
from dyhead_cuda.detection import load_model
from dyhead_cuda.detection.models import gflops
from dyhead_cuda.detection.models.exportable import exportable
from dyhead_cuda.detection.trained import SHIPPED
from dyhead_cuda.pyramid import BlockParameters

Maps = Sequence[Tensor]
Run = Callable[[], Maps]

# Relative, of results against the float32 ones of this package.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COMPILED = "torch.compile"
EXPORTED = "torch.export"
ONNXRUNTIME = "onnxruntime"
OPENVINO = "OpenVINO"
NOT_INSTALLED = "not installed"
PAUSE = 0.1  # seconds; the threads of the one before may go on waiting actively for a while
FLOAT32_ONLY = "float32 only"
NO_LAYERS = "reads no DeformConv"


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


class _Operator(nn.Module):
    """A modulated deformable convolution, ours or torchvision's."""

    def __init__(self, conv: nn.Module, operator: peers.DeformConv | None = None) -> None:
        super().__init__()
        self.conv, self.operator = conv, operator

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> tuple[Tensor]:
        if self.operator is None:
            return (self.conv(x, offset, mask),)
        return (self.operator(x, offset, mask, self.conv.weight, self.conv.bias, 1),)  # type: ignore[arg-type]


class _Detector(nn.Module):
    """The outputs of a detector before decoding, whose number is always the same."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.raw = exportable(model, raw=True)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.raw(images).values())


class _Head(nn.Module):
    """A head of tensors, as the operator is."""

    def __init__(self, head: DyHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, *levels: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.head(list(levels)))


@dataclass(frozen=True)
class Case:
    """What is measured, in float32.

    Attributes:
        title: for people.
        module: of this package; takes the inputs and returns a tuple of tensors.
        layers: the same on torchvision's operator; None where nobody has them.
        inputs: of both.
        flops: of the products, see :class:`~benchmarks.cases.problems.Work`.
    """

    title: str
    module: nn.Module
    layers: nn.Module | None
    inputs: tuple[Tensor, ...]
    flops: int


def operator_case(shapes: str) -> Case:
    """One deformable convolution on the finest level of a shape."""
    problem = deform_conv(Setting("deform_conv", SHAPE_SETS[shapes]))
    conv = problem.module.eval()
    layers = _Operator(conv, peers.deform_convs()["torchvision"])
    inputs = tuple(problem.images)
    return Case(f"deform_conv, {shapes}", _Operator(conv), layers, inputs, problem.work.flops)


def head_case(shapes: str, blocks: int) -> Case:
    """A published head on a pyramid."""
    chosen = SHAPE_SETS[shapes]
    torch.manual_seed(0)
    head = DyHead(chosen.channels, chosen.channels, blocks, num_groups=chosen.num_groups)
    randomised(head).eval()
    parameters = [block.parameters_tuple() for block in head.blocks]  # type: ignore[operator]
    levels = tuple(torch.randn(1, chosen.channels, *size) for size in chosen.levels)
    return Case(
        f"head, {shapes}, {blocks} block" + "s" * (blocks > 1),
        _Head(head),
        _Layers(parameters, chosen.num_groups),
        levels,
        blocks * block_work(Setting("head", chosen)).flops,
    )


def detector_case() -> Case:
    """The detector that comes with the package, on an image of the size that it was trained for."""
    model, _ = load_model(SHIPPED)
    size = 256
    flops = int(1e9 * gflops(model, size, size))
    inputs = (torch.rand(1, 3, size, size),)
    return Case(f"detector {SHIPPED}, {size} x {size}", _Detector(model), None, inputs, flops)


def _onnxruntime(case: Case, folder: Path) -> Run:
    import onnxruntime

    path = folder / "case.onnx"
    torch.onnx.export(
        case.module,
        case.inputs,
        path,
        dynamo=True,
        opset_version=21,
        external_data=False,
        verbose=False,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    arrays = {name: x.numpy() for name, x in zip(names, case.inputs, strict=True)}
    return lambda: [torch.from_numpy(array) for array in session.run(None, arrays)]


def _openvino(layers: nn.Module, case: Case, precision: str) -> Run:
    import openvino  # type: ignore[import-not-found]

    model = openvino.convert_model(layers, example_input=case.inputs)
    settings = {
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[precision],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    arrays = [x.numpy() for x in case.inputs]
    return lambda: [torch.from_numpy(array) for array in compiled(arrays).values()]


def _runs(case: Case, precision: str, folder: Path) -> Iterator[tuple[str, Run | str]]:
    """What is measured, by name: a function, or why there is none."""
    module = copy.deepcopy(case.module).to(PRECISIONS[precision])
    inputs = tuple(x.to(PRECISIONS[precision]) for x in case.inputs)
    yield OURS, lambda: module(*inputs)
    compiled = torch.compile(module, fullgraph=True, dynamic=False)
    yield COMPILED, lambda: compiled(*inputs)
    program = torch.export.export(module, inputs).module()
    yield EXPORTED, lambda: program(*inputs)
    if not all(find_spec(name) is not None for name in ("onnx", "onnxscript", "onnxruntime")):
        yield ONNXRUNTIME, NOT_INSTALLED
    elif precision != "float32":
        yield ONNXRUNTIME, FLOAT32_ONLY
    else:
        yield ONNXRUNTIME, _onnxruntime(case, folder)
    if find_spec("openvino") is None:
        yield OPENVINO, NOT_INSTALLED
    elif case.layers is None:
        yield OPENVINO, NO_LAYERS
    else:
        yield OPENVINO, _openvino(case.layers, case, precision)


def measure(case: Case, precision: str, rounds: int) -> dict[str, Any]:
    """The medians of alternating rounds, in seconds, and errors relative to our float32.

    Args:
        case: what.
        precision: a name of ``PRECISIONS``.
        rounds: of which the first is not measured.

    Raises:
        RuntimeError: a result is further from that than ``TOLERANCE``.
    """
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        expected = case.module(*case.inputs)
        found = dict(_runs(case, precision, Path(folder)))
        runs = {name: run for name, run in found.items() if not isinstance(run, str)}
        times: dict[str, list[float]] = {name: [] for name in runs}
        errors = {name: _error(run(), expected, precision) for name, run in runs.items()}
        for _ in range(rounds):
            for name, run in runs.items():
                time.sleep(PAUSE)
                begin = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - begin)
    rows = {
        name: {"seconds": statistics.median(times[name][1:]), "error": errors[name]}
        if name in runs
        else {"remark": run}
        for name, run in found.items()
    }
    return {
        "case": case.title,
        "precision": precision,
        "rounds": rounds - 1,
        "flops": case.flops,
        "rows": rows,
    }


def _error(found: Maps, expected: Maps, precision: str) -> float:
    """The largest relative error of a map."""
    error = max(
        float((a.double() - b.double()).norm() / b.double().norm())
        for a, b in zip(found, expected, strict=True)
    )
    if not error <= TOLERANCE[precision]:
        raise RuntimeError(
            f"expected the numbers of this package to {TOLERANCE[precision]}, got {error}"
        )
    return error


def section(data: dict[str, Any], link: str) -> str:
    """The table of a results file, in Markdown.

    Args:
        data: what :func:`run` writes.
        link: to the file.
    """
    facts, peaks = data["environment"], data["fma_tflop_per_s"]
    names = list(data["cases"][0]["rows"])[1:]
    lines = []
    for case in data["cases"]:
        rows = case["rows"]
        own = rows[OURS]["seconds"]
        peak = peaks.get(case["precision"])
        share = f"{case['flops'] / own / peak / 1e12:.0%}" if peak else "-"
        cells = [case["case"], case["precision"], f"{own * 1e3:.0f} ms", share]
        for name in names:
            row = rows[name]
            cells.append(f"{row['seconds'] / own:.2f} x" if "seconds" in row else row["remark"])
        lines.append([*cells, _best_other(rows, own)])
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    measured = ", ".join(f"{1e3 * rate:.0f} GFLOP/s in {name}" for name, rate in peaks.items())
    header = ["case", "precision", OURS, "share of the FMA peak", *names, "best other runtime"]
    return "\n".join(
        [
            f"{one_line(facts)}, {versions}, {facts['date'][:10]}, commit {facts['commit']}:",
            "",
            f"    {facts['command']}",
            "",
            table(header, lines),
            "",
            "Inference, batch 1, medians of alternating rounds; other columns say how many times "
            "longer they take. Fused multiply-adds on registers reach "
            f"{measured or 'no rate that could be measured'} in the same run. "
            f"[all numbers]({link})",
        ]
    )


def _best_other(rows: dict[str, Any], own: float) -> str:
    """The fastest runtime that does not run our kernels."""
    others = {
        name: rows[name]["seconds"] for name in (ONNXRUNTIME, OPENVINO) if "seconds" in rows[name]
    }
    if not others:
        return "-"
    name = min(others, key=lambda other: others[other])
    return f"{name}, {others[name] / own:.2f} x"


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
        cases = [operator_case(arguments.shapes)]
        cases += [head_case(arguments.shapes, blocks) for blocks in arguments.blocks]
        cases.append(detector_case())
        data = {
            "environment": environment(sys.argv[1:], torch.device("cpu")),
            "versions": _versions(),
            "fma_tflop_per_s": fma.rates(list(PRECISIONS), torch.get_num_threads(), 1000),
            "cases": [
                measure(case, precision, 1 + arguments.rounds)
                for precision in PRECISIONS
                for case in cases
                if precision == "float32" or case.layers is not None
            ],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data, indent=2) + "\n")
    data = json.loads(path.read_text())
    if arguments.write is None:
        print(section(data, str(path)))
        return 0
    link = os.path.relpath(path, arguments.write.parent).replace(os.sep, "/")
    name = readme.section_of(readme.RUNTIMES, path)
    readme.write_section(arguments.write, name, section(data, link))
    return 0
