"""The settings that the options of ``python -m dyhead_cuda train`` stand for."""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import replace
from typing import Any

from dyhead_cuda.commands import train_defaults
from dyhead_cuda.commands.train_arguments import COCO_MAX_SIZE, COCO_SIZE
from dyhead_cuda.commands.train_defaults import chosen
from dyhead_cuda.detection.data import DataConfig, DetectionDataset
from dyhead_cuda.detection.models.backbone_weights import is_file
from dyhead_cuda.detection.models.config import ModelConfig
from dyhead_cuda.detection.models.starting import Start, continued, read_start
from dyhead_cuda.detection.names import SHIPPED, SPLITS
from dyhead_cuda.detection.training.config import TrainConfig

# Options of a folder's split, without its name, by the parameters of CocoFolder.
PLACES = {"annotations": "annotations", "images": "images-folder"}


def _places(arguments: argparse.Namespace, split: str) -> dict[str, str]:
    """Where the options say that a folder keeps a split."""
    given = {
        name: getattr(arguments, f"{split}-{option}".replace("-", "_"))
        for name, option in PLACES.items()
    }
    return {name: os.path.realpath(path) for name, path in given.items() if path is not None}


def start(arguments: argparse.Namespace) -> Start | None:
    """The detector that the options start from.

    Raises:
        ValueError, RunError: it cannot be read.
    """
    if arguments.start_from is None:
        return None
    if arguments.weights is not None:
        raise ValueError(
            f"--weights {arguments.weights}: the backbone's weights come from --start-from; leave "
            "one of the two out"
        )
    source = arguments.start_from
    if source != SHIPPED:
        source = os.path.realpath(source)
    kept = None
    if arguments.out is not None and not arguments.restart:
        kept = continued(arguments.out, source)
    return kept or read_start(source)


def data_config(arguments: argparse.Namespace, base: ModelConfig | None = None) -> DataConfig:
    """The data that the options ask for.

    Args:
        arguments: the options.
        base: the settings of the detector that the training starts from.

    Raises:
        ValueError: options of scenes with a folder, or of a folder with scenes.
    """
    augmented: dict[str, Any] = {"flip": arguments.flip, "multi_scale": arguments.multi_scale}
    if arguments.scale_jitter is not None:
        side, _ = _sizes(arguments, base)
        augmented |= {"scale_jitter": arguments.scale_jitter, "jitter_size": side}
    for_digits = {
        "--images": arguments.images,
        "--val-images": arguments.val_images,
        "--scene-size": arguments.scene_size,
        "--objects": arguments.objects,
        "--background": arguments.background,
        "--max-angle": arguments.max_angle,
    }
    given = [name for name, value in for_digits.items() if value is not None]
    places: dict[str, Any] = {split: _places(arguments, split) for split in SPLITS}
    if arguments.data != "digits":
        if given:
            raise ValueError(f"{', '.join(given)}: only for --data digits, got {arguments.data}")
        folder = os.path.realpath(arguments.data)  # resolve() raises where links are a circle
        return DataConfig(folder, {"strict": arguments.strict}, **places, **augmented)
    for split, found in places.items():
        if found:
            names = ", ".join(f"--{split}-{PLACES[name]}" for name in found)
            raise ValueError(f"{names}: scenes have no files; only for --data FOLDER")
    if arguments.flip and arguments.objects is None:
        raise ValueError("--flip: a mirrored digit is no digit; only for --data FOLDER, --objects")
    if arguments.strict:
        raise ValueError("--strict: scenes have no broken annotations; only for --data FOLDER")
    return replace(scenes_config(arguments, cache=True), **augmented)


def scenes_config(arguments: argparse.Namespace, **more: Any) -> DataConfig:
    """The composed scenes that the options ask for.

    Args:
        arguments: the options.
        more: options of both splits.
    """
    side = train_defaults.scene_size(arguments)
    options = {"size": [side, side], "keypoints": arguments.keypoints, **more}
    for name in ("background", "max_angle"):
        if getattr(arguments, name) is not None:
            options[name] = getattr(arguments, name)
    train, val = (
        {"num_images": getattr(arguments, name) or train_defaults.DIGITS[name]}
        for name in ("images", "val_images")
    )
    if arguments.objects is None:
        return DataConfig("digits", options, train, val)
    options["path"] = os.path.realpath(arguments.objects)
    return DataConfig("cutouts", options, train, val)


# The options that are settings of the model by another name or their own.
_MODEL_OPTIONS = {
    "detector": "model",
    **{
        name: name
        for name in (
            *("backbone", "weights", "frozen_stages", "backbone_last_level", "channels", "blocks"),
            *("convs", "shared_tower", "anchor_scale"),
            *("attentions", "without_task", "high_offset", "init"),
        )
    },
}


def model_config(
    arguments: argparse.Namespace, dataset: DetectionDataset, base: ModelConfig | None = None
) -> ModelConfig:
    """The model that the options ask for, with the classes and keypoints of the data.

    Args:
        arguments: the options.
        dataset: to train on.
        base: the settings of the detector that the training starts from, for what is not given.

    Raises:
        ValueError: there is no such model, or the data have no keypoints.
    """
    if arguments.keypoints and not dataset.num_keypoints:
        raise ValueError(f"--keypoints: {arguments.data} has none")
    if base is None:
        settings: dict[str, Any] = {"detector": "atss"}
        settings |= {name: chosen(arguments, name) for name in ("backbone", "channels", "blocks")}
    else:
        settings = base.to_dict()
    for name, option in _MODEL_OPTIONS.items():
        value = getattr(arguments, option)
        if value is not None:
            settings[name] = value
    if is_file(arguments.weights):
        settings["weights"] = os.path.realpath(arguments.weights)
    if arguments.levels is not None or base is None:
        settings["first_level"], settings["last_level"] = train_defaults.levels(arguments)
    settings["min_size"], settings["max_size"] = _sizes(arguments, base)
    settings["num_classes"] = len(dataset.classes)
    settings["keypoints"] = dataset.num_keypoints if arguments.keypoints else 0
    return ModelConfig.from_dict(settings)


def _sizes(arguments: argparse.Namespace, base: ModelConfig | None) -> tuple[int, int]:
    """The shorter side in the model, and the longer one at most, in pixels."""
    usual = (COCO_SIZE, COCO_MAX_SIZE)
    if base is not None:
        usual = base.min_size, base.max_size
    elif arguments.data == "digits":
        usual = (train_defaults.scene_size(arguments),) * 2
    size = usual[0] if arguments.size is None else arguments.size
    most = max(size, usual[1]) if arguments.max_size is None else arguments.max_size
    return size, most


def train_config(arguments: argparse.Namespace, images: int) -> TrainConfig:
    """The training that the options ask for.

    Args:
        arguments: the options.
        images: how many images there are to train on.

    Raises:
        ValueError: a setting is out of its range.
    """
    steps = chosen(arguments, "steps")
    if arguments.epochs is not None:
        batch = arguments.batch_size * int(os.environ.get("WORLD_SIZE", 1))
        steps = math.ceil(arguments.epochs * images / batch)
    return TrainConfig(
        steps=steps,
        batch_size=arguments.batch_size,
        optimizer=arguments.optimizer,
        lr=chosen(arguments, "lr"),
        offset_lr=arguments.offset_lr,
        body_lr=arguments.body_lr,
        weight_decay=arguments.weight_decay,
        schedule=arguments.schedule,
        warmup_steps=arguments.warmup_steps,
        clip_norm=arguments.clip_norm or None,
        amp=arguments.amp,
        ema=arguments.ema,
        seed=arguments.seed,
        eval_every=train_defaults.eval_every(arguments, steps),
        checkpoint_every=arguments.checkpoint_every,
        workers=arguments.workers,
        device=arguments.device,
        deterministic=arguments.deterministic,
    )
