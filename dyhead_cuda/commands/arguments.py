"""The options of the commands up to a trained detector; :mod:`detector_arguments` has the others.

``--help`` must work without the packages that a command needs, so nothing here imports them: names
to choose from come from :mod:`dyhead_cuda.detection.names` and the layer.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

from dyhead_cuda.commands.options import (
    MAX_SIDE,
    attentions,
    integer,
    levels,
    number,
)
from dyhead_cuda.detection.names import (
    DETECTORS,
    DEVICES,
    SPLITS,
    Amp,
    Optimizer,
    Schedule,
)
from dyhead_cuda.detection.training.config import TrainConfig
from dyhead_cuda.modules import ATTENTIONS, Init
from dyhead_cuda.pyramid import HIGH_OFFSETS

DTYPES = ("float32", "float64", "float16", "bfloat16")  # of the demonstration
MIN_SIZE, MAX_SIZE = 64, 4096  # longer side of its photograph in pixels
COCO_SIZE, COCO_MAX_SIZE = 800, 1333
SCENE_SIZE = 128
# Beyond these, options can only be mistakes: no memory or time is enough.
MAX_BLOCKS, MAX_CONVS, MAX_CHANNELS = 100, 100, 8192
MAX_BATCH, MAX_WORKERS, MAX_SCENES, MAX_EPOCHS = 4096, 512, 10_000_000, 1_000_000
MAX_RATE, MAX_FACTOR = 1e30, 1e6  # together within float32
_USUAL = TrainConfig(1)  # for the defaults


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


def train(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``python -m dyhead_cuda train``."""
    _add_data(parser.add_argument_group("data"))
    _add_model(parser.add_argument_group("model"))
    _add_training(parser.add_argument_group("training"))
    run = parser.add_argument_group("run")
    run.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="folder of the run; one that is there already is continued (default: runs/MODEL-DATA)",
    )
    run.add_argument("--restart", action="store_true", help="delete the run that is in --out first")
    run.add_argument(
        "--pictures",
        type=integer(0),
        default=0,
        metavar="N",
        help="draw the first N images of val at the end, with what is annotated and what is found "
        "(default: %(default)s)",
    )
    run.add_argument("--tensorboard", action="store_true", help="write events for TensorBoard, too")


def evaluate(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``python -m dyhead_cuda eval``."""
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="a folder that train wrote, or a checkpoint in it"
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
    _add_workers(parser, 0)
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


def _add_workers(parser: Any, default: int) -> None:
    parser.add_argument(
        "--workers",
        type=integer(0, MAX_WORKERS),
        default=default,
        metavar="N",
        help="processes that load images while the model computes; 0: none of their own "
        "(default: %(default)s)",
    )


def _add_data(group: Any) -> None:
    group.add_argument(
        "--data",
        default="digits",
        metavar="digits|FOLDER",
        help="scenes of handwritten digits, made on the fly, or a folder in COCO's format "
        "(default: %(default)s)",
    )
    for split in SPLITS:
        group.add_argument(
            f"--{split}-annotations",
            type=Path,
            metavar="FILE",
            help=f"FOLDER: the annotations of {split} (default: looked for in the folder)",
        )
        group.add_argument(
            f"--{split}-images-folder",
            type=Path,
            metavar="FOLDER",
            help=f"FOLDER: what the file names in the annotations of {split} count from (default: "
            "looked for in the folder)",
        )
    group.add_argument(
        "--strict",
        action="store_true",
        help="fail on any broken image or annotation, which else is left out and named",
    )
    group.add_argument(
        "--flip", action="store_true", help="mirror half of the training images, at random"
    )
    group.add_argument(
        "--images",
        type=integer(1, MAX_SCENES),
        metavar="N",
        help="digits: how many scenes to train on (default: 2000)",
    )
    group.add_argument(
        "--val-images",
        type=integer(1, MAX_SCENES),
        metavar="N",
        help="digits: how many scenes to measure on (default: 400)",
    )
    group.add_argument(
        "--scene-size",
        type=integer(32, MAX_SIDE),
        metavar="PIXELS",
        help=f"digits: side of the square scenes (default: {SCENE_SIZE})",
    )


def _add_model(group: Any) -> None:
    group.add_argument(
        "--model",
        choices=DETECTORS,
        default="atss",
        help="the kind of detector (default: %(default)s)",
    )
    group.add_argument(
        "--blocks",
        type=integer(0, MAX_BLOCKS),
        default=6,
        metavar="N",
        help="blocks of the Dynamic Head; 0: a detector without it (default: %(default)s)",
    )
    group.add_argument(
        "--backbone",
        default="resnet50",
        metavar="NAME",
        help="torchvision's resnet* or swin_*, or timm/NAME (default: %(default)s)",
    )
    group.add_argument(
        "--weights",
        metavar="NAME",
        help="of the backbone, to download: DEFAULT for torchvision's, pretrained for timm's "
        "(default: random weights)",
    )
    group.add_argument(
        "--channels",
        type=integer(1, MAX_CHANNELS),
        default=256,
        metavar="N",
        help="channels of the pyramid and the head (default: %(default)s)",
    )
    group.add_argument(
        "--convs",
        type=integer(0, MAX_CONVS),
        metavar="N",
        help="convolutions before each predictor (default: 0 with a Dynamic Head, 4 without)",
    )
    group.add_argument(
        "--levels",
        type=levels,
        metavar="FIRST-LAST",
        help="levels of the pyramid; level L has stride 2^L (default, as published: 3-7; two-stage "
        "models: 2-6)",
    )
    group.add_argument(
        "--attentions",
        type=attentions,
        default=ATTENTIONS,
        metavar="LIST",
        help=f"which attentions the head has: some of {','.join(ATTENTIONS)}, or none (default: "
        "all)",
    )
    group.add_argument(
        "--high-offset",
        choices=HIGH_OFFSETS,
        default="flat",
        help="how offsets are read for the coarser level; flat is as published (default: "
        "%(default)s)",
    )
    group.add_argument(
        "--init",
        choices=get_args(Init),
        default="mmdet",
        help="whose first weights the head has (default: %(default)s)",
    )
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
    group.add_argument(
        "--keypoints",
        action="store_true",
        help="two-stage models: predict the keypoints of the data, too",
    )


def _add_training(group: Any) -> None:
    length = group.add_mutually_exclusive_group()
    length.add_argument(
        "--steps", type=integer(1), help="how many steps of the optimizer (default: 1000)"
    )
    length.add_argument(
        "--epochs",
        type=number(0.001, MAX_EPOCHS),
        help="passes over the training images, instead of --steps",
    )
    group.add_argument(
        "--batch-size",
        type=integer(1, MAX_BATCH),
        default=_USUAL.batch_size,
        metavar="N",
        help="images per process (default: %(default)s)",
    )
    group.add_argument(
        "--optimizer",
        choices=get_args(Optimizer),
        default=_USUAL.optimizer,
        help="adamw, or sgd with momentum (default: %(default)s)",
    )
    group.add_argument(
        "--lr",
        type=number(1e-12, MAX_RATE),
        default=_USUAL.lr,
        help="the highest learning rate (default: %(default)s)",
    )
    group.add_argument(
        "--offset-lr",
        type=number(0, MAX_FACTOR),
        default=_USUAL.offset_lr,
        metavar="FACTOR",
        help="part of it for what predicts sampling offsets (default: %(default)s)",
    )
    group.add_argument(
        "--schedule",
        choices=get_args(Schedule),
        default=_USUAL.schedule,
        help="of the learning rate after the warmup (default: %(default)s)",
    )
    group.add_argument(
        "--weight-decay",
        type=number(0, MAX_RATE),
        default=_USUAL.weight_decay,
        help="of weights, not of biases and norms (default: %(default)s)",
    )
    group.add_argument(
        "--warmup-steps",
        type=integer(0),
        default=_USUAL.warmup_steps,
        metavar="N",
        help="steps in which the learning rate grows (default: %(default)s)",
    )
    group.add_argument(
        "--clip-norm",
        type=number(0),
        default=_USUAL.clip_norm,
        help="largest norm of the gradients; 0: no limit (default: %(default)s)",
    )
    group.add_argument(
        "--amp",
        choices=get_args(Amp),
        default=_USUAL.amp,
        help="autocast to 16 bits, or off (default: %(default)s)",
    )
    group.add_argument(
        "--seed",
        type=integer(0),
        default=_USUAL.seed,
        help="of weights and of the order of images (default: %(default)s)",
    )
    group.add_argument(
        "--eval-every",
        type=integer(1),
        metavar="STEPS",
        help="steps between evaluations (default: only at the end)",
    )
    group.add_argument(
        "--checkpoint-every",
        type=integer(1),
        default=_USUAL.checkpoint_every,
        metavar="STEPS",
        help="steps between checkpoints (default: %(default)s)",
    )
    _add_workers(group, _USUAL.workers)
    add_device(group)
    group.add_argument(
        "--deterministic", action="store_true", help="refuse operations that vary on GPUs"
    )
