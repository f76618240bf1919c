"""``python -m dyhead_cuda demo``: the head on a photograph, checked and drawn."""

from __future__ import annotations

import argparse
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from skimage import data
from torch import Tensor, nn
from torchvision.models import resnet50
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from dyhead_cuda import backends, info, library
from dyhead_cuda.commands import demo_detector, images
from dyhead_cuda.inspect import figure, record
from dyhead_cuda.modules import DyHead

CHANNELS = 256
LEVELS = ("P3", "P4", "P5", "P6", "P7")

# Relative L2 error between the two backends, both in this dtype, that counts as agreement.
TOLERANCES = {"float32": 1e-4, "float64": 1e-10, "float16": 1e-2, "bfloat16": 5e-2}

# An untrained head hardly moves its samples or gates; these factors on the initial weights bring
# offsets to about a pixel and spread gates and slopes, so that there is something to see.
OFFSET_GAIN_FIRST, OFFSET_GAIN_LATER, GATE_GAIN, SLOPE_GAIN = 1.0, 4.0, 10.0, 6.0

T = TypeVar("T")


class _UsageError(Exception):
    """Options that cannot be used: why, in one line."""


def run(arguments: argparse.Namespace) -> int:
    """Runs the demo.

    Returns:
        0 if the two backends agree, 1 if not, 2 if the image, device or directory cannot be used.
    """
    try:
        return _run(arguments, Console(highlight=False))
    except (images.ImageError, _UsageError) as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            f"[bold red]error:[/] {escape(str(error))}"
        )
        return 2


def build_backbone(seed: int) -> nn.Module:
    """ResNet-50 and FPN with levels P3 to P7 of 256 channels and random weights.

    In training mode, so that the batch normalisations use the photograph's own statistics: with
    statistics of their own, random weights would make the features explode.
    """
    torch.manual_seed(seed)
    return BackboneWithFPN(
        resnet50(weights=None),
        return_layers={"layer2": "P3", "layer3": "P4", "layer4": "P5"},
        in_channels_list=[512, 1024, 2048],
        out_channels=CHANNELS,
        extra_blocks=LastLevelP6P7(CHANNELS, CHANNELS),
        norm_layer=nn.BatchNorm2d,
    ).train()


def build_head(blocks: int, seed: int) -> DyHead:
    """A head with the published initialisation, enlarged where its effect would not be seen."""
    torch.manual_seed(seed + 1)
    head = DyHead(CHANNELS, CHANNELS, blocks, init="microsoft").eval()
    with torch.no_grad():
        for i, block in enumerate(record.blocks_of(head)):
            block.offset_conv.weight.mul_(OFFSET_GAIN_LATER if i else OFFSET_GAIN_FIRST)
            block.scale_gate.weight.mul_(GATE_GAIN)
            block.dynamic_relu.fc2.weight.mul_(SLOPE_GAIN)
    return head.requires_grad_(False)


def load_photograph(path: Path | None) -> tuple[Image.Image, str]:
    """A photograph and its name; without a path scikit-image's cup of coffee."""
    if path is None:
        return Image.fromarray(data.coffee()), "coffee"
    return images.load_photograph(path)


def _device(wanted: str) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise _UsageError(
            f"--device cuda needs a GPU, but torch {torch.__version__} sees none; use --device cpu"
        )
    if wanted == "auto":
        usable = torch.cuda.is_available() and library.loaded("cuda")
        return torch.device("cuda" if usable else "cpu")
    return torch.device(wanted)


def _make_directory(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".dyhead_demo"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise _UsageError(f"cannot write to the directory {path}: {error.strerror}") from None
    return path


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads, {library.cpu_capability()}"


def _compiled(backend: str) -> str:
    """The backend and the operators that it has kernels for."""
    if backend == "reference":
        return backend
    names = [n for n, where in info.gather()["operators"].items() if backend in where]
    operators = sorted({name.removesuffix("_fwd").removesuffix("_bwd") for name in names})
    return f"{backend}, with kernels for {', '.join(operators)}"


def _timed(action: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """The result of ``action`` and its seconds, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - start


@dataclass
class _Pass:
    """One run of the head, block by block: last outputs, seconds and records of the blocks."""

    outputs: list[Tensor]
    seconds: list[float] = field(default_factory=list)
    records: list[Any] = field(default_factory=list)

    def add(self, outputs: list[Tensor], seconds: float) -> None:
        self.outputs = outputs
        self.seconds.append(seconds)


def _run(arguments: argparse.Namespace, console: Console) -> int:
    device = _device(arguments.device)
    directory = _make_directory(arguments.output)
    original, name = load_photograph(arguments.image)
    photograph = images.resize(original, arguments.size)
    pixels = images.to_tensor(photograph)
    best = backends.select(torch.empty(0, device=device))
    _print_setting(console, arguments, name, original.size, photograph.size, pixels, device, best)
    fast, slow = _compare(console, arguments, pixels.to(device), best)

    path = directory / f"{name}_dyhead.png"
    count = f"{arguments.blocks} block" + "s" * (arguments.blocks > 1)
    caption = f"Dynamic Head on a photograph: {count}, {arguments.dtype}, untrained weights"
    figure.draw(photograph, slow.records, path, caption)

    worst = _print_errors(console, fast.outputs, slow.outputs)
    _print_times(console, best, fast.seconds, slow.seconds)
    agree = _print_verdict(console, best, worst, arguments.dtype)
    console.print(f"Picture: [bold]{escape(str(path))}[/]", soft_wrap=True)
    same = demo_detector.show(console, directory, device, best)
    return 0 if agree and same else 1


def _compare(
    console: Console, arguments: argparse.Namespace, pixels: Tensor, best: str
) -> tuple[_Pass, _Pass]:
    """The head on the best backend, then on the reference, which also records each block."""
    device = pixels.device
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with (
        torch.inference_mode(),
        # The comparison is about the head: convolutions must not round to TF32 in either run.
        torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
        Progress(*columns, console=console) as progress,
    ):
        backbone_task = progress.add_task("ResNet-50 + FPN", total=1)
        best_task = progress.add_task(f"head, {best} backend", total=arguments.blocks, start=False)
        reference_task = progress.add_task("head, reference", total=arguments.blocks, start=False)

        pyramid = build_backbone(arguments.seed).to(device)(pixels)
        features = _levels(pyramid, getattr(torch, arguments.dtype))
        progress.advance(backbone_task)

        head = build_head(arguments.blocks, arguments.seed).to(features[0])
        if device.type == "cuda":
            head(features)  # load the GPU's code before timing

        progress.start_task(best_task)
        fast = _Pass(features)
        for block in record.blocks_of(head):
            outputs, seconds = _timed(partial(block, fast.outputs), device)
            fast.add(outputs, seconds)
            progress.advance(best_task)

        progress.start_task(reference_task)
        slow = _Pass(features)
        for block in record.blocks_of(head):
            found, seconds = _timed(partial(record.run_block, block, slow.outputs), device)
            slow.add(found.outputs, seconds)
            slow.records.append(record.describe(block, found))
            progress.advance(reference_task)
    return fast, slow


def _levels(pyramid: OrderedDict[str, Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [x.to(dtype) for x in pyramid.values()]


def _print_setting(
    console: Console,
    arguments: argparse.Namespace,
    name: str,
    original: tuple[int, int],
    resized: tuple[int, int],
    pixels: Tensor,
    device: torch.device,
    best: str,
) -> None:
    source = arguments.image or f"{name}, one of scikit-image's"
    height, width = pixels.shape[-2:]
    table = Table.grid(padding=(0, 2))
    table.add_row("photograph", escape(str(source)))
    table.add_row(
        "",
        f"{original[0]} x {original[1]} pixels, resized to {resized[0]} x {resized[1]}, "
        f"padded to {width} x {height}",
    )
    table.add_row("backbone", "torchvision ResNet-50 + FPN, levels P3 to P7, 256 channels")
    table.add_row("head", f"DyHead, {arguments.blocks} blocks, {arguments.dtype}")
    table.add_row(
        "weights",
        f"random (seed {arguments.seed}): offset, gate and slope layers are "
        "enlarged so that their effect is seen",
    )
    table.add_row("device", f"{_machine(device)}; torch {torch.__version__}")
    table.add_row("backend", _compiled(best))
    if best == "reference":
        table.add_row("", f"no compiled kernels: {escape(library.reason(device.type))}")
        table.add_row("", f"to fix it: {escape(library.fix(device.type))}")
    console.print(table)


def _print_errors(console: Console, fast: list[Tensor], slow: list[Tensor]) -> float:
    """Prints how far the two results are apart; returns the largest relative error, or nan."""
    table = Table(title="Agreement with the reference", title_justify="left")
    table.add_column("level")
    table.add_column("shape", justify="right")
    table.add_column("max abs error", justify="right")
    table.add_column("relative L2 error", justify="right")
    worst = 0.0
    for level, ours, theirs in zip(LEVELS, fast, slow, strict=True):
        difference = (ours.double() - theirs.double()).abs()
        relative = float(difference.norm() / theirs.double().norm())
        worst = relative if math.isnan(relative) else max(worst, relative)
        shape = " x ".join(map(str, ours.shape))
        table.add_row(level, shape, f"{float(difference.max()):.1e}", f"{relative:.1e}")
        if math.isnan(worst):
            break
    console.print(table)
    return worst


def _print_verdict(console: Console, best: str, worst: float, dtype: str) -> bool:
    """Prints whether the largest error is within the tolerance; returns whether it is."""
    tolerance = TOLERANCES[dtype]
    agree = worst <= tolerance  # false for NaN
    verdict = "[green]agree[/]" if agree else "[bold red]DISAGREE[/]"
    relation = "within" if agree else "beyond"
    if best == "reference":
        console.print("[yellow]No kernels were compared:[/] both runs are the reference.")
    console.print(
        f"The {best} backend and the reference {verdict}: relative error {worst:.1e}, "
        f"{relation} the tolerance {tolerance:.0e} of {dtype}."
    )
    return agree


def _print_times(console: Console, best: str, fast: list[float], slow: list[float]) -> None:
    table = Table(title="Time in seconds", title_justify="left")
    table.add_column("block")
    table.add_column(f"{best} backend", justify="right")
    table.add_column("reference", justify="right")
    table.add_column("ratio", justify="right")
    rows = [(str(i + 1), f, s) for i, (f, s) in enumerate(zip(fast, slow, strict=True))]
    for label, ours, theirs in [*rows, ("all", sum(fast), sum(slow))]:
        if label == "all":
            table.add_section()
        table.add_row(label, f"{ours:.3f}", f"{theirs:.3f}", f"{theirs / ours:.2f}")
    console.print(table)
