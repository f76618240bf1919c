"""Published ATSS detectors with a Dynamic Head: checkpoints of mmdet and microsoft/DynamicHead."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models import SwinTransformer
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import FeaturePyramidNetwork

from dyhead_cuda import compat
from dyhead_cuda.compat.towers import unnest
from dyhead_cuda.detection.models.atss import ATSS
from dyhead_cuda.detection.models.backbones import Pyramid
from dyhead_cuda.detection.models.bodies import SwinBody
from dyhead_cuda.detection.models.checkpoint_names import (
    FIRST,
    LAST,
    MICROSOFT_ATSS,
    MMDET_ATSS,
    Source,
)
from dyhead_cuda.detection.models.recipes import (
    MICROSOFT_R50,
    MMDET_R50,
    Recipe,
    halve_in_first_convolutions,
)
from dyhead_cuda.modules import DyHead

_RESNETS = {
    (2, 2, 2, 2, 2): "resnet18",
    (3, 4, 6, 3, 2): "resnet34",
    (3, 4, 6, 3, 3): "resnet50",
    (3, 4, 23, 3, 3): "resnet101",
    (3, 8, 36, 3, 3): "resnet152",
}
_TABLE = r"(?:layers|stages)\.\d\.blocks\.0\.attn\.(?:w_msa\.)?relative_position_bias_table"


def _depths(keys: Iterable[str], pattern: str) -> list[int]:
    """Blocks of each stage; the groups of ``pattern`` are a stage and a block of it."""
    blocks = {match.groups() for match in (re.match(pattern, key) for key in keys) if match}
    stages = sorted({stage for stage, _ in blocks})
    return [sum(stage == of for of, _ in blocks) for stage in stages]


def _pyramid(state: Mapping[str, Any], source: Source, family: str, channels: int) -> Pyramid:
    """Modules for the backbone and feature pyramid whose keys ``state`` has."""
    keys = [key.removeprefix(source.body) for key in state if key.startswith(source.body)]
    residual = _depths(keys, r"(?:layer|res)(\d)\.(\d+)\.")
    windowed = _depths(keys, r"(?:layers|stages)\.(\d)\.blocks\.(\d+)\.")
    if not (residual if family == "resnet" else windowed):
        raise ValueError(
            f'expected a {family} backbone of {source.blocks.title} under "{source.body}" for this '
            f"recipe, found {', '.join(keys[:3]) or 'nothing'} ...; pass the recipe of the "
            "checkpoint's configuration"
        )
    options: dict[str, Any] = {
        "first_level": FIRST,
        "last_level": LAST,
        "channels": channels,
        "blocks": 0,
        "extra": source.extra,
    }
    if family == "resnet":
        convs = 3 if any(re.search(r"\.0\.conv3\.", key) for key in keys) else 2
        found = (*residual, convs)
        if found not in _RESNETS:
            raise ValueError(
                "expected blocks of the four stages and convolutions of a block as one of "
                f"{sorted(_RESNETS)}, got {found}"
            )
        # The weights are not loaded: naming some only makes the batch normalisation frozen.
        return Pyramid(_RESNETS[found], weights="DEFAULT", load_weights=False, **options)
    return _swin_pyramid(state, source, keys, windowed, options)


def _swin_pyramid(
    state: Mapping[str, Any],
    source: Source,
    keys: Sequence[str],
    depths: list[int],
    options: Mapping[str, Any],
) -> Pyramid:
    """As :func:`_pyramid` for a Swin transformer with so many blocks in each stage.

    Args:
        state, source: as there.
        keys: of the backbone, without its prefix.
        depths: blocks of each stage.
        options: of :class:`Pyramid`.
    """
    tables = [state[source.body + key] for key in sorted(keys) if re.fullmatch(_TABLE, key)]
    patches = [key for key in keys if re.fullmatch(r"patch_embed\.proj(ection)?\.weight", key)]
    if len(tables) != len(depths) or len(depths) != 4 or len(patches) != 1:
        raise ValueError(
            f'expected a Swin transformer of four stages under "{source.body}", found '
            f"{len(depths)} with {len(tables)} tables of relative positions and {len(patches)} "
            "patch embeddings"
        )
    width, window = len(state[source.body + patches[0]]), (round(len(tables[0]) ** 0.5) + 1) // 2
    heads = [table.shape[1] for table in tables]
    network = SwinTransformer(
        [4, 4], width, depths, heads, [window, window], stochastic_depth_prob=0.2
    )
    widths = [width << stage for stage in range(1, 4)]
    pyramid = Pyramid("swin_t", **options)
    pyramid.body = SwinBody(
        IntermediateLayerGetter(network.features, {"3": "3", "5": "4", "7": "5"}), widths
    )
    pyramid.fpn = FeaturePyramidNetwork(widths, pyramid.out_channels, pyramid.fpn.extra_blocks)
    return pyramid


def _tower_keys(head: DyHead, source: Source) -> set[str]:
    names = [name.theirs for name in source.blocks.names]
    return {f"{source.tower}{i}.{name}" for i in range(len(head.blocks)) for name in names}


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))


def _load(model: ATSS, state: Mapping[str, Any], source: Source, tower: set[str]) -> None:
    """Load all but the Dynamic Head, whose keys are ``tower``; refuse keys that nothing uses."""
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    scales = [source.scales.format(i) for i in range(model.head.scales.numel())]
    names = {
        key: source.theirs(key)
        for key in shapes
        if not key.startswith("backbone.dyhead.") and key != "head.scales"
    }
    _check_keys(state, {*names.values(), *scales, *tower}, source)
    tensors = {key: _tensor(state[name]) for key, name in names.items()}
    tensors["head.scales"] = torch.cat([_tensor(state[name]).flatten() for name in scales])
    for key, value in tensors.items():
        if key.endswith("relative_position_index"):
            tensors[key] = value.flatten()
    _check_shapes(tensors, shapes, {**names, "head.scales": "all scales"})
    if source.unfolded:
        for key in tensors:
            if re.search(r"\.stages\.\d+\.(norm|reduction)\.", key):
                tensors[key] = _reorder_patches(tensors[key])
    model.load_state_dict(tensors, strict=False)


def _check_keys(state: Mapping[str, Any], used: set[str], source: Source) -> None:
    missing = sorted(used - set(state))
    # Frozen batch normalisation has no such counter.
    unexpected = sorted(key for key in set(state) - used if not key.endswith("num_batches_tracked"))
    if missing or unexpected:
        raise ValueError(
            f"expected the {len(used)} tensors of {source.blocks.title}'s ATSS with a Dynamic "
            f"Head of P{FIRST}..P{LAST}, missing: {', '.join(missing) or 'none'}; unexpected: "
            f"{', '.join(unexpected) or 'none'}"
        )


def _check_shapes(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], names: Mapping[str, str]
) -> None:
    """Raise unless all have the model's shapes; ``names`` are the keys in the checkpoint."""
    lines = [
        f"{names[key]}: expected {list(shapes[key])}, got {list(value.shape)}"
        for key, value in tensors.items()
        if value.shape != shapes[key]
    ]
    if lines:
        raise ValueError(f"expected other shapes in the checkpoint: {'; '.join(lines)}")


def _reorder_patches(value: Tensor) -> Tensor:
    """The four pixels of patch merging, from (channel, dy, dx) to (dx, dy, channel)."""
    return value.unflatten(-1, (-1, 2, 2)).transpose(-1, -3).flatten(-3)


def _build(checkpoint: Mapping[str, Any], source: Source, head: DyHead, recipe: Recipe) -> ATSS:
    state = unnest(checkpoint, source.blocks)
    if source.classes not in state:
        raise ValueError(f'expected "{source.classes}" of an ATSS head, found no such key')
    num_classes, _, kernel_size, _ = state[source.classes].shape
    if kernel_size != recipe.kernel_size:
        raise ValueError(
            f"expected predictors of size {recipe.kernel_size} for this recipe, got {kernel_size}; "
            "pass the recipe of the checkpoint's configuration"
        )
    channels = cast(int, head.blocks[0].in_channels)
    pyramid = _pyramid(state, source, recipe.family, channels)
    pyramid.dyhead, pyramid.out_channels = head.float(), head.out_channels
    model = ATSS(
        pyramid,
        num_classes,
        min_size=recipe.min_size,
        max_size=recipe.max_size,
        postprocess=source.postprocess,
        **recipe.detector_settings(),
    )
    _load(model, state, source, _tower_keys(head, source))
    if recipe.channels == "bgr":
        first = next(m for m in pyramid.body.modules() if isinstance(m, nn.Conv2d))
        first.weight.data = first.weight.data.flip(1)
    if recipe.stride_in_1x1 and recipe.family == "resnet":
        halve_in_first_convolutions(pyramid)
    return model.eval()


def atss_from_mmdet(
    state_dict: Mapping[str, Any], *, recipe: Recipe = MMDET_R50, version: str = "3.3.0"
) -> ATSS:
    """The detector of a checkpoint that mmdet's ATSS with a Dynamic Head has.

    The depth of the ResNet or the sizes of the Swin transformer, blocks, channels and classes are
    read from the checkpoint; a tensor that the model does not use is an error. Batch normalisation
    is frozen. The result takes RGB images in 0..1. On an image whose size the transform keeps it
    gives mmdet's numbers to rounding; resizing is torchvision's, which interpolates slightly
    differently from OpenCV and Pillow. A Swin transformer differs where a padded image has at most
    32 * window pixels on a side: torchvision does not shift windows in a map of one window.

    Args:
        state_dict: a state dict, or a checkpoint with one under "state_dict"; its tensors are
            copied.
        recipe: of the configuration that it was trained with, such as :data:`MMDET_R50`.
        version: of the mmdet that trained it, see :func:`dyhead_cuda.compat.from_mmdet`.

    Returns:
        The detector in evaluation mode, float32, on the CPU. Its labels are 1-based, as those
        of torchvision's detectors; mmdet's are 0-based.

    Raises:
        ValueError: missing, unexpected or misshapen tensors, all of them listed; a backbone or
            predictors that do not fit the recipe.
        TypeError: not a mapping.

    Source: mmdet 3.3.0, ``configs/dyhead``.

    Example:
        >>> import torch
        >>> from dyhead_cuda.detection import MMDET_SWINL, atss_from_mmdet
        >>> state = torch.load("atss_swin-l.pth", weights_only=True)  # doctest: +SKIP
        >>> model = atss_from_mmdet(state, recipe=MMDET_SWINL)  # doctest: +SKIP
        >>> atss_from_mmdet({"backbone.conv1.weight": torch.zeros(64, 3, 7, 7)})
        Traceback (most recent call last):
            ...
        ValueError: expected ...
    """
    head = compat.from_mmdet(state_dict, version=version, prefix=MMDET_ATSS.tower)
    return _build(state_dict, MMDET_ATSS, head.cpu(), recipe)


def atss_from_microsoft(state_dict: Mapping[str, Any], *, recipe: Recipe = MICROSOFT_R50) -> ATSS:
    """The detector of a checkpoint of microsoft/DynamicHead on detectron2.

    Sizes are read from the checkpoint as by :func:`atss_from_mmdet`, which also says how the result
    differs from the original.

    Args:
        state_dict: a state dict, or a checkpoint with one under "model", of tensors or numpy
            arrays; they are copied.
        recipe: of the configuration that it was trained with, such as :data:`MICROSOFT_R50`.

    Returns:
        The detector in evaluation mode, float32, on the CPU.

    Raises:
        ValueError: missing, unexpected or misshapen tensors, all of them listed; a backbone or
            predictors that do not fit the recipe.
        TypeError: not a mapping.

    Source: microsoft/DynamicHead, ``configs``.

    Example:
        >>> import torch
        >>> from dyhead_cuda.detection import atss_from_microsoft
        >>> state = torch.load("dyhead_r50_atss_fpn_1x.pth")  # doctest: +SKIP
        >>> model = atss_from_microsoft(state)  # doctest: +SKIP
        >>> atss_from_microsoft({"model": {}})
        Traceback (most recent call last):
            ...
        ValueError: expected ...
    """
    head = compat.from_microsoft(state_dict, prefix=MICROSOFT_ATSS.tower)
    return _build(state_dict, MICROSOFT_ATSS, head.cpu(), recipe)
