"""Files of safetensors, which hold tensors and text and execute nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dyhead_cuda.detection.names import SUFFIX


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, and the texts in its metadata.

    Raises:
        ValueError: there is no such file, or it is damaged or of another kind.
        ImportError: safetensors is not installed.
    """
    library = _library(path)
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            texts = file.metadata() or {}
        return library.load_file(path), texts
    except (OSError, SafetensorError) as error:
        raise ValueError(f"expected a file of safetensors, {path} is none: {error}") from error


def to_bytes(path: Path, tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> bytes:
    """What ``path`` is to hold.

    Raises:
        ImportError: safetensors is not installed.
    """
    data: bytes = _library(path).save(dict(tensors), dict(texts))
    return data


def _library(path: Path) -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            f"expected safetensors for the {SUFFIX} file {path}, but it is not installed: "
            "pip install safetensors"
        ) from error
    return safetensors.torch
