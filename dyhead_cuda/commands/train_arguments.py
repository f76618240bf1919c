"""The options of the commands that train and that write scenes to train on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

from dyhead_cuda.commands import train_defaults
from dyhead_cuda.commands.arguments import MAX_BATCH, MAX_BLOCKS, add_device, add_workers
from dyhead_cuda.commands.options import (
    MAX_SIDE,
    attentions,
    integer,
    levels,
    number,
    scale_range,
    side_range,
)
from dyhead_cuda.detection.names import (
    DETECTORS,
    SHIPPED,
    SPLITS,
    SUFFIX,
    Amp,
    Background,
    Optimizer,
    Schedule,
)
from dyhead_cuda.detection.training.config import TrainConfig
from dyhead_cuda.modules import ATTENTIONS, Init, WithoutTask
from dyhead_cuda.pyramid import HIGH_OFFSETS

COCO_SIZE, COCO_MAX_SIZE = 800, 1333
# Beyond these, options can only be mistakes: no memory or time is enough.
MAX_CONVS, MAX_CHANNELS, MAX_STAGES = 100, 8192, 100
MAX_SCENES, MAX_EPOCHS = 10_000_000, 1_000_000
MAX_RATE, MAX_FACTOR = 1e30, 1e6  # together within float32
MAX_EMA = 0.999999
_USUAL = TrainConfig(1)  # for the defaults


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


def scenes(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``python -m dyhead_cuda scenes``."""
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="what it writes, for --data FOLDER of train",
    )
    parser.add_argument(
        "--split",
        nargs="+",
        choices=SPLITS,
        default=SPLITS,
        help="write these alone (default: train val)",
    )
    _add_scenes(parser)
    parser.add_argument("--keypoints", action="store_true", help="annotate each object's extremes")
    parser.add_argument(
        "--seed", type=integer(0), default=0, help="of all that is drawn (default: %(default)s)"
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
        help=f"a trained detector, also of other classes: a run of train, a {SUFFIX} file, "
        f"{SHIPPED} (which comes with the package), a checkpoint of ATSS of mmdet or "
        "microsoft/DynamicHead, or a state dict; its settings are the defaults of these options "
        "(default: nothing)",
    )
    group.add_argument("--model", choices=DETECTORS, help="the kind of detector (default: atss)")
    group.add_argument(
        "--blocks",
        type=integer(0, MAX_BLOCKS),
        metavar="N",
        help="blocks of the Dynamic Head; 0: a detector without it "
        f"({train_defaults.stated('blocks')})",
    )
    group.add_argument(
        "--backbone",
        metavar="NAME",
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
        metavar="N",
        help=f"channels of the pyramid and the head ({train_defaults.stated('channels')})",
    )
    group.add_argument(
        "--convs",
        type=integer(0, MAX_CONVS),
        metavar="N",
        help="convolutions before each predictor (default, as published: 0 with a Dynamic Head, 4 "
        "without and for retinanet)",
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
        help="levels of the pyramid; level L has stride 2^L (default: 3-7, for digits 3-6, of "
        "two-stage models 2-6)",
    )
    group.add_argument(
        "--attentions",
        type=attentions,
        metavar="LIST",
        help=f"which attentions the head has: some of {','.join(ATTENTIONS)}, or none (default: "
        "all)",
    )
    group.add_argument(
        "--without-task",
        choices=get_args(WithoutTask),
        help="in place of a task attention that is left out (default: identity)",
    )
    group.add_argument(
        "--high-offset",
        choices=HIGH_OFFSETS,
        help="how offsets are read for the coarser level; flat is as published (default: flat)",
    )
    group.add_argument(
        "--init",
        choices=get_args(Init),
        help="what the head's weights start from; many blocks learn fastest from local (default: "
        "mmdet)",
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
        "--steps",
        type=integer(1),
        metavar="N",
        help="steps of the optimizer in all; a run that is there can be given more "
        f"({train_defaults.stated('steps')})",
    )
    length.add_argument(
        "--epochs",
        type=number(0.001, MAX_EPOCHS),
        metavar="N",
        help="in place of --steps: so many passes over the images (default: as --steps says)",
    )
    group.add_argument(
        "--batch-size",
        type=integer(1, MAX_BATCH),
        default=_USUAL.batch_size,
        metavar="N",
        help="images per step and process (default: %(default)s)",
    )
    group.add_argument(
        "--optimizer",
        choices=get_args(Optimizer),
        default=_USUAL.optimizer,
        help="sgd has a momentum of 0.9 (default: %(default)s)",
    )
    group.add_argument(
        "--lr",
        type=number(1e-12, MAX_RATE),
        metavar="RATE",
        help=f"the highest learning rate ({train_defaults.stated('lr')})",
    )
    group.add_argument(
        "--offset-lr",
        type=number(0, MAX_FACTOR),
        default=_USUAL.offset_lr,
        metavar="FACTOR",
        help="factor on the learning rate of the convolutions that predict where the head samples "
        "its maps (default: %(default)s)",
    )
    group.add_argument(
        "--body-lr",
        type=number(0, MAX_FACTOR),
        default=_USUAL.body_lr,
        metavar="FACTOR",
        help="factor on the learning rate of the backbone; 0.1 is usual where it has pretrained "
        "weights (default: %(default)s)",
    )
    group.add_argument(
        "--schedule",
        choices=get_args(Schedule),
        default=_USUAL.schedule,
        help="how the learning rate falls after the warmup: cosine, to 0 at the last step, or "
        "step, to a tenth after 8/12 and 11/12 of the steps (default: %(default)s)",
    )
    group.add_argument(
        "--weight-decay",
        type=number(0, MAX_RATE),
        default=_USUAL.weight_decay,
        metavar="RATE",
        help="of weights; biases and normalisations have none (default: %(default)s)",
    )
    group.add_argument(
        "--warmup-steps",
        type=integer(0),
        default=_USUAL.warmup_steps,
        metavar="N",
        help="first steps, in which the learning rate grows from almost 0 (default: %(default)s)",
    )
    group.add_argument(
        "--clip-norm",
        type=number(0),
        default=_USUAL.clip_norm,
        metavar="NORM",
        help="gradients with a larger L2 norm are scaled down to it; 0: never "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--amp",
        choices=get_args(Amp),
        default=_USUAL.amp,
        help="mixed precision: compute in 16 bits where that is safe (default: %(default)s)",
    )
    group.add_argument(
        "--ema",
        type=number(0, MAX_EMA),
        default=_USUAL.ema,
        metavar="DECAY",
        help="measure and keep as the best an exponential moving average of the weights; 0.9998 "
        "is usual for long runs, 0: the weights themselves (default: %(default)s)",
    )
    group.add_argument(
        "--seed",
        type=integer(0),
        default=_USUAL.seed,
        metavar="N",
        help="of the first weights and of the order of the images (default: %(default)s)",
    )
    group.add_argument(
        "--eval-every",
        type=integer(1),
        metavar="STEPS",
        help="steps between measurements on val; there is always one after the last step (default: "
        f"for digits a tenth of the steps, at least {train_defaults.MIN_EVAL_EVERY}; for a folder "
        "only after the last step)",
    )
    group.add_argument(
        "--checkpoint-every",
        type=integer(1),
        default=_USUAL.checkpoint_every,
        metavar="STEPS",
        help="steps between checkpoints, from which a stopped run goes on (default: %(default)s)",
    )
    add_workers(group, _USUAL.workers)
    add_device(group)
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="stop with an error at operations whose result varies from run to run, as some do on "
        "GPUs (default: run them)",
    )
