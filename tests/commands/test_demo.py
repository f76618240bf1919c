"""The demo on real photographs, on awkward files, and what it draws."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from skimage import data
from torch import Tensor

from dyhead_cuda import __main__ as command_line
from dyhead_cuda import fused
from dyhead_cuda.commands import arguments as options
from dyhead_cuda.commands import demo, demo_detector, images
from dyhead_cuda.inspect import figure

SHOW_DETECTOR = demo_detector.show
SMALL = ["--size", "96", "--blocks", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def astronaut() -> Image.Image:
    return Image.fromarray(data.astronaut())


@pytest.fixture(autouse=True)
def detector_shown(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls of the demo's second half, which has tests of its own."""
    calls: list[Any] = []

    def show(*given: Any) -> bool:
        calls.append(given)
        return True

    monkeypatch.setattr(demo_detector, "show", show)
    return calls


def run_demo(output: Path, *options: str) -> int:
    return command_line.main(["demo", *SMALL, "--output", str(output), *options])


def test_demo_compares_and_draws(
    astronaut: Image.Image,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    detector_shown: list[Any],
) -> None:
    astronaut.save(tmp_path / "astronaut.png")
    output = tmp_path / "new" / "directory"
    assert run_demo(output, "--image", str(tmp_path / "astronaut.png")) == 0
    said = capsys.readouterr().out
    for text in (
        "512 x 512 pixels, resized to 96 x 96, padded to 128 x 128",
        "1 x 256 x 16 x 16",
        "1 x 256 x 1 x 1",
        "relative L2 error",
        "random (seed 0)",
        "Time in seconds",
        "agree",
    ):
        assert text in said
    assert "nan" not in said
    ((_, directory, device, best),) = detector_shown
    assert (directory, device.type, best) == (output, "cpu", "cpu")
    (picture,) = output.iterdir()
    assert str(picture) in said
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert image.size == (1800, 1400)
        pixels = np.asarray(image.convert("RGB"))
    # The photograph and the maps have hundreds of colours in every quarter of the picture.
    for rows in (pixels[:700], pixels[700:]):
        for quarter in (rows[:, :900], rows[:, 900:]):
            assert len(np.unique(quarter.reshape(-1, 3), axis=0)) > 500
            assert 0.02 < (quarter != 255).any(axis=2).mean() < 0.98


@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_demo_in_other_dtypes(
    dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_demo(tmp_path, "--dtype", dtype, "--blocks", "1") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"tolerance {demo.TOLERANCES[dtype]:.0e} of {dtype}" in said
    assert str(tmp_path / "coffee_dyhead.png") in said


@pytest.fixture
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves the seconds of drawing where the picture is not the point."""
    monkeypatch.setattr(figure, "draw", lambda *_: None)


@pytest.mark.usefixtures("no_picture")
def test_demo_fails_when_the_backends_disagree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = fused.pyramid_blocks

    def wrong(*arguments: Any, **options: Any) -> list[Tensor]:
        return [x * 1.001 for x in original(*arguments, **options)]

    monkeypatch.setattr(fused, "pyramid_blocks", wrong)
    assert run_demo(tmp_path) == 1
    assert "DISAGREE" in capsys.readouterr().out


@pytest.mark.usefixtures("no_picture")
def test_demo_fails_on_nan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(features: list[Tensor], *_: Any, **__: Any) -> list[Tensor]:
        return [torch.full_like(x, torch.nan) for x in features]

    monkeypatch.setattr(fused, "pyramid_blocks", wrong)
    assert run_demo(tmp_path) == 1
    assert "relative error nan" in capsys.readouterr().out


def test_demo_shows_the_detector_that_comes_with_the_package(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    console, device = Console(width=200), torch.device("cpu")
    monkeypatch.setattr(demo_detector, "scenes", lambda scenes=demo_detector.scenes: scenes(1))
    assert SHOW_DETECTOR(console, tmp_path, device, "cpu")
    said = capsys.readouterr().out
    assert "detections above 0.3" in said
    assert "on the cpu backend and on the reference are the same" in said
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "digits_attention.png",
        "digits_detections.png",
    ]
    original = fused.pyramid_blocks

    def wrong(*arguments: Any, **options: Any) -> list[Tensor]:
        return [x * 1.5 for x in original(*arguments, **options)]

    monkeypatch.setattr(fused, "pyramid_blocks", wrong)
    monkeypatch.setattr(demo_detector.attention_figure, "draw", lambda *_: None)
    assert not SHOW_DETECTOR(console, tmp_path, device, "cpu")
    assert "DIFFER" in capsys.readouterr().out


def _save_grey(image: Image.Image, path: Path) -> None:
    image.convert("L").save(path)


def _save_rgba(image: Image.Image, path: Path) -> None:
    rgba = image.convert("RGBA")
    rgba.putalpha(180)
    rgba.save(path)


def _save_palette(image: Image.Image, path: Path) -> None:
    image.quantize(16).save(path, transparency=0)


def _save_black_and_white(image: Image.Image, path: Path) -> None:
    image.convert("1").save(path)


def _save_16_bit(image: Image.Image, path: Path) -> None:
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 16).save(path)


def _save_float(image: Image.Image, path: Path) -> None:
    values = np.asarray(image.convert("L")).astype(np.float32) / 7
    values[0, 0] = np.nan
    Image.fromarray(values).save(path, format="TIFF")


def _save_cmyk(image: Image.Image, path: Path) -> None:
    image.convert("CMYK").save(path, format="JPEG")


AWKWARD = {
    "grey": _save_grey,
    "rgba": _save_rgba,
    "palette": _save_palette,
    "black_and_white": _save_black_and_white,
    "16_bit": _save_16_bit,
    "float": _save_float,
    "cmyk": _save_cmyk,
}


@pytest.mark.parametrize("kind", AWKWARD)
def test_every_kind_of_image_is_read_as_rgb(
    kind: str, astronaut: Image.Image, tmp_path: Path
) -> None:
    path = tmp_path / f"{kind}.png"
    AWKWARD[kind](astronaut, path)
    image, name = images.load_photograph(path)
    assert (image.mode, image.size, name) == ("RGB", astronaut.size, kind)
    # Still the same photograph: its grey values go up and down together.
    grey, expected = (np.asarray(i.convert("L"), np.float64).ravel() for i in (image, astronaut))
    assert np.corrcoef(grey, expected)[0, 1] > (0.6 if kind == "black_and_white" else 0.85)


def test_sixteen_bits_use_the_full_range(astronaut: Image.Image, tmp_path: Path) -> None:
    _save_16_bit(astronaut, tmp_path / "deep.png")
    image, _ = images.load_photograph(tmp_path / "deep.png")
    assert image.getextrema() == ((0, 255),) * 3


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    Image.new("RGBA", (40, 40), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    image, _ = images.load_photograph(tmp_path / "clear.png")
    assert image.getextrema() == ((255, 255),) * 3


def test_exif_rotation_is_undone(astronaut: Image.Image, tmp_path: Path) -> None:
    wide = astronaut.crop((0, 0, 512, 300))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    wide.save(tmp_path / "turned.jpg", exif=exif)
    image, _ = images.load_photograph(tmp_path / "turned.jpg")
    assert image.size == (300, 512)


@pytest.mark.parametrize("size", [(512, 64), (64, 512)])
def test_demo_draws_wide_and_tall_photographs(
    size: tuple[int, int], astronaut: Image.Image, tmp_path: Path
) -> None:
    path = tmp_path / "16 bits.png"
    _save_16_bit(astronaut.resize(size), path)
    assert run_demo(tmp_path, "--image", str(path), "--blocks", "1") == 0
    assert (tmp_path / "16 bits_dyhead.png").is_file()


def test_demo_on_a_photograph_of_nothing(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "grey").save(tmp_path / "flat.png")
    assert run_demo(tmp_path, "--image", str(tmp_path / "flat.png")) == 0


def _text(path: Path, _: Image.Image) -> None:
    path.write_text("this is no image")


def _empty(path: Path, _: Image.Image) -> None:
    path.touch()


def _truncated(path: Path, image: Image.Image) -> None:
    image.save(path, format="PNG")
    path.write_bytes(path.read_bytes()[:20_000])


def _corrupt(path: Path, image: Image.Image) -> None:
    image.save(path, format="PNG")
    content = bytearray(path.read_bytes())
    content[5_000:5_400] = bytes(400)
    path.write_bytes(content)


def _missing(path: Path, _: Image.Image) -> None:
    pass


def _directory(path: Path, _: Image.Image) -> None:
    path.mkdir()


def _tiny(path: Path, image: Image.Image) -> None:
    image.resize((200, 31)).save(path, format="PNG")


def _narrow(path: Path, image: Image.Image) -> None:
    image.resize((40, 400)).save(path, format="PNG")


def _huge(path: Path, _: Image.Image) -> None:
    Image.new("1", (12_000, 9_000)).save(path, format="PNG")


def _bomb(path: Path, _: Image.Image) -> None:
    Image.new("1", (20_000, 20_000)).save(path, format="PNG")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_text, "in no format that PIL"),
        (_empty, "in no format that PIL"),
        (_truncated, "damaged"),
        (_corrupt, "damaged"),
        (_missing, "does not exist"),
        (_directory, "expected an image file, got the directory"),
        (_tiny, "is 200 x 31 pixels; expected at least 32"),
        (_narrow, "expected sides of at most 8 to 1"),
        (_huge, "is 12000 x 9000 pixels; expected at most 100 million"),
        (_bomb, "too large"),
    ],
)
def test_what_is_no_photograph_gets_one_clear_line(
    make: Callable[[Path, Image.Image], None],
    message: str,
    astronaut: Image.Image,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "[photo] of $something.png"
    make(path, astronaut)
    assert run_demo(tmp_path / "out", "--image", str(path)) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert str(path) in said.err
    assert said.err.count("\n") == 1
    assert not list((tmp_path / "out").iterdir())


def test_an_output_that_is_a_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert run_demo(tmp_path / "file" / "below") == 2
    assert "cannot write to the directory" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="the error is about a missing GPU")
def test_cuda_without_a_gpu_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_demo(tmp_path, "--device", "cuda") == 2
    assert "needs a GPU" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_demo_on_a_gpu(dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--size", "200", "--device", "cuda", "--dtype", dtype]
    assert run_demo(tmp_path, *options) == 0
    assert torch.cuda.get_device_name() in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("option", ["--size=9", "--size=big", "--blocks=0", "--seed=-1"])
def test_numbers_out_of_range_are_usage_errors(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_demo(tmp_path, option)
    assert ended.value.code == 2
    assert "expected an integer from" in capsys.readouterr().err


def test_default_photograph_and_weights_are_the_same_every_time() -> None:
    first, second = (demo.load_photograph(None)[0] for _ in range(2))
    assert np.array_equal(np.asarray(first), np.asarray(second))
    for build in (lambda seed: demo.build_head(1, seed), demo.build_backbone):
        states = [build(seed).state_dict() for seed in (3, 3, 4)]
        assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
        assert any(not torch.equal(value, states[2][key]) for key, value in states[0].items())


def test_sizes_and_padding(astronaut: Image.Image) -> None:
    image = images.resize(astronaut.crop((0, 0, 512, 300)), 200)
    assert image.size == (200, 117)
    tensor = images.to_tensor(image)
    assert tensor.shape == (1, 3, 128, 256)
    assert tensor.dtype == torch.float32
    assert not tensor[..., 117:, :].any()
    assert not tensor[..., 200:].any()
    assert tensor[..., :117, :200].std() > 0.5


def test_interest_points_are_apart_and_inside() -> None:
    image = Image.fromarray(data.astronaut())
    points = figure.interest_points(image, 4, 40)
    assert len(points) == 4
    assert all(40 <= x < 472 and 40 <= y < 472 for x, y in points)
    pairs = [(p, q) for p in points for q in points if p < q]
    assert all(np.hypot(p[0] - q[0], p[1] - q[1]) > 100 for p, q in pairs)


def test_an_interest_point_is_where_the_photograph_changes() -> None:
    pixels = np.zeros((120, 200, 3), np.uint8)
    pixels[60:80, 140:160] = 255
    ((x, y),) = figure.interest_points(Image.fromarray(pixels), 1, 10)
    assert 130 <= x <= 170
    assert 50 <= y <= 90


def test_options_have_the_documented_defaults() -> None:
    parser = argparse.ArgumentParser()
    options.demo(parser)
    arguments = parser.parse_args([])
    assert (arguments.size, arguments.blocks, arguments.dtype) == (800, 6, "float32")
    assert arguments.output == Path("demo_output")
    assert set(options.DTYPES) == set(demo.TOLERANCES)
