"""The settings that the options of ``python -m dyhead_cuda train`` stand for."""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import replace
from typing import Any

from dyhead_cuda.commands import train_defaults
from dyhead_cuda.commands.arguments import COCO_MAX_SIZE, COCO_SIZE
from dyhead_cuda.commands.train_defaults import chosen
from dyhead_cuda.detection.data import DataConfig, DetectionDataset
from dyhead_cuda.detection.models.config import ModelConfig
from dyhead_cuda.detection.training.config import TrainConfig


def data_config(arguments: argparse.Namespace) -> DataConfig:
    """The data that the options ask for.

    Raises:
        ValueError: options of scenes with a folder, or of a folder with scenes.
    """
    for_digits = {
        "--images": arguments.images,
        "--val-images": arguments.val_images,
        "--scene-size": arguments.scene_size,
        "--objects": arguments.objects,
        "--background": arguments.background,
        "--max-angle": arguments.max_angle,
    }
    given = [name for name, value in for_digits.items() if value is not None]
    if arguments.data != "digits":
        if given:
            raise ValueError(f"{', '.join(given)}: only for --data digits, got {arguments.data}")
        folder = os.path.realpath(arguments.data)  # resolve() raises where links are a circle
        return DataConfig(folder, {"strict": arguments.strict}, flip=arguments.flip)
    if arguments.flip and arguments.objects is None:
        raise ValueError("--flip: a mirrored digit is no digit; only for --data FOLDER, --objects")
    if arguments.strict:
        raise ValueError("--strict: scenes have no broken annotations; only for --data FOLDER")
    return replace(scenes_config(arguments, cache=True), flip=arguments.flip)


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
        usual = (train_defaults.scene_size(arguments),) * 2
    size = usual[0] if size is None else size
    max_size = max(size, usual[1]) if max_size is None else max_size
    first_level, last_level = train_defaults.levels(arguments)
    return ModelConfig(
        detector=arguments.model,
        num_classes=len(dataset.classes),
        backbone=chosen(arguments, "backbone"),
        weights=arguments.weights,
        frozen_stages=arguments.frozen_stages,
        first_level=first_level,
        last_level=last_level,
        channels=chosen(arguments, "channels"),
        blocks=chosen(arguments, "blocks"),
        convs=arguments.convs,
        shared_tower=arguments.shared_tower,
        backbone_last_level=arguments.backbone_last_level,
        anchor_scale=arguments.anchor_scale,
        attentions=arguments.attentions,
        without_task=arguments.without_task,
        high_offset=arguments.high_offset,
        init=arguments.init,
        min_size=size,
        max_size=max_size,
        keypoints=dataset.num_keypoints if arguments.keypoints else 0,
    )


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
