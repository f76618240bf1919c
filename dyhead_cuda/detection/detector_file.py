"""A trained detector as one safetensors file: its weights, and what they are of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dyhead_cuda.detection.files import plain, write_atomically
from dyhead_cuda.detection.training.errors import RunError

SUFFIX = ".safetensors"
_CONFIG = "dyhead_cuda"  # where the metadata has the configuration

# Detectors that come with the package, by the names that stand for their files.
SHIPPED = {"digits": Path(__file__).parent / "shipped" / f"digits{SUFFIX}"}


def write_detector(
    path: str | Path,
    model: nn.Module,
    config: Mapping[str, Any],
    dtype: torch.dtype | None = None,
) -> None:
    """Writes a detector that :func:`~dyhead_cuda.detection.load_model` reads.

    Args:
        path: of the file, which ends in ".safetensors".
        model: the detector.
        config: "model", "data", "training" and "classes", as load_model gives them.
        dtype: that floating-point values are rounded to, such as torch.float16 for half the size;
            None keeps them. A detector that is read has float32 again.

    Raises:
        ValueError: another suffix.
        ImportError: safetensors is not installed.
        WriteError: the file cannot be written.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from dyhead_cuda.detection import ModelConfig, build, load_model, write_detector
        >>> small = {"channels": 16, "blocks": 1, "last_level": 5}
        >>> settings = ModelConfig("atss", 2, "timm/test_resnet.r160_in1k", **small)
        >>> config = {"model": settings.to_dict(), "classes": ["cat", "dog"]}
        >>> with TemporaryDirectory() as folder:
        ...     write_detector(Path(folder) / "pets.safetensors", build(settings), config)
        ...     detector, found = load_model(Path(folder) / "pets.safetensors")
        >>> found["classes"]
        ['cat', 'dog']
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise ValueError(f"expected the name of a {SUFFIX} file, got {path}")
    save = _safetensors().save
    tensors = {
        name: (value.to(dtype) if dtype and value.is_floating_point() else value)
        .detach()
        .cpu()
        .contiguous()
        for name, value in model.state_dict().items()
    }
    data = save(tensors, {_CONFIG: json.dumps(plain(config))})
    write_atomically(path, lambda file: file.write(data))


def read_detector(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file of :func:`write_detector`, in float32, and its configuration.

    Nothing in the file is executed.

    Raises:
        RunError: there is no such file, it is damaged, or it says nothing of a detector.
        ImportError: safetensors is not installed.
    """
    library = _safetensors()
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            config = json.loads((file.metadata() or {}).get(_CONFIG, "null"))
        tensors = library.load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
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


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            f"expected safetensors for a {SUFFIX} file, but it is not installed: "
            "pip install safetensors"
        ) from error
    return safetensors.torch
