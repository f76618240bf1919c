"""The options of the commands, other than those of :mod:`train_arguments` and of
:mod:`detector_arguments`.

``--help`` must work without the packages that a command needs, so nothing here imports them: names
to choose from come from :mod:`dyhead_cuda.detection.names` and the layer.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dyhead_cuda.commands.options import integer, run_or_file, scales
from dyhead_cuda.detection.names import DEVICES, SHIPPED, SUFFIX

DTYPES = ("float32", "float64", "float16", "bfloat16")  # of the demonstration
MIN_SIZE, MAX_SIZE = 64, 4096  # longer side of its photograph in pixels
# Beyond these, options can only be mistakes: no memory or time is enough.
MAX_BLOCKS, MAX_BATCH, MAX_WORKERS = 100, 4096, 512


def info(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``python -m dyhead_cuda info``."""
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")


def check(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``python -m dyhead_cuda check``."""
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="check this one alone (default: all there are)"
    )


def demo(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``python -m dyhead_cuda demo``."""
    parser.add_argument(
        "--image", type=Path, help="the photograph to run it on (default: one of scikit-image's)"
    )
    parser.add_argument(
        "--size",
        type=integer(MIN_SIZE, MAX_SIZE),
        default=800,
        help="its longer side in pixels, to which it is resized (default: %(default)s)",
    )
    parser.add_argument(
        "--blocks",
        type=integer(1, MAX_BLOCKS),
        default=6,
        help="of the head, one after the other (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="type of weights and features (default: %(default)s)",
    )
    add_device(parser)
    parser.add_argument(
        "--seed",
        type=integer(0, 2**63 - 1),
        default=0,
        help="of the random weights (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("demo_output"),
        help="folder of the picture and the numbers (default: %(default)s)",
    )


def evaluate(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``python -m dyhead_cuda eval``."""
    parser.add_argument(
        "run",
        type=run_or_file,
        metavar="RUN",
        help=f"a folder that train wrote, a checkpoint in it, a {SUFFIX} file, or {SHIPPED}, the "
        "detector that comes with the package",
    )
    parser.add_argument(
        "--data",
        metavar="FOLDER",
        help="images and annotations in COCO's format (default: what the run was trained on)",
    )
    parser.add_argument(
        "--split",
        default="val",
        metavar="NAME",
        help="the part of the data to measure on: val, train, or any other name that the folder "
        "has annotations of, such as test (default: %(default)s)",
    )
    parser.add_argument(
        "--annotations",
        type=Path,
        metavar="FILE",
        help="annotations in COCO's format, where --data FOLDER keeps them under another name "
        "than the usual (default: looked for in the folder)",
    )
    parser.add_argument(
        "--images-folder",
        type=Path,
        metavar="FOLDER",
        help="that the file names in the annotations count from (default: looked for in --data)",
    )
    parser.add_argument(
        "--batch-size",
        type=integer(1, MAX_BATCH),
        default=8,
        metavar="N",
        help="images that go through the model at once (default: %(default)s)",
    )
    add_workers(parser, 0)
    add_views(parser)
    add_device(parser)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write metrics and all detections to this file"
    )


def add_device(parser: Any) -> None:
    """Adds ``--device``."""
    parser.add_argument(
        "--device",
        choices=DEVICES,
        default="auto",
        help="where it runs; auto: on a GPU if there is one (default: %(default)s)",
    )


def add_workers(parser: Any, default: int) -> None:
    parser.add_argument(
        "--workers",
        type=integer(0, MAX_WORKERS),
        default=default,
        metavar="N",
        help="processes that load images while the model computes; 0: none of their own "
        "(default: %(default)s)",
    )


def add_views(parser: argparse.ArgumentParser) -> None:
    """Adds the options of test-time augmentation."""
    parser.add_argument(
        "--scales",
        type=scales,
        default=(1.0,),
        metavar="LIST",
        help="see each image at these scales of the model's size and merge what is found, e.g. "
        "0.8,1,1.25 (default: 1)",
    )
    parser.add_argument("--flip", action="store_true", help="see the mirror image of each, too")
