"""The settings that the options of ``python -m dyhead_cuda train`` stand for."""

from __future__ import annotations

import argparse
import math
import os

from dyhead_cuda.commands.arguments import COCO_MAX_SIZE, COCO_SIZE, SCENE_SIZE
from dyhead_cuda.detection.data import DataConfig, DetectionDataset
from dyhead_cuda.detection.models.config import ModelConfig
from dyhead_cuda.detection.names import SPLITS, TWO_STAGE
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
    places = {split: _places(arguments, split) for split in SPLITS}
    if arguments.data != "digits":
        if given:
            raise ValueError(f"{', '.join(given)}: only for --data digits, got {arguments.data}")
        folder = os.path.realpath(arguments.data)  # resolve() raises where links are a circle
        return DataConfig(folder, {"strict": arguments.strict}, **places, flip=arguments.flip)
    for split, found in places.items():
        if found:
            names = ", ".join(f"--{split}-{PLACES[name]}" for name in found)
            raise ValueError(f"{names}: digits have no files; only for --data FOLDER")
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
    """The training that the options ask for.

    Args:
        arguments: the options.
        images: how many images there are to train on.

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
