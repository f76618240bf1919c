"""Trained detectors: from a run, from a checkpoint, or from one file that can be passed on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dyhead_cuda.detection import tensor_file
from dyhead_cuda.detection.files import plain, write_atomically
from dyhead_cuda.detection.models.config import ModelConfig, build_empty
from dyhead_cuda.detection.names import SHIPPED, SUFFIX
from dyhead_cuda.detection.training.checkpoint_file import one_line, read_checkpoint
from dyhead_cuda.detection.training.errors import RunError
from dyhead_cuda.detection.training.runs import BEST, LAST

_CONFIG = "dyhead_cuda"  # where the metadata has the configuration
SHIPPED_FILE = Path(__file__).parent / "shipped" / f"{SHIPPED}{SUFFIX}"


def load_model(
    path: str | Path, device: torch.device | str = "cpu"
) -> tuple[nn.Module, dict[str, Any]]:
    """A trained detector, in evaluation mode.

    Args:
        path: "digits", the detector of handwritten digits that comes with the package (a folder of
            that name is "./digits" or ``Path("digits")``); a file of :func:`write_detector`; a
            checkpoint of a run; or a run folder, of which the best weights are taken, the last
            before its first evaluation. Where training averages weights, these are the averaged
            ones. Nothing in a file is executed.
        device: where to put it.

    Returns:
        The model, and its configuration: "model" and "classes" (the name of label i + 1), and of a
        run also "data", "training" and "processes".

    Raises:
        RunError: there is no such checkpoint, or it is damaged.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from dyhead_cuda.detection import DataConfig, ModelConfig, TrainConfig
        >>> from dyhead_cuda.detection import load_model, train
        >>> small = {"channels": 16, "blocks": 1, "last_level": 5, "min_size": 64, "max_size": 64}
        >>> model = ModelConfig("atss", 10, "timm/test_resnet.r160_in1k", **small)
        >>> one = {"num_images": 1}
        >>> data = DataConfig("digits", {"size": [64, 64]}, train=one, val=one)
        >>> with TemporaryDirectory() as folder:
        ...     metrics = train(TrainConfig(steps=1, batch_size=1), model, data, folder)
        ...     detector, config = load_model(folder)
        >>> type(detector).__name__, config["classes"][:3]
        ('ATSS', ['0', '1', '2'])
    """
    path = SHIPPED_FILE if path == SHIPPED else Path(path)
    if path.is_dir():
        path = path / (BEST if (path / BEST).exists() else LAST)
    if path.suffix == SUFFIX:
        state, config = _read(path)
    else:
        checkpoint = read_checkpoint(path)
        state, config = checkpoint["model"], checkpoint["config"]
    try:
        settings = ModelConfig.from_dict(config["model"])
        _check_classes(config["classes"], settings.num_classes)
        model = build_empty(settings)
        model.load_state_dict(state)
    except Exception as error:  # whatever the settings of somebody's file lead to
        what = f"no {error}" if isinstance(error, KeyError) else one_line(error)
        raise RunError(f"cannot make a model from {path}: {what}") from error
    return model.to(device).eval(), config


def _check_classes(classes: Any, count: int) -> None:
    named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    if not named or len(classes) != count:
        raise ValueError(f"expected the names of {count} classes, got {str(classes)[:100]}")


def write_detector(
    path: str | Path,
    model: nn.Module,
    config: Mapping[str, Any],
    dtype: torch.dtype | None = None,
) -> Path:
    """Writes a detector that :func:`load_model` reads.

    Args:
        path: of the file, which ends in ".safetensors".
        model: the detector.
        config: "model", "data", "training" and "classes", as load_model gives them.
        dtype: that floating-point values are rounded to, such as torch.float16 for half the size;
            None keeps them. A detector that is read has float32 again.

    Returns:
        ``path``.

    Raises:
        ValueError: another suffix.
        ImportError: safetensors is not installed.
        WriteError: the file cannot be written.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from dyhead_cuda.detection import ModelConfig, build, load_model, write_detector
        >>> small = {"channels": 16, "blocks": 1, "last_level": 5}
        >>> settings = ModelConfig("atss", 2, "timm/test_resnet.r160_in1k", **small)
        >>> config = {"model": settings.to_dict(), "classes": ["cat", "dog"]}
        >>> with TemporaryDirectory() as folder:
        ...     file = write_detector(f"{folder}/pets.safetensors", build(settings), config)
        ...     detector, found = load_model(file)
        >>> found["classes"]
        ['cat', 'dog']
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise ValueError(f"expected the name of a {SUFFIX} file, got {path}")
    tensors = {
        name: (value.to(dtype) if dtype and value.is_floating_point() else value)
        .detach()
        .cpu()
        .contiguous()
        for name, value in model.state_dict().items()
    }
    data = tensor_file.to_bytes(path, tensors, {_CONFIG: json.dumps(plain(config))})
    write_atomically(path, lambda file: file.write(data))
    return path


def is_detector(path: str | Path) -> bool:
    """Whether a file, or what "digits" stands for, says itself what its tensors are of.

    Raises:
        ValueError: a file of safetensors that is not there, or damaged.
        ImportError: safetensors is not installed.
    """
    if path == SHIPPED:
        return True
    path = Path(path)
    return path.suffix == SUFFIX and path.is_file() and _CONFIG in tensor_file.read(path)[1]


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file of :func:`write_detector`, in float32, and its configuration."""
    try:
        tensors, texts = tensor_file.read(path)
        config = json.loads(texts.get(_CONFIG, "null"))
    except ValueError as error:
        raise RunError(f"cannot read the detector {path}: {error}") from error
    if not isinstance(config, dict):
        raise RunError(
            f"expected a detector written by write_detector, {path} does not say what its tensors "
            "are of"
        )
    return {
        name: value.float() if value.is_floating_point() else value
        for name, value in tensors.items()
    }, config
