"""Trains the detector that comes with the package, and writes its file.

    python -m release.digits_detector [FOLDER]

About half an hour on two cores; a training that was stopped goes on. FOLDER keeps the run.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from dyhead_cuda.detection import (
    DataConfig,
    ModelConfig,
    TrainConfig,
    load_model,
    train,
    write_detector,
)
from dyhead_cuda.detection.trained import SHIPPED_FILE

MODEL = ModelConfig(
    "atss",
    num_classes=10,
    backbone="efficientnet_lite0",
    weights="DEFAULT",
    frozen_stages=1,
    backbone_last_level=4,
    last_level=6,
    channels=64,
    blocks=2,
    init="local",
    anchor_scale=4.0,
    min_size=256,
    max_size=256,
)
DATA = DataConfig(
    "digits",
    {
        "size": [256, 256],
        "heights": [12, 230],
        "background": "photographs",
        "max_angle": 15,
        "cache": True,
    },
    {"num_images": 4000},
    {"num_images": 200},
)
TRAINING = TrainConfig(steps=1600, lr=2e-3, body_lr=0.1, ema=0.998, eval_every=400)


def main(folder: Path) -> None:
    """Trains in a folder, and writes the best weights, rounded to float16, into the package."""
    train(TRAINING, MODEL, DATA, folder)
    detector, config = load_model(folder)
    SHIPPED_FILE.parent.mkdir(exist_ok=True)
    write_detector(SHIPPED_FILE, detector, config, torch.float16)
    print(f"{SHIPPED_FILE}: {SHIPPED_FILE.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(Path(*sys.argv[1:2] or ["runs/digits"]))
