"""COCO's average precision of a detector, by pycocotools, on one process or many."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset

from dyhead_cuda.detection.data.base import DetectionDataset, collate

BOX_SUMMARY = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100")
KEYPOINT_SUMMARY = ("AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl")
DEFAULT_SIGMA = 0.05  # of keypoints that are not COCO's 17; COCO's own are 0.025 to 0.107

_LOG = logging.getLogger("dyhead_cuda.detection")


@dataclasses.dataclass
class Metrics:
    """COCO's metrics as fractions, nan where there is no such object.

    Args:
        summary: AP (mean over IoU 0.5 to 0.95), AP50, AP75, APs, APm, APl (areas up to 32^2, up
            to 96^2, above), AR1, AR10, AR100 (average recall with so many boxes per image).
        per_class: AP of each class by name.
        keypoints: AP, AP50, AP75, APm, APl, AR, AR50, AR75, ARm, ARl by object keypoint
            similarity; None for datasets or models without keypoints.
        detections: all detections in COCO's result format, bbox x, y, width, height in pixels.

    Source: https://cocodataset.org/#detection-eval.

    Example:
        >>> from dyhead_cuda.detection import DigitScenes, score
        >>> score(DigitScenes("val", num_images=1, size=(64, 64)), []).summary["AP"]
        0.0
    """

    summary: dict[str, float]
    per_class: dict[str, float]
    keypoints: dict[str, float] | None
    detections: list[dict[str, Any]]


def evaluate(
    model: nn.Module,
    dataset: DetectionDataset,
    *,
    device: torch.device | str,
    batch_size: int,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
    keypoint_sigmas: Sequence[float] | None = None,
) -> Metrics:
    """Runs a detector over a dataset and scores it.

    With torch.distributed initialised every process must call this: each takes every
    world-size-th image, process 0 scores them all, and all return the same.

    Args:
        model: torchvision's interface; its training modes are as before afterwards.
        dataset: images, and ground truth in ``dataset.coco``.
        device: where the images go; the model is not moved.
        batch_size: images per call of the model.
        workers: processes that read images.
        progress: called after each batch with the images done and all images of this process.
        keypoint_sigmas: see :func:`score`.

    Returns:
        The metrics, with all detections.

    Raises:
        ValueError: labels that are no class of the dataset, or not one sigma per keypoint.

    Source: https://cocodataset.org/#detection-eval, by pycocotools.

    Example:
        >>> from dyhead_cuda.detection import DigitScenes, ModelConfig, build, evaluate
        >>> small = {"channels": 16, "blocks": 1, "last_level": 5, "min_size": 64, "max_size": 64}
        >>> model = build(ModelConfig("atss", 10, "timm/test_resnet.r160_in1k", **small))
        >>> scenes = DigitScenes("val", num_images=2, size=(64, 64))
        >>> metrics = evaluate(model, scenes, device="cpu", batch_size=2)
        >>> 0 <= metrics.summary["AP"] <= 1
        True
    """
    if keypoint_sigmas is not None:
        _sigmas(dataset.num_keypoints, keypoint_sigmas)  # fail early, before predicting
    if isinstance(model, DistributedDataParallel):
        # Its forward exchanges buffers between the processes, so it would hang when they have
        # different numbers of batches.
        model = model.module
    rank, world = _rank(), _world()
    shard: Subset[Any] = Subset(cast(Any, dataset), range(rank, len(dataset), world))
    # Its own generator: the loader must not advance torch's random state during training.
    loader = DataLoader(
        shard, batch_size, num_workers=workers, collate_fn=collate, generator=torch.Generator()
    )
    detections: list[dict[str, Any]] = []
    done = 0
    with _eval_mode(model), torch.inference_mode():
        for images, targets in loader:
            outputs = model([image.to(device) for image in images])
            for target, output in zip(targets, outputs, strict=True):
                detections += _to_coco(int(target["image_id"]), output, dataset)
            done += len(images)
            if progress is not None:
                progress(done, len(shard))
    if world == 1:
        return score(dataset, detections, keypoint_sigmas=keypoint_sigmas)
    shards: list[list[dict[str, Any]]] = [[] for _ in range(world)]
    distributed.all_gather_object(shards, detections)
    everything = [detection for shard in shards for detection in shard]
    scored: list[Any] = [None]
    if rank == 0:
        metrics = score(dataset, everything, keypoint_sigmas=keypoint_sigmas)
        scored = [
            dataclasses.replace(metrics, detections=[])
        ]  # every process has the detections already
    distributed.broadcast_object_list(scored)
    return dataclasses.replace(scored[0], detections=everything)


def score(
    dataset: DetectionDataset,
    detections: list[dict[str, Any]],
    *,
    keypoint_sigmas: Sequence[float] | None = None,
    class_agnostic: bool = False,
) -> Metrics:
    """COCO's metrics of given detections.

    Args:
        dataset: with the ground truth.
        detections: COCO's result format: image_id, category_id, bbox, score, and keypoints
            where the model predicts them.
        keypoint_sigmas: per keypoint the standard deviation of its place, as a fraction of the
            object's size (default: COCO's own for 17 keypoints, otherwise 0.05 for each).
        class_agnostic: take all objects and detections as of one class: how well objects are
            found, whatever they are called. Several boxes on one object then count as one right and
            the others wrong.

    Returns:
        The metrics; with ``class_agnostic`` those "per_class" are empty.

    Raises:
        ValueError: not one sigma per keypoint.

    Source: https://cocodataset.org/#detection-eval, by pycocotools (``useCats`` is 0 with
    ``class_agnostic``).

    Example:
        >>> from dyhead_cuda.detection import DigitScenes, score
        >>> scenes = DigitScenes("val", num_images=3, size=(128, 128))
        >>> perfect = [{**truth, "score": 0.9} for truth in scenes.coco["annotations"]]
        >>> round(score(scenes, perfect).summary["AP"], 3)
        1.0
    """
    boxes = _run_cocoeval(dataset.coco, detections, "bbox", None, class_agnostic)
    keypoints = None
    if dataset.num_keypoints and all("keypoints" in detection for detection in detections):
        sigmas = _sigmas(dataset.num_keypoints, keypoint_sigmas)
        stats = _run_cocoeval(dataset.coco, detections, "keypoints", sigmas, class_agnostic).stats
        keypoints = _named(KEYPOINT_SUMMARY, stats)
    per_class = {} if class_agnostic else _per_class(dataset, boxes)
    return Metrics(_named(BOX_SUMMARY, boxes.stats), per_class, keypoints, detections)


def _per_class(dataset: DetectionDataset, boxes: COCOeval) -> dict[str, float]:
    # [IoU thresholds, recalls, categories, areas, detections per image]; -1: no object
    precision = boxes.eval["precision"]
    order = list(boxes.params.catIds)
    per_class = {}
    for name, category_id in zip(dataset.classes, dataset.category_ids, strict=True):
        of_class = precision[:, :, order.index(category_id), 0, -1]
        found = of_class[of_class > -1]
        per_class[name] = float(found.mean()) if found.size else math.nan
    return per_class


def _rank() -> int:
    return distributed.get_rank() if _is_distributed() else 0


def _world() -> int:
    return distributed.get_world_size() if _is_distributed() else 1


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    # Modes are restored module by module, so that frozen parts of the model stay frozen.
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _to_coco(
    image_id: int, output: dict[str, Tensor], dataset: DetectionDataset
) -> list[dict[str, Any]]:
    boxes, scores, labels = (output[key].detach().cpu() for key in ("boxes", "scores", "labels"))
    last = len(dataset.category_ids)
    if labels.numel() and not 1 <= int(labels.min()) <= int(labels.max()) <= last:
        raise ValueError(
            f"expected labels of 1 to {last} (the dataset's classes), got {int(labels.min())} to "
            f"{int(labels.max())}; was the model made for another number of classes?"
        )
    sizes = boxes[:, 2:] - boxes[:, :2]
    rows = torch.cat((boxes[:, :2], sizes, scores[:, None]), dim=1).double()
    points = output["keypoints"].detach().cpu().double() if "keypoints" in output else None
    finite = rows.isfinite().all(dim=1)
    if points is not None:
        finite &= points.isfinite().flatten(1).all(dim=1)
    if not finite.all():
        lost = int((~finite).sum())
        _LOG.warning("image %d: left out %d detections that are not finite", image_id, lost)
    detections = []
    for place in finite.nonzero().flatten().tolist():
        *box, confidence = rows[place].tolist()
        detection: dict[str, Any] = {
            "image_id": image_id,
            "category_id": dataset.category_ids[int(labels[place]) - 1],
            "bbox": box,
            "score": confidence,
        }
        if points is not None:
            detection["keypoints"] = points[place].flatten().tolist()
        detections.append(detection)
    return detections


def _run_cocoeval(
    truth: dict[str, Any],
    detections: list[dict[str, Any]],
    kind: str,
    sigmas: np.ndarray | None,
    class_agnostic: bool,
) -> COCOeval:
    # COCOeval writes into annotations, so it gets copies. COCO.loadRes is not used: it fails
    # without detections.
    results = [
        {**each, "id": place + 1, "area": each["bbox"][2] * each["bbox"][3], "iscrowd": 0}
        for place, each in enumerate(detections)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(
            _index({**truth, "annotations": [dict(each) for each in truth["annotations"]]}),
            _index({**truth, "annotations": results}),
            kind,
        )
        evaluation.params.useCats = int(not class_agnostic)
        if sigmas is not None:
            evaluation.params.kpt_oks_sigmas = sigmas
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def _index(content: dict[str, Any]) -> COCO:
    coco = COCO()
    coco.dataset = content
    coco.createIndex()
    return coco


def _sigmas(num_keypoints: int, given: Sequence[float] | None) -> np.ndarray | None:
    if given is not None:
        if len(given) != num_keypoints or min(given) <= 0:
            raise ValueError(f"expected {num_keypoints} keypoint_sigmas above 0, got {list(given)}")
        return np.asarray(given, np.float64)
    return None if num_keypoints == 17 else np.full(num_keypoints, DEFAULT_SIGMA)


def _named(names: Sequence[str], stats: np.ndarray) -> dict[str, float]:
    values = (float(value) for value in stats)
    return {
        name: value if value > -1 else math.nan for name, value in zip(names, values, strict=False)
    }
