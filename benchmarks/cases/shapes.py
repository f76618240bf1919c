"""The shapes that are measured: feature pyramids that detectors really run, each by a name."""

from __future__ import annotations

from dataclasses import dataclass

from dyhead_cuda.pyramid import halved

Size = tuple[int, int]


@dataclass(frozen=True)
class ShapeSet:
    """Level sizes (height, width), finest first, and the blocks that the head has there."""

    name: str
    origin: str
    levels: tuple[Size, ...]
    blocks: int
    channels: int = 256
    num_groups: int = 16

    @property
    def pixels(self) -> int:
        """Of all levels of one image."""
        return sum(height * width for height, width in self.levels)


def pyramid_of(height: int, width: int, levels: int) -> tuple[Size, ...]:
    """Each level half of the finer one, rounded up."""
    sizes = [(height, width)]
    while len(sizes) < levels:
        sizes.append(halved(sizes[-1]))
    return tuple(sizes)


SHAPE_SETS = {
    shapes.name: shapes
    for shapes in (
        ShapeSet("glip", "800x1344 image, padded to 32", pyramid_of(100, 168, 5), 6),
        ShapeSet("mmdet", "896x1408 image, padded to 128", pyramid_of(112, 176, 5), 6),
        ShapeSet("swin", "1280x2048 image, Swin-L", pyramid_of(160, 256, 5), 6),
        ShapeSet("masa", "2048x2048 image, MASA", pyramid_of(256, 256, 5), 6),
        ShapeSet("yolo", "640x640 image, YOLO", pyramid_of(80, 80, 3), 2),
        ShapeSet("tiny", "for --quick and tests", pyramid_of(12, 10, 3), 2, 32, 8),
    )
}

# Every implementation is compared with the reference at this size before real ones. Sizes are odd
# and the last level has very few pixels.
SMALL_LEVELS = pyramid_of(13, 10, 3)
SMALL_BATCH = 2
