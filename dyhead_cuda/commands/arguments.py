"""The options of every command.

``--help`` must work without the packages that a command needs, so nothing here imports them: names
to choose from come from :mod:`dyhead_cuda.detection.names` and the layer.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

from dyhead_cuda.commands import train_defaults, training_arguments
from dyhead_cuda.commands.options import (
    MAX_SIDE,
    attentions,
    blocks,
    image_size,
    integer,
    levels,
    number,
    point,
    scale_range,
    scales,
    side_range,
)
from dyhead_cuda.commands.training_arguments import MAX_BATCH, MAX_FACTOR, MAX_WORKERS
from dyhead_cuda.detection.names import (
    DETECTORS,
    DEVICES,
    SPLITS,
    Background,
    ExportFormat,
)
from dyhead_cuda.modules import ATTENTIONS, Init, WithoutTask
from dyhead_cuda.pyramid import HIGH_OFFSETS

DTYPES = ("float32", "float64", "float16", "bfloat16")  # of the demonstration
MIN_SIZE, MAX_SIZE = 64, 4096  # longer side of its photograph in pixels
DEFAULT_POINTS = 3  # that attend shows
MIN_OPSET, OPSET = (
    19,
    21,
)  # ONNX has DeformConv since 19, and normalises groups in one node since 21
COCO_SIZE, COCO_MAX_SIZE = 800, 1333
# Beyond these, options can only be mistakes: no memory or time is enough.
MAX_BLOCKS, MAX_CONVS, MAX_CHANNELS, MAX_STAGES = 100, 100, 8192, 100
MAX_SCENES = 10_000_000


def info(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``python -m dyhead_cuda info``."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def check(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``python -m dyhead_cuda check``."""
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="check this one alone (default: all there are)"
    )


def demo(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``python -m dyhead_cuda demo``."""
    parser.add_argument("--image", type=Path, help="a photograph (default: one of scikit-image's)")
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
        help="of the head (default: %(default)s)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    _add_device(parser)
    parser.add_argument("--seed", type=integer(0, 2**63 - 1), default=0, help="of all weights")
    parser.add_argument(
        "--output", type=Path, default=Path("demo_output"), help="directory (default: %(default)s)"
    )


def train(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``python -m dyhead_cuda train``."""
    _add_data(parser.add_argument_group("data"))
    _add_model(parser.add_argument_group("model"))
    training_arguments.add(parser.add_argument_group("training"))
    run = parser.add_argument_group("run")
    run.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="of the run; one that is there already is continued (default: runs/MODEL-DATA)",
    )
    run.add_argument("--restart", action="store_true", help="delete the run in that folder first")
    run.add_argument(
        "--pictures",
        type=integer(0),
        default=0,
        metavar="N",
        help="draw N scenes of val at the end",
    )
    run.add_argument("--tensorboard", action="store_true", help="write events for it, too")


def scenes(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``python -m dyhead_cuda scenes``."""
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="for train's --data FOLDER"
    )
    parser.add_argument(
        "--split", nargs="+", choices=SPLITS, default=SPLITS, help="write these only"
    )
    _add_scenes(parser)
    parser.add_argument("--keypoints", action="store_true", help="annotate each object's extremes")
    parser.add_argument("--seed", type=integer(0), default=0, help="default: %(default)s")


def evaluate(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``python -m dyhead_cuda eval``."""
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="a folder that train wrote, or a checkpoint in it"
    )
    parser.add_argument(
        "--data", metavar="FOLDER", help="in COCO's format, its val split (default: the run's)"
    )
    parser.add_argument(
        "--batch-size", type=integer(1, MAX_BATCH), default=8, help="default: %(default)s"
    )
    parser.add_argument("--workers", type=integer(0, MAX_WORKERS), default=0, help="load images")
    _add_views(parser)
    _add_device(parser)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write metrics and all detections there"
    )


def predict(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``python -m dyhead_cuda predict``."""
    _add_images(parser)
    parser.add_argument(
        "--threshold", type=number(0, 1), default=0.3, help="on scores (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("predictions"), help="folder (default: %(default)s)"
    )
    _add_views(parser)


def attend(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``python -m dyhead_cuda attend``."""
    _add_images(parser)
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
        "--out", type=Path, default=Path("attention"), help="folder (default: %(default)s)"
    )


def export(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``python -m dyhead_cuda export``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXPORTED
    parser.add_argument(
        "checkpoint", type=Path, metavar="RUN", help="a folder that train wrote, or a checkpoint"
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
    parser.add_argument("--opset", type=integer(MIN_OPSET), help=f"of onnx (default: {OPSET})")
    parser.add_argument(
        "--image",
        type=Path,
        metavar="PHOTO",
        help="compare file and detector on it (default: on random images)",
    )
    _add_device(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=".onnx or .pt2")


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


def _add_device(parser: Any) -> None:
    parser.add_argument("--device", choices=DEVICES, default="auto")


def _add_views(parser: argparse.ArgumentParser) -> None:
    """Adds the options of test-time augmentation."""
    parser.add_argument(
        "--scales",
        type=scales,
        default=(1.0,),
        metavar="LIST",
        help="see each image at these scales of the model's size and merge what is found, e.g. "
        "0.8,1,1.25 (default: 1)",
    )
    parser.add_argument("--flip", action="store_true", help="see its mirror image, too")


def _add_images(parser: argparse.ArgumentParser) -> None:
    """Adds the options of commands that run a trained detector on image files."""
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="RUN",
        help="a folder that train wrote, or a checkpoint in it",
    )
    _add_device(parser)


def _add_data(group: Any) -> None:
    group.add_argument(
        "--data",
        default="digits",
        metavar="digits|FOLDER",
        help="composed scenes, or a folder in COCO's format",
    )
    group.add_argument("--strict", action="store_true", help="fail on any broken annotation")
    group.add_argument("--flip", action="store_true", help="mirror half of the training images")
    sizes = group.add_mutually_exclusive_group()
    sizes.add_argument(
        "--multi-scale",
        type=side_range,
        metavar="LOW-HIGH",
        help="draw the shorter side of each training image, in pixels, e.g. 480-800",
    )
    sizes.add_argument(
        "--scale-jitter",
        type=scale_range,
        metavar="LOW-HIGH",
        help="large-scale jitter: draw a scale for each training image, e.g. 0.1-2, then crop or "
        "pad it to a square of --size",
    )
    _add_scenes(group, "scenes: ")


def _add_scenes(group: Any, only: str = "") -> None:
    """Adds the options of composed scenes; ``only`` says when they can be used."""
    group.add_argument(
        "--images",
        type=integer(1, MAX_SCENES),
        metavar="N",
        help=f"{only}how many for training (default: {train_defaults.DIGITS['images']})",
    )
    group.add_argument(
        "--val-images",
        type=integer(1, MAX_SCENES),
        metavar="N",
        help=f"{only}how many to measure on (default: {train_defaults.DIGITS['val_images']})",
    )
    group.add_argument(
        "--scene-size",
        type=integer(32, MAX_SIDE),
        metavar="PIXELS",
        help=f"{only}height and width (default: {train_defaults.DIGITS['scene_size']}; "
        f"{train_defaults.LARGE_SCENE_SIZE} with --objects or on photographs)",
    )
    group.add_argument(
        "--objects",
        metavar="FOLDER",
        help=f"{only}instead of digits the transparent PNG or WebP pictures in FOLDER; each "
        "sub-folder is a class, or else each file",
    )
    group.add_argument(
        "--background",
        choices=get_args(Background),
        help=f"{only}what is behind the objects (default: paper; with --objects photographs, which "
        "ship with scikit-image and scikit-learn)",
    )
    group.add_argument(
        "--max-angle",
        type=number(0, 180),
        metavar="DEGREES",
        help=f"{only}turn objects by up to so much (default: 15, at most 45; with --objects 30, at "
        "most 180)",
    )


def _add_model(group: Any) -> None:
    # No defaults here: what is not given comes from --start-from, or from ModelConfig.
    group.add_argument(
        "--start-from",
        metavar="RUN|FILE",
        help="a trained detector, also of other classes: a run of train, a checkpoint of ATSS of "
        "mmdet or microsoft/DynamicHead, or a state dict; its settings are the defaults of these "
        "options",
    )
    group.add_argument("--model", choices=DETECTORS, help="the kind of detector (default: atss)")
    group.add_argument(
        "--blocks",
        type=integer(0, MAX_BLOCKS),
        help=f"of the head; 0: no DyHead ({train_defaults.stated('blocks')})",
    )
    group.add_argument(
        "--backbone",
        help="torchvision's resnet*, swin_*, efficientnet_lite0, or timm/NAME "
        f"({train_defaults.stated('backbone')})",
    )
    group.add_argument(
        "--weights",
        metavar="NAME|FILE",
        help="of the backbone: DEFAULT, pretrained for timm, or a .pth, .pt or .safetensors file "
        "(default: random ones)",
    )
    group.add_argument(
        "--frozen-stages",
        type=integer(0, MAX_STAGES),
        metavar="N",
        help="keep the first N stages of the backbone as they are (default: 0)",
    )
    group.add_argument(
        "--backbone-last-level",
        type=integer(1),
        metavar="LEVEL",
        help="the coarsest level that the backbone makes; without its later stages a detector is "
        "smaller (default: all that it has)",
    )
    group.add_argument(
        "--channels",
        type=integer(1, MAX_CHANNELS),
        help=f"of the pyramid ({train_defaults.stated('channels')})",
    )
    group.add_argument(
        "--convs",
        type=integer(0, MAX_CONVS),
        help="in each tower (default, as published: 0 with a DyHead, 4 without and for retinanet)",
    )
    group.add_argument(
        "--shared-tower",
        action="store_true",
        default=None,
        help="atss: one tower for classes and boxes (default: one for each)",
    )
    group.add_argument(
        "--anchor-scale",
        type=number(0.01, MAX_FACTOR),
        metavar="STRIDES",
        help="side of the smallest anchors (default, as published: 4 for retinanet, else 8)",
    )
    group.add_argument(
        "--levels",
        type=levels,
        metavar="FIRST-LAST",
        help="of the pyramid (default: 3-7, for digits 3-6, of two-stage models 2-6)",
    )
    group.add_argument(
        "--attentions",
        type=attentions,
        metavar="LIST",
        help=f"some of {','.join(ATTENTIONS)}, or none (default: all)",
    )
    group.add_argument(
        "--without-task",
        choices=get_args(WithoutTask),
        help="in place of a task attention that is left out (default: identity)",
    )
    group.add_argument("--high-offset", choices=HIGH_OFFSETS, help="default: flat")
    group.add_argument("--init", choices=get_args(Init), help="of the head (default: mmdet)")
    group.add_argument(
        "--size",
        type=integer(1, MAX_SIDE),
        metavar="PIXELS",
        help=f"the shorter side in the model (default: {COCO_SIZE}; digits: the scene's size)",
    )
    group.add_argument(
        "--max-size",
        type=integer(1, MAX_SIDE),
        metavar="PIXELS",
        help=f"the longer side at most (default: {COCO_MAX_SIZE}; digits: the scene's size)",
    )
    group.add_argument("--keypoints", action="store_true", help="two-stage models: predict them")
