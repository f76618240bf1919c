"""Weights of backbones: from a file, or downloaded with one line that says what to do offline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torchvision import models

from dyhead_cuda import compat
from dyhead_cuda.compat.towers import NESTS
from dyhead_cuda.detection import tensor_file
from dyhead_cuda.detection.files import out_of_memory
from dyhead_cuda.detection.names import SUFFIX

SUFFIXES = (".pth", ".pt", SUFFIX)
_SHOWN = 3  # names in a message
_CLASSIFIERS = ("fc", "head", "classifier")  # of torchvision's models


def is_file(weights: str | None) -> bool:
    """Whether ``weights`` of a backbone is the name of a file, and not of published weights."""
    return weights is not None and weights.endswith(SUFFIXES)


def read_file(path: str | Path) -> Mapping[str, Any]:
    """What a file of weights holds; nothing in it is executed.

    Args:
        path: .safetensors, or a file for :func:`dyhead_cuda.compat.load_checkpoint`.

    Raises:
        ValueError: there is no such file, or it is damaged or of another kind.
        ImportError: a .safetensors file without that package.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"expected a file of weights, but {path} is not there or no regular file")
    if path.suffix == SUFFIX:
        return tensor_file.read(path)[0]
    return compat.load_checkpoint(path)


def tensors_of(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict in what :func:`read_file` returns: itself, or what it has under "state_dict",
    "model" and other usual names; a "module." that parallel training put before names is dropped.
    """
    nested = (checkpoint.get(key) for key in NESTS)
    state = next((value for value in nested if isinstance(value, Mapping)), checkpoint)
    return {
        str(name).removeprefix("module."): torch.from_numpy(np.array(value))
        if isinstance(value, np.ndarray)
        else value
        for name, value in state.items()
        if isinstance(value, Tensor | np.ndarray)
    }


def misfits(
    own: Mapping[str, Tensor], given: Mapping[str, Tensor], skipped: Sequence[str] = ()
) -> list[str]:
    """What keeps tensors from being loaded, by name, one line each.

    Args:
        own: of the model.
        given: to load. Counters of batch normalisation may be missing on either side.
        skipped: beginnings of names that do not matter.
    """

    def names(state: Mapping[str, Tensor]) -> set[str]:
        kept = (name for name in state if not name.startswith(tuple(skipped)))
        return {name for name in kept if not name.endswith("num_batches_tracked")}

    wanted, found = names(own), names(given)
    return [
        *(f"{name} is missing" for name in sorted(wanted - found)),
        *(
            f"{name} has shape {list(given[name].shape)}, not {list(own[name].shape)}"
            for name in sorted(wanted & found)
            if own[name].shape != given[name].shape
        ),
        *(f"{name} is not part of it" for name in sorted(found - wanted)),
    ]


def shortened(lines: Sequence[str]) -> str:
    """The first lines, and how many more there are."""
    more = f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    return "; ".join(lines[:_SHOWN]) + more


def torchvision_network(name: str, weights: str | None, **options: Any) -> nn.Module:
    """A torchvision model.

    Args:
        name: of the model.
        weights: None for random values, the name of published weights, or a file with the state
            dict of this model, with or without its classifier.
        options: of the model.

    Raises:
        ValueError: a file that does not fit.
        ConnectionError: weights that cannot be downloaded.
    """
    if is_file(weights):
        network = models.get_model(name, **options)
        network.load_state_dict(_fitting(name, weights, network, _CLASSIFIERS), strict=False)
        return network
    try:
        return models.get_model(name, weights=weights, **options)
    except (OSError, RuntimeError) as error:
        if weights is None:
            raise
        published = models.get_model_weights(name)
        chosen = published[weights] if weights in published.__members__ else published.DEFAULT
        _no_download(name, weights, chosen.url, error)


def timm_network(name: str, weights: str | None, **options: Any) -> nn.Module:
    """A timm model, as :func:`torchvision_network`; its published weights are "pretrained"."""
    import timm

    if not is_file(weights):
        try:
            return timm.create_model(name, pretrained=bool(weights), **options)
        except Exception as error:  # of any of the packages that timm downloads with
            if weights is None:
                raise
            _no_download(f"timm/{name}", "pretrained", _timm_address(name), error)
    with torch.device("meta"):
        whole: Any = timm.create_model(name)
    classifier = whole.pretrained_cfg.get("classifier") or ()
    classifiers = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    state = _fitting(f"timm/{name}", weights, whole, classifiers)
    # timm knows the parts of the model that its features need.
    source = {"state_dict": state, "custom_load": False}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=source, **options)


def _fitting(
    name: str, path: str | None, network: nn.Module, classifiers: Sequence[str]
) -> dict[str, Tensor]:
    """The tensors of a file, without those of the classifier."""
    skipped = tuple(f"{classifier}." for classifier in classifiers)
    state = tensors_of(read_file(path or ""))
    wrong = misfits(network.state_dict(), state, skipped)
    if wrong:
        raise ValueError(
            f"expected the weights of {name} in {path}, whose tensors do not fit: "
            f"{shortened(wrong)}; name the backbone that the file is of (--backbone)"
        )
    return {key: value for key, value in state.items() if not key.startswith(skipped)}


def _timm_address(name: str) -> str:
    import timm

    source: Any = timm.get_pretrained_cfg(name)
    if source is not None and source.hf_hub_id:
        return f"https://huggingface.co/{source.hf_hub_id}"
    return (source and source.url) or "the model's page"


def _no_download(name: str, weights: str, address: str, error: Exception) -> NoReturn:
    if out_of_memory(error):
        raise error
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    raise ConnectionError(
        f"cannot get the weights {weights} of {name} ({reason}); where there is a network download "
        f"them from {address}, then pass the file: --weights FILE"
    ) from error
