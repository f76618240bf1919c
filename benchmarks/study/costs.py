"""What each detector of the study costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.study.results import cost_settings
from benchmarks.study.setup import Setup, fingerprint
from benchmarks.study.variants import VARIANTS
from dyhead_cuda.detection import data
from dyhead_cuda.detection.models import build_empty, count_parameters, gflops


def costs(
    setup: Setup, names: Sequence[str], device: torch.device, rounds: int
) -> dict[str, dict[str, Any]]:
    """Parameters, GFLOPs of one image, and milliseconds of a training step and of a prediction.

    All variants take turns in this process, ``rounds`` times, so that a slow phase of the machine
    affects all. Times are medians for one batch of the setup's size.
    """
    batch = data.collate([setup.data().open("val")[i] for i in range(setup.batch_size)])
    images = [image.to(device) for image in batch[0]]
    targets = [{key: value.to(device) for key, value in target.items()} for target in batch[1]]
    detectors: dict[str, nn.Module] = {}
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        torch.manual_seed(0)
        model = build_empty(setup.model(VARIANTS[name]))  # the weights do not matter here
        found[name] = {
            "setup": fingerprint(cost_settings(setup, name)),
            "parameters": count_parameters(model),
            "gflops": gflops(model, setup.size, setup.size),
        }
        detectors[name] = model.to(device)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for _ in range(rounds + 1):
        for name, model in detectors.items():
            times[name].append((_step(model, images, targets), _prediction(model, images)))
    for name in names:
        steps, predictions = zip(*times[name][1:], strict=True)  # the first round warms up
        found[name]["step_ms"] = 1e3 * statistics.median(steps)
        found[name]["prediction_ms"] = 1e3 * statistics.median(predictions)
    return found


def _step(model: nn.Module, images: list[Any], targets: list[Any]) -> float:
    model.train()
    model.zero_grad()
    return _seconds(lambda: torch.stack([*model(images, targets).values()]).sum().backward(), model)


def _prediction(model: nn.Module, images: list[Any]) -> float:
    model.eval()
    with torch.inference_mode():
        return _seconds(lambda: model(images), model)


def _seconds(action: Callable[[], object], model: nn.Module) -> float:
    device = next(model.parameters()).device
    start = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
