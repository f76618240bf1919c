"""Small detectors of random weights that find many things, without any training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from dyhead_cuda.detection import ModelConfig, build
from dyhead_cuda.detection.names import TWO_STAGE
from dyhead_cuda.detection.training.checkpoint_file import write_checkpoint

SMALL = ModelConfig(
    "atss",
    3,
    "timm/test_resnet.r160_in1k",
    channels=16,
    blocks=1,
    last_level=5,
    min_size=64,
    max_size=96,
)


def config_of(detector: str) -> ModelConfig:
    """Of a small detector."""
    return replace(SMALL, detector=detector, convs=None if detector in TWO_STAGE else 0)


def make(detector: str) -> nn.Module:
    """A small detector in evaluation mode; always the same for a name."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = build(config_of(detector)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("head.classes.bias", "cls_logits.bias")):
                    parameter.zero_()  # probabilities around a half, not a hundredth
                elif parameter.dim() > 1:
                    parameter.add_(0.03 * torch.randn_like(parameter))
    return model


def save_run(detector: str, folder: Path, classes: tuple[str, ...] = ("ant", "bee", "cat")) -> Path:
    """The checkpoint of a training run whose weights :func:`make` gives."""
    config = {"model": config_of(detector).to_dict(), "classes": list(classes)}
    path = folder / f"{detector}.pt"
    write_checkpoint(path, {"step": 0, "config": config, "model": make(detector).state_dict()})
    return path
