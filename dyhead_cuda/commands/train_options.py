"""The options of ``python -m dyhead_cuda train``, and the settings that they stand for."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import Any, get_args

from dyhead_cuda.commands.options import integer, number
from dyhead_cuda.detection.data import DetectionDataset
from dyhead_cuda.detection.models.config import DETECTORS, TWO_STAGE, ModelConfig
from dyhead_cuda.detection.training.parallel import DEVICES
from dyhead_cuda.detection.training.recipe import Amp, DataConfig, Optimizer, Schedule, TrainConfig
from dyhead_cuda.modules import ATTENTIONS, Init
from dyhead_cuda.pyramid import HIGH_OFFSETS

COCO_SIZE, COCO_MAX_SIZE = 800, 1333
SCENE_SIZE = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``python -m dyhead_cuda train``."""
    parser.set_defaults(parser=parser)
    _add_data(parser.add_argument_group("data"))
    _add_model(parser.add_argument_group("model"))
    _add_training(parser.add_argument_group("training"))
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


def _add_data(group: Any) -> None:
    group.add_argument(
        "--data", default="digits", metavar="digits|FOLDER", help="a folder is in COCO's format"
    )
    group.add_argument("--strict", action="store_true", help="fail on any broken annotation")
    group.add_argument("--flip", action="store_true", help="mirror half of the training images")
    group.add_argument("--images", type=integer(1), metavar="N", help="digits: scenes of train")
    group.add_argument("--val-images", type=integer(1), metavar="N", help="digits: scenes of val")
    group.add_argument(
        "--scene-size", type=integer(32), metavar="PIXELS", help=f"digits: default {SCENE_SIZE}"
    )


def _add_model(group: Any) -> None:
    group.add_argument("--model", choices=DETECTORS, default="atss", help="default: %(default)s")
    group.add_argument("--blocks", type=integer(0), default=6, help="of the head; 0: no DyHead")
    group.add_argument(
        "--backbone", default="resnet50", help="torchvision's resnet*, swin_*, or timm/NAME"
    )
    group.add_argument("--weights", help="of the backbone: DEFAULT, or pretrained for timm")
    group.add_argument("--channels", type=integer(1), default=256, help="of the pyramid")
    group.add_argument(
        "--convs", type=integer(0), help="in each tower (default: 0 with a DyHead, 4 without)"
    )
    group.add_argument(
        "--levels",
        type=_levels,
        metavar="FIRST-LAST",
        help="of the pyramid (default, as published: 3-7; two-stage models: 2-6)",
    )
    group.add_argument(
        "--attentions",
        type=_attentions,
        default=ATTENTIONS,
        metavar="LIST",
        help=f"some of {','.join(ATTENTIONS)}, or none",
    )
    group.add_argument("--high-offset", choices=HIGH_OFFSETS, default="flat")
    group.add_argument(
        "--init", choices=get_args(Init), default="mmdet", help="of the head (default: mmdet)"
    )
    group.add_argument(
        "--size",
        type=integer(1),
        metavar="PIXELS",
        help=f"the shorter side in the model (default: {COCO_SIZE}; digits: the scene's size)",
    )
    group.add_argument(
        "--max-size",
        type=integer(1),
        metavar="PIXELS",
        help=f"the longer side at most (default: {COCO_MAX_SIZE}; digits: the scene's size)",
    )
    group.add_argument("--keypoints", action="store_true", help="two-stage models: predict them")


def _add_training(group: Any) -> None:
    usual = TrainConfig(1)
    length = group.add_mutually_exclusive_group()
    length.add_argument("--steps", type=integer(1), help="of the optimizer (default: 1000)")
    length.add_argument("--epochs", type=number(0.001), help="instead: passes over the images")
    group.add_argument(
        "--batch-size",
        type=integer(1),
        default=usual.batch_size,
        metavar="N",
        help="images per process (default: %(default)s)",
    )
    group.add_argument("--optimizer", choices=get_args(Optimizer), default=usual.optimizer)
    group.add_argument("--lr", type=number(1e-12), default=usual.lr, help="default: %(default)s")
    group.add_argument(
        "--offset-lr",
        type=number(0),
        default=usual.offset_lr,
        metavar="FACTOR",
        help="part of it for what predicts sampling offsets (default: %(default)s)",
    )
    group.add_argument("--schedule", choices=get_args(Schedule), default=usual.schedule)
    group.add_argument("--weight-decay", type=number(0), default=usual.weight_decay)
    group.add_argument("--warmup-steps", type=integer(0), default=usual.warmup_steps, metavar="N")
    group.add_argument(
        "--clip-norm", type=number(0), default=usual.clip_norm, help="of gradients; 0: no limit"
    )
    group.add_argument("--amp", choices=get_args(Amp), default=usual.amp)
    group.add_argument("--seed", type=integer(0), default=usual.seed)
    group.add_argument(
        "--eval-every", type=integer(1), metavar="STEPS", help="default: only at the end"
    )
    group.add_argument(
        "--checkpoint-every", type=integer(1), default=usual.checkpoint_every, metavar="STEPS"
    )
    group.add_argument("--workers", type=integer(0), default=usual.workers, help="load images")
    group.add_argument("--device", choices=DEVICES, default=usual.device)
    group.add_argument("--deterministic", action="store_true", help="refuse what varies on GPUs")


def _levels(text: str) -> tuple[int, int]:
    first, dash, last = text.partition("-")
    if not (dash and first.isdecimal() and last.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected two levels such as 3-7, got {text!r}")
    return int(first), int(last)


def _attentions(text: str) -> tuple[str, ...]:
    names = () if text == "none" else tuple(text.split(","))
    if not set(names) <= set(ATTENTIONS) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(
            f"expected some of {','.join(ATTENTIONS)} or none, got {text!r}"
        )
    return tuple(name for name in ATTENTIONS if name in names)


def data_config(arguments: argparse.Namespace) -> DataConfig:
    """The data that the options ask for.

    Raises:
        ValueError: options of digits with a folder, or of a folder with digits.
    """
    for_digits = {
        "--images": arguments.images,
        "--val-images": arguments.val_images,
        "--scene-size": arguments.scene_size,
    }
    given = [name for name, value in for_digits.items() if value is not None]
    if arguments.data != "digits":
        if given:
            raise ValueError(f"{', '.join(given)}: only for --data digits, got {arguments.data}")
        folder = str(Path(arguments.data).resolve())
        return DataConfig(folder, {"strict": arguments.strict}, flip=arguments.flip)
    if arguments.flip:
        raise ValueError("--flip: a mirrored digit is no digit; only for --data FOLDER")
    if arguments.strict:
        raise ValueError("--strict: digits have no broken annotations; only for --data FOLDER")
    side = arguments.scene_size or SCENE_SIZE
    options = {"size": [side, side], "keypoints": arguments.keypoints, "cache": True}
    train, val = (
        {} if count is None else {"num_images": count}
        for count in (arguments.images, arguments.val_images)
    )
    return DataConfig("digits", options, train, val)


def model_config(arguments: argparse.Namespace, dataset: DetectionDataset) -> ModelConfig:
    """The model that the options ask for, with the classes and keypoints of the data.

    Raises:
        ValueError: there is no such model, or the data have no keypoints.
    """
    if arguments.keypoints and not dataset.num_keypoints:
        raise ValueError(f"--keypoints: {arguments.data} has none")
    size, max_size = arguments.size, arguments.max_size
    usual = (COCO_SIZE, COCO_MAX_SIZE)
    if arguments.data == "digits":
        usual = (arguments.scene_size or SCENE_SIZE,) * 2
    size = usual[0] if size is None else size
    max_size = max(size, usual[1]) if max_size is None else max_size
    published = (2, 6) if arguments.model in TWO_STAGE else (3, 7)
    first_level, last_level = arguments.levels or published
    return ModelConfig(
        detector=arguments.model,
        num_classes=len(dataset.classes),
        backbone=arguments.backbone,
        weights=arguments.weights,
        first_level=first_level,
        last_level=last_level,
        channels=arguments.channels,
        blocks=arguments.blocks,
        convs=arguments.convs,
        attentions=arguments.attentions,
        high_offset=arguments.high_offset,
        init=arguments.init,
        min_size=size,
        max_size=max_size,
        keypoints=dataset.num_keypoints if arguments.keypoints else 0,
    )


def train_config(arguments: argparse.Namespace, images: int) -> TrainConfig:
    """How the options ask to train, on so many images.

    Raises:
        ValueError: a setting is out of its range.
    """
    steps = arguments.steps or 1000
    if arguments.epochs is not None:
        batch = arguments.batch_size * int(os.environ.get("WORLD_SIZE", 1))
        steps = math.ceil(arguments.epochs * images / batch)
    return TrainConfig(
        steps=steps,
        batch_size=arguments.batch_size,
        optimizer=arguments.optimizer,
        lr=arguments.lr,
        offset_lr=arguments.offset_lr,
        weight_decay=arguments.weight_decay,
        schedule=arguments.schedule,
        warmup_steps=arguments.warmup_steps,
        clip_norm=arguments.clip_norm or None,
        amp=arguments.amp,
        seed=arguments.seed,
        eval_every=arguments.eval_every,
        checkpoint_every=arguments.checkpoint_every,
        workers=arguments.workers,
        device=arguments.device,
        deterministic=arguments.deterministic,
    )
