"""predict: folders, batches and videos, and what it says where it finds nothing."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dyhead_cuda import __main__ as command_line
from dyhead_cuda.commands.predict import batches, nothing
from dyhead_cuda.detection import DigitScenes
from dyhead_cuda.detection.names import DETECTORS
from dyhead_cuda.detection.prediction import detect, padded_size, predict
from tests.helpers.detection import finders

SIZES = ((64, 64), (64, 96), (60, 64), (96, 64), (64, 64))  # height, width
FRAMES = 5


def command(*arguments: object) -> int:
    return command_line.main(["predict", *map(str, arguments), "--device", "cpu"])


def pixels(number: int, size: tuple[int, int]) -> np.ndarray:
    image, _ = DigitScenes("val", number + 1, size=size)[number]
    return (image * 255).round().byte().permute(1, 2, 0).numpy()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finders.save_run("atss", tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five images, what is no image, and a folder."""
    path = tmp_path_factory.mktemp("images")
    for number, size in enumerate(SIZES):
        Image.fromarray(pixels(number, size)).save(path / f"{number}.png")
    (path / "0.json").write_text("{}")
    (path / "notes.txt").write_text("of yesterday")
    (path / "inside").mkdir()
    shutil.copy(path / "0.png", path / "inside" / "deep.png")
    return path


def found_in(out: Path) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(out.glob("*.json"))}


def test_a_folder_stands_for_its_images(
    run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(folder, "--checkpoint", run, "--out", tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[:-1]] == [
        str(tmp_path / f"{number}.png") for number in range(5)
    ]
    assert lines[-1] == "left out, as they are no images: 0.json, notes.txt"
    assert sorted(found_in(tmp_path)) == list("01234")
    assert command(folder / "inside" / "..", "--checkpoint", run, "--out", tmp_path) == 0


def test_a_damaged_image_of_a_folder_is_an_error_and_the_others_are_done(
    run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = tmp_path / "given"
    given.mkdir()
    shutil.copy(folder / "1.png", given)
    (given / "0.png").write_bytes((folder / "0.png").read_bytes()[:400])
    assert command(given, "--checkpoint", run, "--out", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"cannot read {given / '0.png'}" in line
    assert list(found_in(tmp_path / "out")) == ["1"]


def test_a_folder_without_images(
    run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").touch()
    assert command(tmp_path, "--checkpoint", run) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"expected images in {tmp_path}, found none among its 1 files" in line


def test_nothing_that_is_read_is_replaced(
    run: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (folder / "0.png").read_bytes()
    assert command(folder / "0.png", "--checkpoint", run, "--out", folder) == 2
    assert "expected --out as another folder than that of" in capsys.readouterr().err
    assert (folder / "0.png").read_bytes() == before


def assert_same(found: Any, expected: Any) -> None:
    assert [each["class"] for each in found] == [each["class"] for each in expected]
    for name in ("box", "score"):
        torch.testing.assert_close(
            torch.tensor([each[name] for each in found]),
            torch.tensor([each[name] for each in expected]),
            rtol=1e-4,
            atol=1e-3,
        )


def test_batches_find_what_single_images_give(
    run: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []

    def counting(model: nn.Module, images: Sequence[Tensor]) -> Any:
        counts.append(len(images))
        return detect(model, images)

    monkeypatch.setattr("dyhead_cuda.commands.predict.detect", counting)
    results = []
    for size in (1, 3):
        out = tmp_path / str(size)
        options = ["--threshold", "0", "--out", out, "--batch-size", size]
        assert command(folder, "--checkpoint", run, *options) == 0
        results.append(found_in(out))
    # 60 x 64 becomes 64 x 68, which is padded to the size of 64 x 96.
    assert counts[:5] == [1] * 5
    assert sorted(counts[5:]) == [1, 2, 2]
    for single, together in zip(*(result.values() for result in results), strict=True):
        assert len(single["detections"]) > 20
        assert_same(together["detections"], single["detections"])


def test_images_that_do_not_go_together_would_differ() -> None:
    """The reason for the sizes of batches: padding changes what a head sees."""
    model = finders.make("atss")
    small, large = (torch.rand(3, *size, generator=torch.Generator()) for size in SIZES[:2])
    assert padded_size(model, 64, 64) != padded_size(model, 64, 96)
    alone, together = (detect(model, images)[0] for images in ([small], [small, large]))
    assert not torch.equal(alone["scores"], together["scores"])


@pytest.mark.parametrize("height", [20, 63, 64, 70, 200])
def test_the_padded_size_is_that_of_what_the_backbone_gets(height: int) -> None:
    model = finders.make("atss")
    shapes: list[torch.Size] = []
    backbone = model.get_submodule("backbone")
    backbone.register_forward_pre_hook(lambda _, given: shapes.append(given[0].shape))
    detect(model, [torch.rand(3, height, 64)])
    assert padded_size(model, height, 64) == tuple(shapes[0][-2:])


def test_batches_are_of_one_kind_and_hold_few_items_back() -> None:
    drawn: list[int] = []

    def numbers() -> Any:
        for number in range(100):
            drawn.append(number)
            yield number

    groups = []
    for group in batches(numbers(), 3, lambda number: number % 10):
        groups.append(group)
        assert len(drawn) - sum(map(len, groups)) < 12
    assert all(len({number % 10 for number in group}) == 1 for group in groups)
    assert max(map(len, groups)) == 3
    assert sorted(itertools.chain(*groups)) == list(range(100))
    assert list(batches(range(3), 1, lambda _: 0)) == [[0], [1], [2]]


def test_what_to_do_where_nothing_is_found(
    run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = folder / "0.png"
    assert command(image, "--checkpoint", run, "--out", tmp_path, "--threshold", "1") == 0
    said = capsys.readouterr().out
    assert "0.png: 0 objects above 1; the best has 0." in said
    lower = said.split("--threshold ")[1].strip()
    assert command(image, "--checkpoint", run, "--out", tmp_path, "--threshold", lower) == 0
    assert " 0 objects" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("best", "shown", "lower"),
    [
        (0.2101, "0.21", "0.2"),
        (0.199, "0.19", "0.15"),
        (0.0391, "0.039", "0.035"),
        (0.5, "0.5", "0.5"),
    ],
)
def test_the_threshold_that_is_suggested_finds_something(
    best: float, shown: str, lower: str
) -> None:
    said = nothing([0.01, best], 0.6)
    assert said == f" above 0.6; the best has {shown}: try --threshold {lower}"
    assert float(lower) <= best


def test_nothing_at_all() -> None:
    assert nothing([], 0.3).startswith(" above 0.3, and the model proposes none with a lower score")
    assert nothing([0.0], 0.3).endswith("--threshold 0")


def test_the_number_of_boxes_in_a_drawing(
    run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--checkpoint", run, "--threshold", "0", "--max-boxes", "4", "--out", tmp_path]
    assert command(folder / "0.png", *options) == 0
    count = len(found_in(tmp_path)["0"]["detections"])
    assert count > 4
    assert f"{count} objects, the best 4 drawn (--max-boxes)" in capsys.readouterr().out


@pytest.mark.parametrize("name", DETECTORS)
def test_boxes_without_area_are_dropped(name: str) -> None:
    model = finders.make(name)
    image = torch.rand(3, 64, 90, generator=torch.Generator().manual_seed(3))
    found = predict(model, image, 0)
    assert (found["boxes"][:, 2:] > found["boxes"][:, :2]).all()
    assert len(found["boxes"]) == len(found["scores"]) == len(found["labels"]) > 0


def test_a_video_without_the_package_is_one_line(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.delitem(sys.modules, "dyhead_cuda.detection.video", raising=False)
    with pytest.raises(SystemExit) as stopped:
        command("a.mp4", "--checkpoint", run)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        "python -m dyhead_cuda predict needs av: run pip install 'dyhead_cuda[video]'\n"
    )


def write_video(path: Path, turned: int = 0) -> list[np.ndarray]:
    """Five frames of 64 x 96, ten in a second."""
    av = pytest.importorskip("av", reason="no PyAV: pip install av")
    frames = [pixels(number, (64, 96)) for number in range(FRAMES)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 96, 64, "yuv420p", 4_000_000
        if turned:
            stream.set_display_rotation(turned)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return frames


def read_video(path: Path) -> list[np.ndarray]:
    import av

    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_a_video_frame_by_frame(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_video(tmp_path / "street.mp4")
    results = []
    for size in (1, 2):
        out = tmp_path / str(size)
        options = ["--threshold", "0.1", "--max-boxes", "3", "--batch-size", size, "--out", out]
        assert command(tmp_path / "street.mp4", "--checkpoint", run, *options) == 0
        results.append(found_in(out)["street"])
    single, together = results
    assert single["frames_per_second"] == 10
    assert [frame["time"] for frame in single["frames"]] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert [frame["frame"] for frame in single["frames"]] == list(range(FRAMES))
    for one, other in zip(single["frames"], together["frames"], strict=True):
        assert_same(other["detections"], one["detections"])
    count = sum(len(frame["detections"]) for frame in single["frames"])
    assert count > 5
    assert f"street.mp4: 5 frames, {count} objects\n" in capsys.readouterr().out
    model = finders.make("atss")
    given = read_video(tmp_path / "street.mp4")
    drawn = read_video(tmp_path / "1" / "street.mp4")
    assert len(drawn) == FRAMES
    for number, frame in enumerate(given):
        image = torch.from_numpy(frame).permute(2, 0, 1) / 255
        assert len(predict(model, image, 0.1)["scores"]) == len(
            single["frames"][number]["detections"]
        )
        large = frame.repeat(5, 0).repeat(5, 1).astype(int)
        assert drawn[number].shape == (320, 480, 3)
        assert 0.02 < (np.abs(drawn[number] - large).max(2) > 60).mean() < 0.7


def test_a_video_of_a_turned_camera_is_upright(run: Path, tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason="no PyAV: pip install av")
    if not hasattr(av.VideoStream, "set_display_rotation"):
        pytest.skip("this PyAV does not write turned videos")
    from dyhead_cuda.detection import video

    frames = write_video(tmp_path / "turned.mp4", 90)
    with video.reading(tmp_path / "turned.mp4") as reader:
        read = [frame.pixels.permute(1, 2, 0).numpy() for frame in reader]
    assert len(read) == FRAMES
    for got, frame in zip(read, frames, strict=True):
        expected = np.rot90(frame)  # counterclockwise, as the file says
        assert got.shape == expected.shape
        assert np.abs(got.astype(int) - expected).mean() < 20


def test_videos_that_cannot_be_read(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_video(tmp_path / "good.mp4")
    (tmp_path / "text.mp4").write_text("no video at all")
    paths = [tmp_path / name for name in ("text.mp4", "nowhere.mp4", "good.mp4")]
    assert command(*paths, "--checkpoint", run, "--out", tmp_path / "out") == 2
    first, second = capsys.readouterr().err.splitlines()
    assert f"cannot read {paths[0]} (no video, or damaged)" in first
    assert f"{paths[1]} does not exist" in second
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"good.mp4", "good.json"}


def test_a_video_that_breaks_off_is_done_so_far(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_video(tmp_path / "cut.mp4")
    from dyhead_cuda.detection import video

    usual = video.Reader.__iter__

    def breaking(reader: Any) -> Any:
        for number, frame in enumerate(usual(reader)):
            if number == 2:
                raise video.VideoError("cannot read on")
            yield frame

    monkeypatch.setattr(video.Reader, "__iter__", breaking)
    out = tmp_path / "out"
    assert command(tmp_path / "cut.mp4", "--checkpoint", run, "--out", out) == 2
    assert "cannot read on" in capsys.readouterr().err
    assert len(found_in(out)["cut"]["frames"]) == len(read_video(out / "cut.mp4")) == 2
