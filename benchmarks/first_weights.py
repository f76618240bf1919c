"""``python -m benchmarks first-weights``: how much first weights blur, and what that costs.

Many blocks learn slowly from the published first weights. This measures why, on a pyramid of white
noise, and trains small detectors from several first weights for a short time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import machine, readme
from dyhead_cuda import DyHead, DyHeadBlock
from dyhead_cuda.commands.common import fail
from dyhead_cuda.detection import DataConfig, ModelConfig, Start, TrainConfig, build, train
from dyhead_cuda.detection.data import DetectionDataset
from dyhead_cuda.detection.training.runs import RunError
from dyhead_cuda.detection.training.trainer import Interrupted, TrainingError
from dyhead_cuda.modules import Init

BLOCKS, CHANNELS, SIDE = 6, 64, 32  # of the head that is measured, and of its finest level
NEAR = 2  # pixels to every side
SIZE, STEPS, SEED = 128, 600, 0
RATES = (2e-3, 4e-3, 1e-3)

Change = Callable[[Sequence[DyHeadBlock]], None]


def _same(blocks: Sequence[DyHeadBlock]) -> None:
    """The first weights as they are."""


def _large(blocks: Sequence[DyHeadBlock]) -> None:
    for block in blocks:
        for branch in (block.low, block.mid, block.high):
            nn.init.constant_(branch.norm.weight, 3.5)


def _large_last(blocks: Sequence[DyHeadBlock]) -> None:
    _large(blocks[-1:])


def _strong_own_level(blocks: Sequence[DyHeadBlock]) -> None:
    for block in blocks:
        nn.init.constant_(block.mid.norm.weight, 5.0)


@dataclass(frozen=True)
class Row:
    """First weights that detectors are trained from.

    Attributes:
        label: in the table.
        blocks: of the head; 0: two towers of four convolutions.
        init: see :class:`dyhead_cuda.DyHead`.
        change: of the weights after it.
        rates: the learning rates, of :data:`RATES`.
    """

    label: str
    blocks: int
    init: Init = "mmdet"
    change: Change = _same
    rates: tuple[float, ...] = RATES[:1]


ROWS = {
    "plain": Row("plain, two towers of 4", 0, rates=RATES),
    "two": Row("DyHead, 2 blocks", 2, rates=RATES),
    "two-local": Row('DyHead, 2 blocks, `init="local"`', 2, "local", rates=RATES),
    "six": Row("DyHead, 6 blocks", 6, rates=RATES),
    "six-local": Row('DyHead, 6 blocks, `init="local"`', 6, "local", rates=RATES),
    "six-large": Row("DyHead, 6 blocks, normalisations of weight 3.5", 6, change=_large),
    "six-large-last": Row("the same in the last block alone", 6, change=_large_last),
    "six-strong": Row(
        "DyHead, 6 blocks, the own level five times as strong, but no identity",
        6,
        change=_strong_own_level,
    ),
    "six-identity": Row(
        "DyHead, 6 blocks, the identity, but all levels equally strong",
        6,
        "local",
        _large,
    ),
}


def blur(init: Init, blocks: int = BLOCKS) -> dict[str, float]:
    """What one pixel of the finest level has become after some blocks on white noise.

    Args:
        init: see :class:`dyhead_cuda.DyHead`.
        blocks: how many.

    Returns:
        "correlation" of neighbouring pixels, and shares of the squared gradient of a pixel: "near",
        of the 5 x 5 pixels around it, and "other", of the other levels.
    """
    torch.manual_seed(SEED)
    head = DyHead(CHANNELS, CHANNELS, blocks, init=init)
    levels = [torch.randn(4, CHANNELS, SIDE >> i, SIDE >> i, requires_grad=True) for i in range(5)]
    finest = head(levels)[0]
    assert isinstance(finest, torch.Tensor)
    inner = finest.detach()[:, :, 4:-4, 4:-4]
    inner = inner - inner.mean((0, 2, 3), keepdim=True)
    middle = SIDE // 2
    pixel = (finest[:, :, middle, middle] * torch.randn(CHANNELS)).sum()
    energy = [g.square().sum((0, 1)) for g in torch.autograd.grad(pixel, levels)]
    near = slice(middle - NEAR, middle + NEAR + 1)
    total = float(torch.stack([e.sum() for e in energy]).sum())
    correlation = (inner[..., :-1] * inner[..., 1:]).mean() / inner.square().mean()
    return {
        "correlation": float(correlation),
        "near": float(energy[0][near, near].sum()) / total,
        "other": 1 - float(energy[0].sum()) / total,
    }


def _configs(row: Row, rate: float, steps: int) -> tuple[ModelConfig, TrainConfig]:
    model = ModelConfig(
        "atss",
        10,
        "timm/test_resnet.r160_in1k",
        last_level=6,
        channels=CHANNELS,
        blocks=row.blocks,
        init=row.init,
        min_size=SIZE,
        max_size=SIZE,
    )
    return model, TrainConfig(steps=steps, lr=rate, seed=SEED, device="cpu")


def _data(images: int, val_images: int) -> DataConfig:
    options = {"size": [SIZE, SIZE], "heights": [16, 0.8 * SIZE], "cache": True}
    return DataConfig("digits", options, {"num_images": images}, {"num_images": val_images})


def average_precision(
    name: str, rate: float, folder: Path, steps: int = STEPS, images: int = 3000
) -> float:
    """AP of a detector after a short training; one that is there goes on or is read.

    Args:
        name: of :data:`ROWS`.
        rate: the learning rate.
        folder: of all trainings.
        steps: of the training.
        images: to train on; a twelfth as many are measured on.
    """
    model, config = _configs(ROWS[name], rate, steps)
    data = _data(images, max(1, images // 12))
    torch.manual_seed(SEED)
    network = build(model)
    with torch.no_grad():
        ROWS[name].change([m for m in network.modules() if isinstance(m, DyHeadBlock)])
    dataset: DetectionDataset = data.open("val")
    start = Start(f"first weights {name}", network.state_dict(), tuple(dataset.classes), model)
    metrics = train(config, model, data, folder / f"{name}-lr-{rate:g}", start=start)
    return float(metrics.summary["AP"])


def section(found: dict[str, Any]) -> str:
    """The tables, in Markdown."""
    facts = found["environment"]
    blurs = [
        [
            f'`init="{init}"`',
            f"{values['correlation']:.2f}",
            f"{values['near']:.0%}",
            f"{values['other']:.0%}",
        ]
        for init, values in found["blur"].items()
    ]
    rows = []
    for name, row in ROWS.items():
        values = found["ap"].get(name, {})
        shown = [values.get(f"{rate:g}") for rate in RATES]
        rows.append([row.label, *("" if v is None else f"{100 * v:.1f}" for v in shown)])
    return "\n\n".join(
        [
            f"{machine.one_line(facts)}, {facts['date'][:10]}, commit {facts['commit']}:",
            f"    {facts['command']}",
            readme.table(
                [
                    "six blocks, first weights",
                    "correlation of neighbouring pixels of P3",
                    "share of a pixel's gradient from the 5x5 pixels around it",
                    "from other levels",
                ],
                blurs,
            ),
            f"AP in percent after {found['steps']} steps of 8 images, by learning rate; one seed:",
            readme.table(["head", *(f"{rate:g}" for rate in RATES)], rows),
        ]
    )


def run(arguments: argparse.Namespace) -> int:
    """Measures, trains and writes.

    Returns:
        0; 1 if a training failed; 2 if files cannot be used; 130 if it was interrupted.
    """
    try:
        if arguments.write:
            readme.replace_section(arguments.write.read_text(), readme.FIRST_WEIGHTS, "")
        if not arguments.report:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(_measured(arguments), indent=1) + "\n")
        text = section(json.loads(arguments.json.read_text()))
        if arguments.write:
            readme.write_section(arguments.write, readme.FIRST_WEIGHTS, text)
    except (Interrupted, KeyboardInterrupt):
        return fail("stopped; run the same command again to go on", 130)
    except TrainingError as error:
        return fail(error, 1)
    except (RunError, OSError, ValueError, ImportError, readme.SectionError) as error:
        return fail(error)
    print(text)
    return 0


def _measured(arguments: argparse.Namespace) -> dict[str, Any]:
    steps, images = (2, 12) if arguments.quick else (STEPS, 3000)
    facts = machine.environment(arguments.command_line, torch.device("cpu"))
    trials = [(name, rate) for name, row in ROWS.items() for rate in row.rates]
    # Spawn, because torch's threads do not survive a fork; one thread each, as in a study.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        arguments.jobs, context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        futures = [
            pool.submit(average_precision, name, rate, arguments.folder, steps, images)
            for name, rate in trials
        ]
        found: dict[str, dict[str, float]] = {}
        for (name, rate), future in zip(trials, futures, strict=True):
            found.setdefault(name, {})[f"{rate:g}"] = future.result()
            print(f"{ROWS[name].label}, rate {rate:g}: AP {future.result():.1%}", flush=True)
    inits: tuple[Init, ...] = ("mmdet", "local")
    return {
        "environment": facts,
        "steps": steps,
        "blur": {init: blur(init) for init in inits},
        "ap": found,
    }
