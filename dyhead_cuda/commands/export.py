"""``python -m dyhead_cuda export``: a trained detector as a file for another program."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.markup import escape
from torch import Tensor, nn
from torchvision.transforms.functional import to_tensor

from dyhead_cuda import library
from dyhead_cuda.commands import images
from dyhead_cuda.commands.common import fail, fail_for_memory
from dyhead_cuda.commands.detector_arguments import OPSET
from dyhead_cuda.detection import export_checks as checks
from dyhead_cuda.detection import export_files as files
from dyhead_cuda.detection.export_files import ExportError, Size
from dyhead_cuda.detection.files import make_folder
from dyhead_cuda.detection.names import ExportFormat
from dyhead_cuda.detection.trained import load_model
from dyhead_cuda.detection.training import parallel
from dyhead_cuda.detection.training.checkpoint_file import one_line
from dyhead_cuda.detection.training.errors import RunError

_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def run(arguments: argparse.Namespace) -> int:
    """Writes the file, and compares it with the detector before it has its name.

    Returns:
        0, or 2 if the checkpoint, the options or the device cannot be used, or the file does not
        compute what the detector does; then there is none.
    """
    console = Console(highlight=False, soft_wrap=True)
    try:
        _check(arguments)
        device = _device(arguments)
        model, config = load_model(arguments.checkpoint, device)
        size = _size(arguments, model)
        photograph = None if arguments.image is None else images.load_photograph(arguments.image)[0]
        make_folder(arguments.out.parent)
        _say_what_comes(arguments, config, console)
        with files.beside(arguments.out) as path:
            written = files.write(
                model,
                arguments.format,
                path,
                size,
                raw=arguments.raw,
                classes=config["classes"],
                opset=arguments.opset or OPSET,
            )
            _say_interface(arguments, size, written, model, config["classes"], console)
            _verify(arguments, path, size, model, device, photograph, console)
            megabytes = path.stat().st_size / 1e6
        console.print(f"{escape(str(arguments.out))}: {megabytes:.1f} MB, verified. To load it:")
        for line in _loading(arguments, written.namespaces, device):
            console.print(f"    {escape(line)}")
    except (images.ImageError, RunError, ExportError, ValueError, OSError, ImportError) as error:
        return fail(error)
    except (MemoryError, RuntimeError) as error:
        return fail_for_memory(error, "lower --size")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    if arguments.opset is not None and arguments.format != "onnx":
        raise ValueError("--opset: only for --format onnx")
    if arguments.out.is_dir():
        raise ValueError(f"expected --out as a file, got the folder {arguments.out}")
    suffix = files.SUFFIXES[arguments.format]
    if arguments.out.suffix != suffix:
        raise ValueError(
            f"expected --out with the suffix {suffix} for --format {arguments.format}, got "
            f"{arguments.out}"
        )
    for name in _ONNX_PACKAGES if arguments.format == "onnx" else ():
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            raise ValueError(
                f"--format onnx needs {name}: run pip install 'dyhead_cuda[export]'"
            ) from None
        except ImportError as error:
            raise ValueError(f"--format onnx needs {name}, which does not load: {error}") from None


def _device(arguments: argparse.Namespace) -> torch.device:
    if arguments.format != "onnx":
        return parallel.choose_device(arguments.device)
    if arguments.device == "cuda":
        raise ValueError(
            "--device cuda: only for pt2 and aoti, whose files hold the device; an ONNX file runs "
            "on any"
        )
    return torch.device("cpu")


def _size(arguments: argparse.Namespace, model: nn.Module) -> Size:
    if arguments.size == "dynamic":
        return files.dynamic(model, arguments.raw)
    height, width = arguments.size
    return files.fixed(height, width, arguments.raw)


def _say_what_comes(
    arguments: argparse.Namespace, config: dict[str, Any], console: Console
) -> None:
    model = config["model"]
    console.print(
        f"{escape(str(arguments.checkpoint))}: {model['detector']} on {escape(model['backbone'])}, "
        f"{model['blocks']} blocks, {model['num_classes']} classes"
    )
    if arguments.format == "aoti":
        console.print("compiling with a C++ compiler; this takes from half a minute to minutes")
    if model["keypoints"]:
        console.print("[bold yellow]warning:[/] the file has no keypoints, only boxes and labels")


def _say_interface(
    arguments: argparse.Namespace,
    size: Size,
    written: files.Written,
    model: Any,
    classes: list[str],
    console: Console,
) -> None:
    transform = model.transform
    shape: list[Any] = list(size.shape)
    if size.open_batch:
        shape[0] = "n"
    if size.multiple:
        shape[2:] = "height", "width"
    console.print(f"input  {_shown(files.INPUT, shape, torch.float32)}: RGB in 0..1")
    mean, std = (
        ", ".join(f"{value:g}" for value in values)
        for values in (transform.image_mean, transform.image_std)
    )
    if size.multiple:
        console.print(
            f"       height and width: multiples of {size.multiple}, at least {size.minimum}; pad "
            f"below and on the right, best with the mean"
        )
    else:
        console.print(f"       padded inside to multiples of {transform.size_divisible}")
    console.print(f"       normalised inside: mean {mean}; std {std}")
    console.print(
        f"       not resized inside: predict makes the shorter side {transform.min_size[-1]}, the "
        f"longer one at most {transform.max_size}"
    )
    for name, (dimensions, dtype) in written.outputs.items():
        console.print(f"output {_shown(name, dimensions, dtype)}{_MEANINGS[name]}")
    names = ", ".join(f"{i} {name}" for i, name in enumerate(classes[:_NAMED], 1))
    more = f", ... {len(classes)} {classes[-1]}" if len(classes) > _NAMED else ""
    first = "class k of logits has label k + 1; " if arguments.raw else ""
    console.print(escape(f'       {first}labels: {names}{more}; in the file as "{files.CLASSES}"'))


_NAMED = 10  # labels that are printed
_MEANINGS = {
    "boxes": ": x1, y1, x2, y2 in pixels of the input",
    "scores": ": best first",
    "labels": "",
    "logits": ": of the classes; anchors of all levels, finest first",
    "deltas": ": from the anchors to the boxes, as the detector's box coder has them",
    "centerness": ": logits",
    "anchors": ": x1, y1, x2, y2 in pixels of the input",
}


def _shown(name: str, shape: list[Any], dtype: torch.dtype) -> str:
    dimensions = ", ".join(map(str, shape))
    return escape(f"{name} [{dimensions}] {str(dtype).removeprefix('torch.')}")


def _verify(
    arguments: argparse.Namespace,
    path: Path,
    size: Size,
    model: nn.Module,
    device: torch.device,
    photograph: Image.Image | None,
    console: Console,
) -> None:
    """Prints how near the file is to the model on images of the sizes that it takes, and times."""
    run, expected = _loaded(path, arguments.format), checks.eager(model, arguments.raw)
    for shape in (size.shape, size.another):
        if shape is None:
            continue
        if photograph is None:
            pixels = checks.choose_images(expected, shape, device)
        else:
            pixels = _stretched(photograph, shape).to(device)
        with torch.no_grad():
            found = run(pixels)
        agreement = checks.compare(found, expected(pixels), max(shape[2:]))
        errors = ", ".join(
            f"{name} {error:.1e}{_UNITS.get(name, '')}" for name, error in agreement.errors.items()
        )
        text = f"check  {'x'.join(map(str, shape))}: "
        if not arguments.raw:
            text += f"{agreement.paired} of {agreement.detections} detections agree; "
        console.print(f"{text}largest error: {errors}")
        if not arguments.raw and not agreement.detections:
            console.print(
                "[bold yellow]warning:[/] the detector finds nothing in this image, so boxes were "
                "not compared; pass --image PHOTO"
            )
        if shape == size.shape:
            times = [1000 * checks.seconds(call, pixels) for call in (run, expected)]
            console.print(
                f"speed  {times[0]:.1f} ms, the detector in PyTorch {times[1]:.1f} ms "
                f"(median of {checks.RUNS}, {device.type}, {torch.get_num_threads()} threads)"
            )


_UNITS = {"boxes": " pixels"}


def _loaded(path: Path, kind: ExportFormat) -> Callable[[Tensor], files.Outputs]:
    try:
        return files.load(path, kind)
    except Exception as error:  # whatever the programs that run such files raise
        raise ExportError(f"the file that was written does not load: {one_line(error)}") from error


def _stretched(photograph: Image.Image, shape: tuple[int, int, int, int]) -> Tensor:
    """A photograph [N, 3, H, W], N times the same, stretched to its size."""
    count, _, height, width = shape
    pixels: Tensor = to_tensor(photograph.resize((width, height)))
    return pixels.expand(count, -1, -1, -1).contiguous()


def _loading(
    arguments: argparse.Namespace, namespaces: tuple[str, ...], device: torch.device
) -> list[str]:
    """The lines of Python that load the file."""
    file = json.dumps(str(arguments.out))
    if arguments.format == "onnx":
        return ["import onnxruntime", f"session = onnxruntime.InferenceSession({file})"]
    lines = ["import torch"]
    if "torchvision" in namespaces:
        lines.append("import torchvision  # for its operators")
    if "dyhead" in namespaces:
        lines.append("import dyhead_cuda  # or the operators alone, without its Python code:")
        # The CUDA library has kernels only; the CPU one has the schemas.
        needed = library.NAMES if device.type == "cuda" else ("cpu",)
        lines += [f'# torch.ops.load_library("{library.path(name)}")' for name in needed]
    if arguments.format == "pt2":
        return [*lines, f"model = torch.export.load({file}).module()"]
    return [*lines, f"model = torch._inductor.aoti_load_package({file})"]
