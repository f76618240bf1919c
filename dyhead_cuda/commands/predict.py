"""``python -m dyhead_cuda predict``: the detections on images and videos, drawn and as JSON."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

from PIL import Image
from rich.console import Console
from rich.markup import escape
from torch import Tensor
from torchvision.transforms.functional import to_tensor

from dyhead_cuda.commands import images
from dyhead_cuda.commands.common import check_names, check_outputs, fail, fail_for_memory
from dyhead_cuda.commands.parsing import load
from dyhead_cuda.detection.figures import drawing
from dyhead_cuda.detection.files import make_folder, write_json
from dyhead_cuda.detection.prediction import above, describe, detect, padded_size
from dyhead_cuda.detection.trained import load_model
from dyhead_cuda.detection.training import parallel
from dyhead_cuda.detection.training.errors import RunError
from dyhead_cuda.detection.tta import TestTimeAugmentation

VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
WAITING = 4  # batches of images that wait for others of their size

T = TypeVar("T")


class Photograph(NamedTuple):
    path: Path
    name: str
    image: Image.Image


class Detector(NamedTuple):
    """What the images go through."""

    model: TestTimeAugmentation
    classes: list[str]
    threshold: float
    max_boxes: int
    batch_size: int
    out: Path
    console: Console

    def size(self, pixels: Tensor) -> Hashable:
        """Images of one size in the model give together what each gives alone."""
        if self.batch_size == 1:
            return None
        if self.model.scales != (1.0,):  # then it has several sizes there
            return tuple(pixels.shape)
        return padded_size(self.model.detector, *pixels.shape[1:])

    def draw(self, pixels: Tensor, found: Mapping[str, Tensor]) -> Tensor:
        return drawing.draw(pixels, found, self.classes, self.max_boxes)

    def say(self, path: Path, text: str) -> None:
        self.console.print(escape(f"{path}: {text}"))


def run(arguments: argparse.Namespace) -> int:
    """Writes NAME.png and NAME.json for every image NAME.*, NAME.mp4 and NAME.json for every video.

    Returns:
        0, or 2 if the checkpoint, the folder, the device or any image or video cannot be used; the
        others are done nevertheless.
    """
    console = Console(highlight=False, soft_wrap=True)
    errors: list[Exception] = []

    def report(error: Exception) -> None:
        errors.append(error)
        fail(error)

    try:
        files, others = images.find(arguments.images)
        check_names(files)
        check_outputs(files, arguments.out, (".png", ".mp4", ".json"))
        videos = [path for path in files if path.suffix.lower() in VIDEOS]
        library = "dyhead_cuda.detection.video"
        reader = load(library, "video", arguments.parser) if videos else None
        device = parallel.choose_device(arguments.device)
        model, config = load_model(arguments.checkpoint, device)
        make_folder(arguments.out)
        detector = Detector(
            TestTimeAugmentation(model, arguments.scales, arguments.flip).eval(),
            config["classes"],
            arguments.threshold,
            arguments.max_boxes,
            arguments.batch_size,
            arguments.out,
            console,
        )
        _photographs(detector, [path for path in files if path not in set(videos)], report)
        for path in videos:
            assert reader is not None
            try:
                damage = _video(detector, reader, path)
            except reader.VideoError as error:
                damage = error
            if damage is not None:
                report(damage)
        if others:
            console.print(escape(images.skipped(others)))
    except (images.ImageError, RunError, ValueError, OSError, ImportError) as error:
        report(error)
    except (MemoryError, RuntimeError) as error:
        return fail_for_memory(error, "shrink the images or lower --batch-size")
    return 2 if errors else 0


def batches(items: Iterable[T], size: int, key: Callable[[T], Hashable]) -> Iterator[list[T]]:
    """Lists of up to ``size`` items of one key; few items are held back to fill them.

    Args:
        items: in their order, which is kept inside a list.
        size: of a list; the last of a key may be shorter.
        key: says which items go together.
    """
    waiting: dict[Hashable, list[T]] = {}
    for item in items:
        group = waiting.setdefault(key(item), [])
        group.append(item)
        if len(group) == size:
            yield waiting.pop(key(item))
        elif sum(map(len, waiting.values())) >= WAITING * size:
            yield waiting.pop(max(waiting, key=lambda name: len(waiting[name])))
    yield from waiting.values()


def _photographs(
    detector: Detector, paths: Iterable[Path], report: Callable[[Exception], None]
) -> None:
    def loaded() -> Iterator[tuple[Photograph, Tensor]]:
        for path in paths:
            try:
                image, name = images.load_photograph(path)
            except images.ImageError as error:
                report(error)
            else:
                yield Photograph(path, name, image), to_tensor(image)

    for batch in batches(loaded(), detector.batch_size, lambda item: detector.size(item[1])):
        results = detect(detector.model, [pixels for _, pixels in batch])
        for (photograph, pixels), everything in zip(batch, results, strict=True):
            _write(detector, photograph, pixels, everything)


def _write(
    detector: Detector, photograph: Photograph, pixels: Tensor, everything: Mapping[str, Tensor]
) -> None:
    found = above(everything, detector.threshold)
    picture = detector.out / f"{photograph.name}.png"
    drawing.save(detector.draw(pixels, found), picture)
    width, height = photograph.image.size
    facts: dict[str, Any] = {"file": str(photograph.path), "width": width, "height": height}
    facts |= {"detections": describe(found, detector.classes)}
    write_json(picture.with_suffix(".json"), facts)
    text = drawing.counted(found, detector.max_boxes)
    if len(found["labels"]) > detector.max_boxes:
        text += " (--max-boxes)"
    if not len(found["labels"]):
        text += nothing(everything["scores"].tolist(), detector.threshold)
    detector.say(picture, text)


def nothing(scores: Sequence[float], threshold: float) -> str:
    """What to do where no score is high enough.

    Args:
        scores: of everything that was detected.
        threshold: above all of them.
    """
    if not len(scores):
        return (
            f" above {threshold:g}, and the model proposes none with a lower score either; if it "
            "never does, train it for longer"
        )
    best = max(scores)
    shown, lower = _rounded_down(best, 10), _rounded_down(best, 2)
    return f" above {threshold:g}; the best has {shown:g}: try --threshold {lower:g}"


def _rounded_down(value: float, parts: int) -> float:
    """A number in 0..1 as its first digit that is not 0 and ``parts``-ths of its unit."""
    if value <= 0:
        return 0.0
    unit = 10.0 ** math.ceil(-math.log10(value)) * parts
    return math.floor(value * unit) / unit


def _video(detector: Detector, video: ModuleType, path: Path) -> Exception | None:
    """Frame by frame; of a damaged file as far as it can be read, and the error is returned."""
    frames: list[dict[str, Any]] = []
    scores: list[float] = []
    damage: list[Exception] = []

    def drawn(reader: Any) -> Iterator[Tensor]:
        try:
            for batch in batches(reader, detector.batch_size, lambda frame: frame.pixels.shape):
                images = [frame.pixels.float() / 255 for frame in batch]
                results = detect(detector.model, images)
                for frame, image, everything in zip(batch, images, results, strict=True):
                    scores.extend(everything["scores"].tolist())
                    found = above(everything, detector.threshold)
                    objects = describe(found, detector.classes)
                    frames.append({"frame": len(frames), "time": frame.time, "detections": objects})
                    yield detector.draw(image, found)
        except video.VideoError as error:
            if not frames:
                raise
            damage.append(error)

    target = detector.out / f"{path.stem}.mp4"
    with video.reading(path) as reader:
        video.write(target, drawn(reader), reader.rate)
    facts = {"file": str(path), "frames_per_second": float(reader.rate), "frames": frames}
    write_json(target.with_suffix(".json"), facts)
    count = sum(len(frame["detections"]) for frame in frames)
    text = f"{len(frames)} frames, {count} object" + "s" * (count != 1)
    detector.say(target, text if count else text + nothing(scores, detector.threshold))
    return damage[0] if damage else None
