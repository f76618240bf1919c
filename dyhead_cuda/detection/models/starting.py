"""A training that starts from a whole detector, also of other classes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from dyhead_cuda.compat.towers import unnest
from dyhead_cuda.detection.models.atss import ATSS
from dyhead_cuda.detection.models.backbone_weights import (
    misfits,
    read_file,
    shortened,
    tensors_of,
)
from dyhead_cuda.detection.models.checkpoint_names import MICROSOFT_ATSS, MMDET_ATSS, Source
from dyhead_cuda.detection.models.checkpoints import atss_from_microsoft, atss_from_mmdet
from dyhead_cuda.detection.models.config import ModelConfig, build_empty
from dyhead_cuda.detection.models.recipes import RECIPES, Recipe
from dyhead_cuda.detection.training.runs import CONFIG, LAST, read_json

_LOG = logging.getLogger("dyhead_cuda.detection")

_BOX_PREDICTOR = "roi_heads.box_predictor."
# What has values for each class: from the beginning of its names to whether the values of one class
# are next to each other (or those of one anchor are), and whether the background is class 0.
_CLASS_PREDICTORS = {
    "head.classes.": (False, False),
    "head.classification_head.cls_logits.": (False, False),
    f"{_BOX_PREDICTOR}cls_score.": (True, True),
    f"{_BOX_PREDICTOR}bbox_pred.": (True, True),
}
_KEYPOINTS = "roi_heads.keypoint_"
_OF_DATA = (*_CLASS_PREDICTORS, _KEYPOINTS)  # these may differ, as the data do

_BACKBONES = {
    "resnet": ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    "swin": ("swin_t", "swin_s", "swin_b"),
}
_PUBLISHED: tuple[tuple[Source, Callable[..., ATSS]], ...] = (
    (MMDET_ATSS, atss_from_mmdet),
    (MICROSOFT_ATSS, atss_from_microsoft),
)


@dataclass(frozen=True)
class Start:
    """What a training starts from; :func:`read_start` reads it.

    Args:
        source: the file or run folder, as the description of the run that starts from it has it.
        state: the detector's tensors by name; None where a run that has started goes on, which
            needs them no more.
        classes: the name of label i + 1; None where the file does not say.
        model: the detector's settings; None where the file does not say.

    Example:
        >>> from dyhead_cuda.detection import ModelConfig, Start, build
        >>> small = {"channels": 16, "blocks": 1, "last_level": 5}
        >>> before = ModelConfig("atss", 2, "timm/test_resnet.r160_in1k", **small)
        >>> start = Start("runs/before", build(before).state_dict(), ("cat", "dog"), before)
        >>> now = ModelConfig("atss", 3, "timm/test_resnet.r160_in1k", **small)
        >>> start.check(now)
        >>> detector = build(now)
        >>> start.load_into(detector, ["dog", "cow", "fox"])  # the dog's values are taken
        >>> bool((detector.head.classes.weight[0] == start.state["head.classes.weight"][1]).all())
        True
    """

    source: str
    state: Mapping[str, Tensor] | None
    classes: tuple[str, ...] | None
    model: ModelConfig | None

    def check(self, model: ModelConfig) -> None:
        """Makes sure that the tensors fit a detector.

        Args:
            model: its settings.

        Raises:
            ValueError: tensors that are missing, left over or of another shape, other than those
                that depend on the data: the class predictor, and all of keypoints.
        """
        if self.state is None:
            return
        with torch.device("meta"):
            own = build_empty(model).state_dict()
        wrong = misfits(own, self.state, _OF_DATA) + [
            f"{name} has shape {list(self.state[name].shape)}, not {list(own[name].shape)} for "
            "each class"
            for name in sorted(set(own) & set(self.state))
            if name.startswith(tuple(_CLASS_PREDICTORS))
            and own[name].shape[1:] != self.state[name].shape[1:]
        ]
        if not wrong:
            return
        known = "the options of the model that it was trained with"
        if self.model is not None:
            before, now = self.model.to_dict(), model.to_dict()
            differing = [
                f"{name} {before[name]}, not {now[name]}"
                for name in before
                if before[name] != now[name] and name not in _FREE
            ]
            known = f"{', '.join(differing)}: leave these options out" if differing else known
        raise ValueError(
            f"expected the tensors of {self.source} to fit the detector to be trained, "
            f"{len(wrong)} do not: {shortened(wrong)}; use what they are of: {known}"
        )

    def load_into(self, network: nn.Module, classes: Sequence[str]) -> None:
        """Copies the tensors into a detector that :meth:`check` has found fitting.

        Of class predictors, the values of classes that are known by name are taken; other values
        stay as they are, and the log (``dyhead_cuda.detection``) names them.

        Args:
            network: as :func:`~dyhead_cuda.detection.models.build` makes it.
            classes: the name of its label i + 1.
        """
        assert self.state is not None, "a run that goes on has a checkpoint of its own"
        own, taken, anew = network.state_dict(), {}, []
        pairs = _pairs(classes, self.classes)
        for name, value in own.items():
            given = self.state.get(name)
            predictor = next((p for p in _CLASS_PREDICTORS if name.startswith(p)), None)
            if predictor is not None and given is not None and self.classes and pairs:
                counts = len(classes), len(self.classes)
                taken[name] = _merged(value, given, *_CLASS_PREDICTORS[predictor], counts, pairs)
            elif predictor is None and given is not None and given.shape == value.shape:
                taken[name] = given
            elif not name.endswith("num_batches_tracked"):
                anew.append(name)
        network.load_state_dict(taken, strict=False)
        self._report(classes, [classes[i] for i, _ in pairs], anew, set(self.state) - set(own))

    def _report(
        self, classes: Sequence[str], known: Sequence[str], anew: Sequence[str], left: set[str]
    ) -> None:
        new = [name for name in classes if name not in known]
        lines = [
            f"learned anew: classes {', '.join(new)}" if new else "",
            f"drawn anew: {', '.join(anew)}" if anew else "",
            f"not taken: {', '.join(sorted(left))}" if left else "",
        ]
        _LOG.info("start from %s: %d of %d classes known", self.source, len(known), len(classes))
        for line in filter(None, lines):
            _LOG.warning("start from %s: %s", self.source, line)


# Settings that may differ between a detector and what starts from it.
_FREE = ("num_classes", "keypoints", "weights", "init", "min_size", "max_size")


def _pairs(own: Sequence[str], theirs: Sequence[str] | None) -> list[tuple[int, int]]:
    """The places of classes of the same name in two lists."""
    if theirs is None:
        return []
    if list(own) == list(theirs):  # also where a name is there twice
        return [(i, i) for i in range(len(own))]
    return [(i, theirs.index(name)) for i, name in enumerate(own) if name in theirs]


def _merged(
    own: Tensor,
    given: Tensor,
    together: bool,
    background: bool,
    counts: tuple[int, int],
    pairs: Sequence[tuple[int, int]],
) -> Tensor:
    """``own`` with the values of known classes, and of the background, from ``given``."""
    result = own.clone()

    def by_class(values: Tensor, count: int) -> Tensor:
        """A view [count, values of one class, ...]."""
        if together:
            return values.unflatten(0, (count, -1))
        return values.unflatten(0, (-1, count)).transpose(0, 1)

    shift = int(background)
    here, there = (
        by_class(values, count + shift)
        for values, count in zip((result, given), counts, strict=True)
    )
    for i, j in [(-1, -1)] * shift + list(pairs):
        here[i + shift] = there[j + shift].to(here)
    return result


def read_start(path: str | Path) -> Start:
    """Reads the detector that a training is to start from.

    Args:
        path: what :func:`~dyhead_cuda.detection.load_model` takes: the folder of a run, a
            checkpoint of it, a file of ``write_detector``, or "digits"; a checkpoint of ATSS of
            mmdet or microsoft/DynamicHead, see :func:`atss_from_mmdet`; or a state dict of a
            detector of this package, in a .safetensors file or one of ``torch.save``. Nothing in a
            file is executed.

    Returns:
        The tensors, with settings and names of classes where the file has them. A published
        checkpoint has the preprocessing of its code base, as ``recipe`` in its settings.

    Raises:
        ValueError: a file of another kind, or a published one whose backbone has no name here.
        RunError: no such run, or a damaged checkpoint.

    Example:
        >>> from dataclasses import replace
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> import torch
        >>> from dyhead_cuda.detection import ModelConfig, build, read_start
        >>> small = {"channels": 16, "blocks": 1, "last_level": 5}
        >>> config = ModelConfig("atss", 3, "timm/test_resnet.r160_in1k", **small)
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder) / "detector.pt"
        ...     torch.save(build(config).state_dict(), file)
        ...     start = read_start(file)
        >>> other = replace(config, num_classes=5)
        >>> start.check(other)
        >>> start.load_into(build(other), list("abcde"))
    """
    from dyhead_cuda.detection.trained import is_detector

    if is_detector(path) or Path(path).is_dir():
        return _of_trained(path)
    path = Path(path)
    checkpoint = read_file(path)
    if {"step", "config", "model"} <= set(checkpoint):
        return _of_trained(path)
    for source, convert in _PUBLISHED:
        state = unnest(checkpoint, source.blocks)
        if source.classes in state:
            return _published(path, checkpoint, source, convert)
    tensors = tensors_of(checkpoint)
    if not any(name.startswith("backbone.fpn.") for name in tensors):
        names = ", ".join(str(name)[:40] for name in list(tensors or checkpoint)[:3]) or "nothing"
        raise ValueError(
            "expected a detector to start from (a run of python -m dyhead_cuda train, ATSS with a "
            "Dynamic Head of mmdet or microsoft/DynamicHead, or a state dict of a detector of this "
            f"package), got {path} with {names} ...; weights of a backbone alone go to --weights"
        )
    return Start(str(path), tensors, None, None)


def continued(folder: Path, source: str) -> Start | None:
    """The start of the run in ``folder``, if it is from ``source`` and has a checkpoint by now."""
    if not ((folder / LAST).exists() and (folder / CONFIG).exists()):
        return None
    config = read_json(folder / CONFIG)
    if config.get("start") != source:
        return None
    return Start(source, None, None, ModelConfig.from_dict(config["model"]))


def _of_trained(path: str | Path) -> Start:
    from dyhead_cuda.detection.trained import load_model

    model, config = load_model(path)
    settings = ModelConfig.from_dict(config["model"])
    return Start(str(path), model.state_dict(), tuple(config["classes"]), settings)


def _published(
    path: Path, checkpoint: Mapping[str, Any], source: Source, convert: Callable[..., ATSS]
) -> Start:
    state = unnest(checkpoint, source.blocks)
    kernel_size = state[source.classes].shape[-1]
    windows = any(key.endswith("relative_position_bias_table") for key in state)
    family = "swin" if windows else "resnet"
    fitting = [
        (name, recipe)
        for name, (of, recipe) in RECIPES.items()
        if (of, recipe.family, recipe.kernel_size) == (source, family, kernel_size)
    ]
    if not fitting:
        raise ValueError(
            f"expected a checkpoint of one of {', '.join(RECIPES)}, got {path} of "
            f"{source.blocks.title} with a {family} backbone and predictors of size {kernel_size}, "
            "which is none of them"
        )
    name, recipe = fitting[0]
    detector = convert(checkpoint, recipe=recipe)
    model = _settings(name, recipe, detector, path)
    _LOG.warning("%s is taken for %s: its preprocessing is kept", path, name)
    return Start(str(path), detector.state_dict(), _classes(checkpoint, model.num_classes), model)


def _settings(name: str, recipe: Recipe, detector: ATSS, path: Path) -> ModelConfig:
    """The settings that :func:`build` makes ``detector`` of."""
    pyramid: Any = detector.backbone
    config = ModelConfig(
        "atss",
        detector.num_classes,
        # Nothing is downloaded: weights that are named make the batch normalisation frozen.
        weights="DEFAULT",
        channels=pyramid.out_channels,
        blocks=len(pyramid.dyhead.blocks),
        min_size=recipe.min_size,
        max_size=recipe.max_size,
        recipe=name,
    )
    state = detector.state_dict()
    for backbone in _BACKBONES[recipe.family]:
        named = replace(config, backbone=backbone)
        with torch.device("meta"):
            if not misfits(build_empty(named).state_dict(), state):
                return named
    raise ValueError(
        f"expected a backbone among {', '.join(_BACKBONES[recipe.family])} to start from, the one "
        f"in {path} has other sizes; atss_from_mmdet and atss_from_microsoft load it from Python"
    )


def _classes(checkpoint: Mapping[str, Any], count: int) -> tuple[str, ...] | None:
    """The names that a published checkpoint has in "meta", or COCO's where it has as many."""
    meta = checkpoint.get("meta")
    places = [meta, meta.get("dataset_meta")] if isinstance(meta, Mapping) else []
    for place in places:
        for key in ("classes", "CLASSES"):
            names = place.get(key) if isinstance(place, Mapping) else None
            if isinstance(names, list | tuple) and len(names) == count:
                return tuple(str(name) for name in names)
    coco = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    named = tuple(name for name in coco if name not in ("__background__", "N/A"))
    return named if len(named) == count else None
