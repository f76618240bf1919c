"""Settings of a training, and what follows from them: images, learning rates, optimizers."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import nn

from dyhead_cuda import DyHead
from dyhead_cuda.detection.data import DataConfig, HorizontalFlip
from dyhead_cuda.detection.training.config import TrainConfig
from dyhead_cuda.detection.training.recipe import (
    Stream,
    batches,
    evaluation_due,
    learning_rate,
    make_optimizer,
)
from tests.helpers.detection.trainees import IMAGES, Detector, Pictures


def test_every_epoch_has_each_image_once() -> None:
    streams = [[Stream(Pictures(), seed).index(i) for i in range(4 * IMAGES)] for seed in (1, 1, 2)]
    assert streams[0] == streams[1] != streams[2]
    epochs = [streams[0][i : i + IMAGES] for i in range(0, 4 * IMAGES, IMAGES)]
    assert all(sorted(epoch) == list(range(IMAGES)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_what_items_draw_depends_on_their_position_alone() -> None:
    """Mirrored or not: the same in any order; and what steps draw is not touched."""
    before = torch.get_rng_state()
    forwards, backwards = (Stream(HorizontalFlip(Pictures()), 1) for _ in range(2))
    items = [forwards[i][1]["boxes"] for i in range(30)]
    assert all(torch.equal(backwards[i][1]["boxes"], items[i]) for i in reversed(range(30)))
    mirrored = [not torch.equal(items[i], Stream(Pictures(), 1)[i][1]["boxes"]) for i in range(30)]
    assert 5 < sum(mirrored) < 25
    assert torch.equal(torch.get_rng_state(), before)


def test_processes_share_the_batch_of_one() -> None:
    alone = list(batches(TrainConfig(9, batch_size=6), start=2))
    shares = [batches(TrainConfig(9, batch_size=2), 2, rank, 3) for rank in range(3)]
    assert [[*a, *b, *c] for a, b, c in zip(*shares, strict=True)] == alone
    assert alone == list(batches(TrainConfig(9, batch_size=6), start=0))[2:]
    assert [i for batch in alone for i in batch] == list(range(12, 54))


def test_learning_rates() -> None:
    config = TrainConfig(100, lr=1.0, warmup_steps=10)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[0] == pytest.approx(0.1, rel=0.01)
    assert rates[9] == rates[10] == 1
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.5)
    assert 0 < rates[99] < 0.001
    config = TrainConfig(120, lr=1.0, warmup_steps=0, schedule="step")
    rates = [learning_rate(config, step) for step in (0, 79, 80, 109, 110, 119)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_optimizers_leave_out_what_is_frozen(name: Any) -> None:
    model = Detector()
    optimizer = make_optimizer(TrainConfig(1, optimizer=name, weight_decay=0.3), model)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    expected = {id(p): 0.3 if p.ndim > 1 else 0 for p in model.parameters() if p.requires_grad}
    assert decay == expected
    assert 0 < len(expected) < len(list(model.parameters()))


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_offsets_learn_slower(name: Any) -> None:
    head = DyHead(4, 4, 2, num_groups=2)
    optimizer = make_optimizer(TrainConfig(1, optimizer=name, offset_lr=0.2), head)
    factors = {id(p): g["lr_factor"] for g in optimizer.param_groups for p in g["params"]}
    for parameter_name, parameter in head.named_parameters():
        assert factors[id(parameter)] == (0.2 if ".offset_conv." in parameter_name else 1)
    assert len(optimizer.param_groups) == 4


def test_the_body_learns_at_a_rate_of_its_own() -> None:
    model = nn.Module()
    model.backbone = nn.Module()
    model.backbone.body = nn.Sequential(nn.Conv2d(4, 4, 3), DyHead(4, 4, 1, num_groups=2))
    model.backbone.dyhead = DyHead(4, 4, 1, num_groups=2)
    config = TrainConfig(1, offset_lr=0.5, body_lr=0.25)
    factors = {
        id(p): g["lr_factor"]
        for g in make_optimizer(config, model).param_groups
        for p in g["params"]
    }
    for name, parameter in model.named_parameters():
        expected = (0.5 if ".offset_conv." in name else 1) * (0.25 if ".body." in name else 1)
        assert factors[id(parameter)] == expected, name
    with pytest.raises(
        ValueError, match=r"model with backbone\.body for body_lr 0\.25, got Linear"
    ):
        make_optimizer(config, nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("steps", "every", "expected"),
    [
        (1000, 333, [333, 666, 1000]),  # not after 999 too
        (1000, 600, [600, 1000]),
        (1000, 700, [1000]),
        (12, 4, [4, 8, 12]),
        (6, 4, [4, 6]),  # half of it before the end is enough
        (5, 4, [5]),
        (3, None, [3]),
        (3, 1, [1, 2, 3]),
    ],
)
def test_when_a_model_is_evaluated(steps: int, every: int | None, expected: list[int]) -> None:
    config = TrainConfig(steps, eval_every=every)
    assert [step for step in range(steps + 1) if evaluation_due(config, step)] == expected


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"batch_size": 0},
        {"lr": 0},
        {"offset_lr": -0.1},
        {"body_lr": -0.1},
        {"ema": 1.0},
        {"ema": -0.1},
        {"ema": math.nan},
        {"lr": math.nan},
        {"clip_norm": -1},
        {"amp": "half"},
        {"device": "tpu"},
        {"optimizer": "lion"},
        {"eval_every": 0},
        {"weight_decay": -1},
        {"schedule": "linear"},
        {"seed": -1},
    ],
)
def test_settings_out_of_range(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=f"expected .*{name}"):
        TrainConfig(**{"steps": 5, **wrong})


def test_settings_survive_json() -> None:
    config = TrainConfig(7, lr=0.1, clip_norm=None, eval_every=3)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="epochs"):
        TrainConfig.from_dict({"steps": 7, "epochs": 2})


def test_a_model_without_parameters_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="parameters"):
        make_optimizer(TrainConfig(1), nn.Linear(2, 2).requires_grad_(False))


def test_data_of_a_run() -> None:
    config = DataConfig("digits", {"size": [48, 64]}, {"num_images": 3}, {"num_images": 2})
    again = DataConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert [len(again.open(split)) for split in ("train", "val")] == [3, 2]
    assert again.open("val")[0][0].shape == (3, 48, 64)
    mirrored = DataConfig("digits", config.options, config.train, config.val, flip=True)
    assert isinstance(mirrored.open("train"), HorizontalFlip)
    assert not isinstance(mirrored.open("val"), HorizontalFlip)


@pytest.mark.parametrize("split", ["test", "flip", "spec"])
def test_an_unknown_split_is_refused(split: str) -> None:
    with pytest.raises(ValueError, match=r"expected split to be one of \('train', 'val'\)"):
        DataConfig("digits").open(split)  # type: ignore[arg-type]


def test_unknown_and_missing_settings_of_data_are_named() -> None:
    with pytest.raises(ValueError, match=r"settings among .*'flip'.*, got \['flipped'\]"):
        DataConfig.from_dict({"spec": "digits", "flipped": True})
    with pytest.raises(ValueError, match=r"\['spec'\], which are missing"):
        DataConfig.from_dict({"flip": True})
