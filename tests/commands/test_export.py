"""export from the command line: what it writes, what it says, and what it refuses to write."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from dyhead_cuda import __main__ as command_line
from dyhead_cuda.detection import export_checks, export_files
from dyhead_cuda.detection.export_files import Size
from dyhead_cuda.detection.models import exportable
from dyhead_cuda.detection.trained import load_model
from tests.helpers.detection.finders import save_run


def command(*arguments: object) -> int:
    try:
        return command_line.main(["export", *(str(argument) for argument in arguments)])
    except SystemExit as ended:
        return int(ended.code or 0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {name: save_run(name, folder) for name in ("atss", "retinanet", "faster_rcnn")}


def expected(run: Path, image: Tensor) -> dict[str, Tensor]:
    """What the detector finds in an image of the size that it resizes to."""
    model, _ = load_model(run)
    return export_checks.eager(model, raw=False)(image)


def test_onnx_of_any_size(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "atss.onnx"
    assert command(runs["atss"], "--format", "onnx", "--size", "dynamic", "--out", out) == 0
    assert [path.name for path in out.parent.iterdir()] == ["atss.onnx"]
    said = capsys.readouterr().out
    assert "input  images [1, 3, height, width] float32" in said
    assert "multiples of 32, at least 64" in said
    assert "output boxes [detections, 4] float32" in said
    assert "output labels [detections] int64" in said
    assert "1 ant, 2 bee, 3 cat" in said
    assert said.count("detections agree; largest error: boxes") == 2
    assert f'onnxruntime.InferenceSession("{out}")' in said

    file = onnx.load(out)
    assert {node.domain for node in file.graph.node} == {""}
    assert [opset.version for opset in file.opset_import if not opset.domain] == [21]
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == ["ant", "bee", "cat"]
    for height, width in ((64, 64), (128, 96)):
        image = torch.rand(1, 3, height, width)
        boxes, scores, labels = map(torch.from_numpy, session.run(None, {"images": image.numpy()}))
        found = {"boxes": boxes, "scores": scores, "labels": labels}
        agreement = export_checks.compare(found, expected(runs["atss"], image), height)
        assert agreement.paired > 10


# Runs the lines that the command printed, in a Python of its own.
LOADED = """
{lines}
image, expected = torch.load({data!r})
with torch.no_grad():
    found = model(image)
for name, x in expected.items():
    torch.testing.assert_close(found[name], x, rtol=1e-4, atol=1e-3)
"""


def test_pt2_loads_as_the_command_says(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "two stages.pt2"
    options = ["--format", "pt2", "--size", "100x75", "--device", "cpu"]
    assert command(runs["faster_rcnn"], *options, "--out", out) == 0
    said = capsys.readouterr().out
    assert "padded inside to multiples of 32" in said
    lines = [line.strip() for line in said.partition("To load it:\n")[2].splitlines()]
    # The operators alone are enough.
    lines = [line.removeprefix("# ") for line in lines if "import dyhead_cuda" not in line]
    assert any("load_library" in line for line in lines)

    image = torch.rand(1, 3, 100, 75)
    torch.save((image, expected(runs["faster_rcnn"], image)), tmp_path / "data.pt")
    script = LOADED.format(lines="\n".join(lines), data=str(tmp_path / "data.pt"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_raw_predictions_of_any_number_of_images(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "raw.pt2"
    options = ["--format", "pt2", "--size", "dynamic", "--raw", "--device", "cpu"]
    assert command(runs["retinanet"], *options, "--out", out) == 0
    said = capsys.readouterr().out
    assert "input  images [n, 3, height, width] float32" in said
    assert "output logits [n, anchors, 3] float32" in said
    assert "centerness" not in said
    classes = {export_files.CLASSES: ""}
    program: Any = torch.export.load(out, extra_files=classes).module()
    assert json.loads(classes["classes"]) == ["ant", "bee", "cat"]
    model, _ = load_model(runs["retinanet"])
    for shape in ((1, 3, 64, 96), (3, 3, 128, 64)):
        images = torch.rand(shape)
        outputs = export_checks.eager(model, raw=True)(images)
        with torch.no_grad():
            export_checks.compare(program(images), outputs, 128)


class Tiny(nn.Module):
    """A stand-in for a detector, which takes AOTInductor seconds, not a minute."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        values = images.mean((0, 1))
        return {
            "boxes": values[:, :4] * 10,
            "scores": values.amax(1),
            "labels": (values[:, 0] * 3).long(),
        }


def test_aoti(
    runs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(export_files, "exportable", lambda *_: Tiny())
    monkeypatch.setattr(export_checks, "eager", lambda *_: Tiny())
    out = tmp_path / "tiny.pt2"
    options = ["--format", "aoti", "--size", "64x64", "--device", "cpu"]
    assert command(runs["atss"], *options, "--out", out) == 0
    said = capsys.readouterr().out
    assert "compiling with a C++ compiler" in said
    assert "64 of 64 detections agree" in said
    assert f'torch._inductor.aoti_load_package("{out}")' in said
    package: Any = torch._inductor.aoti_load_package(str(out))
    assert json.loads(package.get_metadata()["classes"]) == ["ant", "bee", "cat"]


def test_a_file_that_differs_is_not_kept(
    runs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right = exportable._rules
    monkeypatch.setattr(
        exportable, "_rules", lambda model: dataclasses.replace(right(model), nms_threshold=0.1)
    )
    out = tmp_path / "wrong.pt2"
    out.write_text("what was there")
    options = ["--format", "pt2", "--size", "64x64", "--device", "cpu"]
    assert command(runs["atss"], *options, "--out", out) == 2
    assert "the file does not compute what the model does" in capsys.readouterr().err
    assert out.read_text() == "what was there"
    assert [path.name for path in tmp_path.iterdir()] == ["wrong.pt2"]


def test_what_torch_cannot_export_is_one_error(
    runs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("a symbol\nwas guarded on")

    monkeypatch.setattr(torch.export, "export", refuse)
    options = ["--format", "pt2", "--size", "dynamic", "--device", "cpu"]
    assert command(runs["atss"], *options, "--out", tmp_path / "a.pt2") == 2
    said = capsys.readouterr().err
    assert "try a fixed --size: RuntimeError: a symbol was guarded on" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "tflite"], "invalid choice: 'tflite'"),
        (["--size", "800"], "expected a height and a width such as 800x1088, or dynamic"),
        (["--size", "0x64"], "expected a height and a width"),
        (["--opset", "18"], "expected an integer of at least 19"),
        (["--format", "pt2", "--opset", "21"], "--opset: only for --format onnx"),
        (["--format", "pt2", "--out", "a.onnx"], "expected --out with the suffix .pt2"),
        (["--device", "cuda"], "--device cuda: only for pt2 and aoti"),
        (["--raw"], "expected a one-stage detector for raw outputs"),
        (["--image", "/no/such/photo.png"], "/no/such/photo.png does not exist"),
    ],
)
def test_bad_options_are_one_clear_error(
    options: list[str],
    message: str,
    runs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    defaults = ["--format", "onnx", "--size", "64x64", "--out", "a.onnx"]
    assert command(runs["faster_rcnn"], *defaults, *options) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_one_line(
    package: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    options = ["--format", "onnx", "--size", "dynamic", "--out", tmp_path / "a.onnx"]
    assert command(tmp_path / "not looked at", *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--format onnx needs {package}: run pip install 'dyhead_cuda[export]'" in line


def test_a_checkpoint_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--format", "pt2", "--size", "dynamic", "--out", tmp_path / "a.pt2"]
    assert command(tmp_path, *options) == 2
    assert "expected a checkpoint, but" in capsys.readouterr().err


def test_sizes_that_are_open_are_tried_in_two(runs: dict[str, Path]) -> None:
    model, _ = load_model(runs["atss"])
    size = export_files.dynamic(model, raw=False)
    assert size == Size(64, 96, multiple=32, minimum=64)
    assert size.another == (1, 3, 160, 64)
    assert export_files.dynamic(model, raw=True).shape == (2, 3, 64, 96)
    assert export_files.fixed(50, 70, raw=False).another is None
    assert export_files.fixed(50, 70, raw=True).another == (1, 3, 50, 70)
