"""A detector as a file that runs without this package's Python code: ONNX, pt2, AOTInductor."""

from __future__ import annotations

import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from dyhead_cuda.detection.files import writing
from dyhead_cuda.detection.models.exportable import exportable
from dyhead_cuda.detection.names import ExportFormat

Outputs = dict[str, Tensor]
Description = tuple[list[int | str], torch.dtype]  # shape, with names of open sizes, and type
INPUT = "images"
CLASSES = "classes"  # their names in the file, as a JSON list
SUFFIXES: dict[ExportFormat, str] = {"onnx": ".onnx", "pt2": ".pt2", "aoti": ".pt2"}


class ExportError(Exception):
    """A detector that cannot be exported as asked, or a file that does not compute the same."""


@dataclass(frozen=True)
class Size:
    """The images that a file takes.

    Args:
        height, width: of the images that the detector is traced with, in pixels.
        multiple: 0 where the file takes only these; else it takes all multiples of it.
        minimum: of both sides, where they are open.
        batch: of the images that the detector is traced with.
        open_batch: whether the file takes any number of images.
    """

    height: int
    width: int
    multiple: int = 0
    minimum: int = 0
    batch: int = 1
    open_batch: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the images that the detector is traced with."""
        return self.batch, 3, self.height, self.width

    @property
    def another(self) -> tuple[int, int, int, int] | None:
        """Another shape that the file takes: one image, small; None if it takes no other."""
        if not self.multiple:
            return (1, *self.shape[1:]) if self.open_batch else None
        return 1, 3, self.minimum + 3 * self.multiple, self.minimum

    def dynamic_shapes(self) -> dict[int, Any]:
        """What torch's exporters call ``dynamic_shapes``, of the images."""
        shapes: dict[int, Any] = {0: Dim("n", min=1)} if self.open_batch else {}
        if self.multiple:
            least = self.minimum // self.multiple
            shapes[2] = self.multiple * Dim("h", min=least)
            shapes[3] = self.multiple * Dim("w", min=least)
        return shapes


def fixed(height: int, width: int, raw: bool) -> Size:
    """Images of one size; any number of them where ``raw``."""
    return Size(height, width, batch=2 if raw else 1, open_batch=raw)


def dynamic(model: Any, raw: bool) -> Size:
    """Images of all sizes that the pyramid divides, any number of them where ``raw``.

    Sides are multiples of what the model pads to, so that nothing is padded, and large enough for
    a coarsest level of more than one pixel: for torch's exporters, 1 is not a size that may change.
    """
    multiple, coarsest = int(model.transform.size_divisible), max(model.backbone.strides)
    minimum = (coarsest // multiple + 1) * multiple
    height = max(minimum, -(-model.transform.min_size[-1] // multiple) * multiple)
    width = (height * 5 // 4 // multiple + 1) * multiple
    return Size(height, width, multiple, minimum, batch=2 if raw else 1, open_batch=raw)


@dataclass(frozen=True)
class Written:
    """A file, and what running it takes."""

    namespaces: tuple[str, ...]  # of operators that are not torch's own: "dyhead", "torchvision"
    outputs: dict[str, Description]  # shapes and types by name


def write(
    model: nn.Module,
    kind: ExportFormat,
    path: Path,
    size: Size,
    *,
    raw: bool = False,
    classes: Sequence[str] = (),
    opset: int = 21,
) -> Written:
    """Writes a detector to a file, which replaces one that is there.

    Args:
        model: what :func:`dyhead_cuda.detection.build` makes, in evaluation mode.
        kind: "onnx", "pt2" (``torch.export``) or "aoti" (compiled by AOTInductor, for the model's
            device).
        path: the file, with the suffix of :data:`SUFFIXES`.
        size: of the images.
        raw: predictions instead of detections, see
            :func:`~dyhead_cuda.detection.models.exportable.exportable`.
        classes: the name of label i + 1, kept in the file.
        opset: of ONNX.

    Raises:
        ExportError: torch cannot trace or compile it.
        ValueError: raw predictions of a detector that has none.
    """
    module = exportable(model, raw)
    images = torch.rand(size.shape, device=next(model.parameters()).device)
    with torch.no_grad():
        expected = module(images)
    outputs = {name: _described(name, x, size, raw) for name, x in expected.items()}
    names = json.dumps(list(classes))
    try:
        with torch.no_grad(), _quiet():
            if kind == "onnx":
                namespaces: tuple[str, ...] = ()
                _save_onnx(module, images, size, path, names, opset, outputs)
            else:
                program, namespaces = _trace(module, images, size)
                _save_program(program, kind, path, names)
    except OSError:  # of the file, which says more by itself
        raise
    except Exception as error:  # whatever torch's exporters and compilers raise
        reason = " ".join(str(error).split())
        raise ExportError(
            f"torch {torch.__version__} cannot export this detector to {kind}"
            f"{' with open sizes; try a fixed --size' if size.multiple else ''}: "
            f"{type(error).__name__}: {reason[-1000:]}"
        ) from error
    return Written(namespaces, outputs)


def _described(name: str, x: Tensor, size: Size, raw: bool) -> Description:
    shape: list[int | str] = list(x.shape)
    if not raw:
        shape[0] = "detections"
        return shape, x.dtype
    of_images = name != "anchors"
    if size.open_batch and of_images:
        shape[0] = "n"
    if size.multiple:
        shape[int(of_images)] = "anchors"
    return shape, x.dtype


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' remarks on their own and torchvision's code, which say nothing of the
    model."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _save_onnx(
    module: nn.Module,
    images: Tensor,
    size: Size,
    path: Path,
    classes: str,
    opset: int,
    outputs: dict[str, Description],
) -> None:
    program: Any = torch.onnx.export(
        module,
        (images,),
        dynamo=True,
        verbose=False,
        opset_version=opset,
        input_names=[INPUT],
        output_names=list(outputs),
        dynamic_shapes=(size.dynamic_shapes(),),
    )
    import onnx_ir

    for value in program.model.graph.outputs:  # torch's own names are formulas
        value.shape = onnx_ir.Shape(outputs[value.name][0])
    program.model.metadata_props[CLASSES] = classes
    program.save(path, external_data=False)


def _trace(module: nn.Module, images: Tensor, size: Size) -> tuple[Any, tuple[str, ...]]:
    program = torch.export.export(module, (images,), dynamic_shapes=(size.dynamic_shapes(),))
    targets = (node.target for node in program.graph.nodes if node.op == "call_function")
    spaces = {target.namespace for target in targets if isinstance(target, torch._ops.OpOverload)}
    return program, tuple(sorted(spaces & {"dyhead", "torchvision"}))


def _save_program(program: Any, kind: ExportFormat, path: Path, classes: str) -> None:
    if kind == "pt2":
        torch.export.save(program, path, extra_files={CLASSES: classes})
    else:
        configs = {"aot_inductor.metadata": {CLASSES: classes}}
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(path), inductor_configs=configs
        )


def load(path: Path, kind: ExportFormat) -> Callable[[Tensor], Outputs]:
    """A file that :func:`write` wrote, as a function from images to outputs by name.

    ONNX runs on the CPU, on as many threads as torch uses.
    """
    if kind == "pt2":
        with _quiet():
            run: Callable[[Tensor], Outputs] = torch.export.load(path).module()
        return run
    if kind == "aoti":
        package: Callable[[Tensor], Outputs] = torch._inductor.aoti_load_package(str(path))
        return package
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run_session(images: Tensor) -> Outputs:
        outputs = session.run(names, {INPUT: images.numpy()})
        return dict(zip(names, map(torch.from_numpy, outputs), strict=True))

    return run_session


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A file of the same name in a folder of its own, which takes the place of ``path`` at the end
    unless something is raised."""
    with (
        writing(path),
        tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder,
    ):
        temporary = Path(folder) / path.name
        yield temporary
        temporary.replace(path)
