"""Whether an exported file computes what its detector does."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dyhead_cuda.detection.export_files import ExportError, Outputs
from dyhead_cuda.detection.models.exportable import exportable

# Relative L2 error of raw outputs, difference of scores, and of boxes over the longer side. Sums in
# another order make 1e-6 to 1e-4; a wrong operator or a wrong attribute makes far more.
TOLERANCE = 1e-3
# One in ten detections may have no partner: of boxes and scores that nearly tie, rounding decides
# which one is kept.
UNPAIRED = 10
RUNS = 5  # of which the median time is taken


@dataclass(frozen=True)
class Agreement:
    """How near a file's outputs are to the model's."""

    errors: dict[str, float]  # by output: relative L2 of raw ones; of detections the largest
    # difference of a pair's boxes, in pixels, and scores
    detections: int = 0  # the model's
    paired: int = 0  # of them, those that the file finds too


def eager(model: Any, raw: bool) -> Callable[[Tensor], Outputs]:
    """The model as the function that its file should be.

    Detections come from the detector's own ``forward``, told not to resize; raw predictions have no
    such way, and come from the module that is exported.
    """
    if raw:
        module = exportable(model, raw=True)

        def predict(images: Tensor) -> Outputs:
            with torch.no_grad():
                outputs: Outputs = module(images)
            return outputs

        return predict

    def detect(images: Tensor) -> Outputs:
        transform, before = model.transform, model.transform.fixed_size
        transform.fixed_size = (images.shape[3], images.shape[2])
        try:
            with torch.no_grad():
                (found,) = model([images[0]])
        finally:
            transform.fixed_size = before
        return {name: found[name] for name in ("boxes", "scores", "labels")}

    return detect


def choose_images(
    run: Callable[[Tensor], Outputs], shape: tuple[int, int, int, int], device: torch.device
) -> Tensor:
    """Random images of a shape, of several kinds those in which the model finds most.

    Args:
        run: what :func:`eager` gives.
        shape: [N, 3, H, W].
        device: for the images.
    """
    random = torch.Generator().manual_seed(0)
    noise = torch.rand(shape, generator=random)
    coarse = torch.rand(*shape[:2], 8, 8, generator=random)
    blobs = F.interpolate(coarse, shape[2:], mode="bilinear", align_corners=False)
    mixed = (blobs + 0.2 * noise) / 1.2
    # Beyond 0..1 nothing is an image, but a model that finds nothing in the others may there.
    kinds = [x.to(device) for x in (mixed, blobs, noise, 4 * mixed - 1.5)]
    counts = [len(outputs.get("scores", ())) for outputs in map(run, kinds)]
    return kinds[max(range(len(kinds)), key=counts.__getitem__)]


def compare(found: Outputs, expected: Outputs, longer_side: int) -> Agreement:
    """How near outputs are to each other.

    Args:
        found: of the file.
        expected: of the model.
        longer_side: of the image, in pixels.

    Raises:
        ExportError: they have other names, types or shapes, or are not near.
    """
    if found.keys() != expected.keys():
        raise ExportError(f"expected outputs {list(expected)}, the file has {list(found)}")
    found = {name: x.to(expected[name].device) for name, x in found.items()}
    for name, x in expected.items():
        if found[name].dtype != x.dtype or found[name].shape[1:] != x.shape[1:]:
            raise ExportError(
                f"expected {name} {x.dtype} {list(x.shape)}, the file has {found[name].dtype} "
                f"{list(found[name].shape)}"
            )
    if "boxes" in expected:
        return _compare_detections(found, expected, longer_side)
    errors = {name: _relative_error(found[name], x) for name, x in expected.items()}
    for name, error in errors.items():
        if not error <= TOLERANCE:  # NaN neither
            raise ExportError(
                f"the file does not compute what the model does: the relative error of {name} is "
                f"{error:.1e}, expected at most {TOLERANCE:.0e}"
            )
    return Agreement(errors)


def _relative_error(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    difference = (found.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp(min=torch.finfo(torch.float32).tiny))


def _compare_detections(found: Outputs, expected: Outputs, longer_side: int) -> Agreement:
    free = torch.ones(len(found["scores"]), dtype=torch.bool, device=found["scores"].device)
    count, errors = len(expected["scores"]), {"boxes": 0.0, "scores": 0.0}
    paired = 0
    for box, score, label in zip(
        *(expected[k] for k in ("boxes", "scores", "labels")), strict=True
    ):
        shift = (found["boxes"] - box).abs().amax(1)
        change = (found["scores"] - score).abs()
        near = (shift <= TOLERANCE * longer_side) & (change <= TOLERANCE)
        near &= free & (found["labels"] == label)
        if near.any():
            i = int(shift.where(near, float("inf")).argmin())
            free[i] = False
            paired += 1
            errors["boxes"] = max(errors["boxes"], float(shift[i]))
            errors["scores"] = max(errors["scores"], float(change[i]))
    total = max(count, len(free))
    if total - paired > total // UNPAIRED:
        raise ExportError(
            f"the file does not compute what the model does: it finds {len(free)} objects, the "
            f"model {count}, and of these only {paired} have the same label, with boxes within "
            f"{TOLERANCE * longer_side:.2f} pixels and scores within {TOLERANCE:.0e}"
        )
    return Agreement(errors, count, paired)


def seconds(run: Callable[[Tensor], Any], images: Tensor) -> float:
    """The median time of a few calls, after one that does not count."""
    times = []
    for _ in range(RUNS + 1):
        start = time.perf_counter()
        run(images)
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
