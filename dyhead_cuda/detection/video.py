"""Video files, read and written frame by frame with PyAV.

Needs ``pip install 'dyhead_cuda[video]'``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import av
import numpy as np
import torch
from torch import Tensor

from dyhead_cuda.detection.files import write_atomically

_ENCODERS = ("libx264", "mpeg4")  # the first that PyAV was built with; players know both
_DEFAULT_RATE = Fraction(25)  # of files that name none, in frames per second


class VideoError(Exception):
    """A file that cannot be read as a video: what is wrong with it, in one line."""


class Frame(NamedTuple):
    """A picture of a video.

    Args:
        pixels: uint8 [3, H, W], RGB, upright.
        time: in seconds from the start of the file.
    """

    pixels: Tensor
    time: float


class Reader:
    """The pictures of an open video file; made by :func:`reading`.

    Attributes:
        rate: frames per second, on average.
    """

    def __init__(self, container: Any, path: Path) -> None:
        self._container, self._path = container, path
        if not container.streams.video:
            raise VideoError(f"expected a video, but {path} has no pictures, only sound or text")
        self._stream = container.streams.video[0]
        self.rate: Fraction = self._stream.average_rate or _DEFAULT_RATE

    def __iter__(self) -> Iterator[Frame]:
        """The frames.

        Raises:
            VideoError: a damaged file, at the place of the damage.
        """
        count = 0
        try:
            for frame in self._container.decode(self._stream):
                pixels = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
                time = float(count / self.rate) if frame.time is None else frame.time
                yield Frame(torch.from_numpy(pixels.copy()).permute(2, 0, 1), time)
                count += 1
            if not count:
                raise VideoError(f"expected a video, but {self._path} has no frames")
        except (av.FFmpegError, OSError) as error:
            raise VideoError(
                f"cannot read {self._path} after frame {count} (damaged?): {error}"
            ) from None


@contextmanager
def reading(path: Path) -> Iterator[Reader]:
    """Opens a video file.

    Raises:
        VideoError: no such file, no video, or damaged.
    """
    try:
        container = av.open(str(path))
    except FileNotFoundError:
        raise VideoError(f"expected a video file, but {path} does not exist") from None
    except (av.FFmpegError, OSError) as error:
        raise VideoError(f"cannot read {path} (no video, or damaged): {error}") from None
    with container:
        yield Reader(container, path)


def write(path: Path, pictures: Iterable[Tensor], rate: Fraction) -> None:
    """Writes an MP4 file, which gets its name when it is whole.

    Args:
        path: the file.
        pictures: uint8 [3, H, W] each, RGB, all of the first one's size, of which a last odd row
            or column is left out, as encoders take even sides only.
        rate: frames per second.

    Raises:
        WriteError: it could not be written.
    """
    write_atomically(path, lambda file: _encode(file, pictures, rate))


def _encode(file: BinaryIO, pictures: Iterable[Tensor], rate: Fraction) -> None:
    name = next(name for name in _ENCODERS if name in av.codecs_available)
    with av.open(file, "w", format="mp4") as container:
        stream: Any = None
        for pixels in pictures:
            height, width = (side // 2 * 2 for side in pixels.shape[1:])
            if stream is None:
                stream = container.add_stream(name, rate=rate)
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            rows = pixels[:, :height, :width].permute(1, 2, 0).contiguous().numpy()
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rows, format="rgb24")))
        if stream is not None:
            container.mux(stream.encode())  # what the encoder still holds
