"""The options of the commands that use a trained detector: predict, attend, export."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from dyhead_cuda.commands.arguments import MAX_BATCH, add_device, add_views
from dyhead_cuda.commands.options import blocks, image_size, integer, number, point, run_or_file
from dyhead_cuda.detection.names import SHIPPED, SUFFIX, ExportFormat

DEFAULT_POINTS = 3  # that attend shows
# ONNX has DeformConv since 19, and normalises groups in one node since 21.
MIN_OPSET, OPSET = 19, 21


def predict(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``python -m dyhead_cuda predict``."""
    _add_images(parser, "images, videos (.mp4 and others), and folders of images")
    parser.add_argument(
        "--threshold",
        type=number(0, 1),
        default=0.3,
        metavar="SCORE",
        help="the lowest score of what is kept; models themselves drop what is below 0.05 or so "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        type=integer(1, MAX_BATCH),
        default=1,
        metavar="N",
        help="images of one size in the model that go through it at once, which is quicker on "
        "GPUs (default: %(default)s)",
    )
    parser.add_argument(
        "--max-boxes",
        type=integer(0),
        default=30,
        metavar="N",
        help="draw the best N objects of an image; all are in its JSON file (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("predictions"),
        metavar="FOLDER",
        help="folder of the drawings and JSON files (default: %(default)s)",
    )
    add_views(parser)


def attend(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``python -m dyhead_cuda attend``."""
    _add_images(parser, "images, and folders of images")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--box",
        nargs="+",
        type=integer(0),
        metavar="INDEX",
        help="show the centres of these detections; 0 has the best score (default: the best "
        f"{DEFAULT_POINTS} of different objects)",
    )
    where.add_argument(
        "--points",
        nargs="+",
        type=point,
        metavar="X,Y[,LEVEL]",
        help="show these places, in pixels of the image, e.g. 120,80 or 120,80,P4; without a level "
        "that of the smallest detection around it, or else the finest",
    )
    parser.add_argument(
        "--blocks",
        type=blocks,
        default=None,
        metavar="all|I,J,...",
        help="the blocks to draw, from 1 (default: all)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("attention"),
        metavar="FOLDER",
        help="folder of the pictures and JSON files (default: %(default)s)",
    )


def export(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``python -m dyhead_cuda export``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXPORTED
    parser.add_argument(
        "checkpoint",
        type=run_or_file,
        metavar="RUN",
        help=f"a folder that train wrote, a checkpoint in it, a {SUFFIX} file, or {SHIPPED}",
    )
    parser.add_argument(
        "--format",
        choices=get_args(ExportFormat),
        required=True,
        help="onnx: standard ONNX, nothing of this package needed to run it (extra: export); pt2: "
        "torch.export, needs PyTorch and this package's operators; aoti: the same compiled by "
        "AOTInductor, which takes a C++ compiler and some minutes",
    )
    parser.add_argument(
        "--size",
        type=image_size,
        required=True,
        metavar="HxW|dynamic",
        help="of the images that the file takes, in pixels, e.g. 800x1088; dynamic: any height and "
        "width that the pyramid divides",
    )
    parser.add_argument(
        "--raw",
        action="store_true",
        help="one-stage detectors: predictions before decoding and non-maximum suppression, for "
        "any number of images",
    )
    parser.add_argument(
        "--opset", type=integer(MIN_OPSET), help=f"version of ONNX's operators (default: {OPSET})"
    )
    parser.add_argument(
        "--image",
        type=Path,
        metavar="PHOTO",
        help="compare file and detector on it (default: on random images)",
    )
    add_device(parser)
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="the file to write, whose name ends in .onnx or .pt2",
    )


_EXPORTED = """\
input:
  images [1, 3, H, W] float32, RGB in 0..1. Normalisation, and for a fixed size padding, are inside
  the file; resizing is not. With --raw [n, 3, H, W].
outputs, for n detections, best first, after non-maximum suppression:
  boxes [n, 4] float32    x1, y1, x2, y2 in pixels of the input
  scores [n] float32
  labels [n] int64        from 1; the names are in the file as "classes"
outputs with --raw, for A anchors of all levels, finest first:
  logits [n, A, classes], deltas [n, A, 4], centerness [n, A] (not retinanet), anchors [A, 4]

The file is loaded and compared with the detector before it gets its name.
"""


def _add_images(parser: argparse.ArgumentParser, kinds: str) -> None:
    """Adds the options of commands that run a trained detector on files of some kinds."""
    parser.add_argument("images", nargs="+", type=Path, metavar="FILE", help=kinds)
    parser.add_argument(
        "--checkpoint",
        type=run_or_file,
        default=SHIPPED,
        metavar="RUN",
        help=f"a folder that train wrote, a checkpoint in it, a {SUFFIX} file, or {SHIPPED}, the "
        "detector of handwritten digits that comes with the package (default: %(default)s)",
    )
    add_device(parser)
