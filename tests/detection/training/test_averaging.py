"""Averages of the weights: their values, what is measured and kept, and exact resume."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dyhead_cuda.detection import DataConfig, ModelConfig, TrainConfig, load_model, train
from dyhead_cuda.detection.training import runs, trainer
from dyhead_cuda.detection.training.averaging import average_of
from dyhead_cuda.detection.training.parallel import join
from tests.helpers.detection import trainees
from tests.helpers.detection.runs import assert_same_run, curve
from tests.helpers.detection.stops import stop_at
from tests.helpers.detection.trainees import Detector, Pictures, make_trainer, recipe, run

DECAY = 0.6  # that the ramp reaches at the thirteenth update


class Counted(nn.Module):
    """With what models have: trained and frozen parameters, statistics, counters and indices."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("index", torch.tensor([5, 7, 123457]))
        self.register_buffer("mask", torch.tensor([True, False]))


def by_definition(values: Sequence[Tensor], decay: float) -> Tensor:
    average = values[0].double()
    for t, value in enumerate(values[1:], 1):
        d = min(decay, (1 + t) / (10 + t))
        average = d * average + (1 - d) * value.double()
    return average


def test_averages_are_those_of_the_formula() -> None:
    model = Counted()
    average = average_of(model, DECAY)
    seen: list[dict[str, Tensor]] = []
    for _ in range(30):
        with torch.no_grad():
            model.weight.add_(torch.randn(3))
        model.norm(torch.randn(4, 3) + 2)
        average.update_parameters(model)
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
    found = average.module.state_dict()
    for name in ("weight", "norm.running_mean", "norm.running_var"):
        expected = by_definition([state[name] for state in seen], DECAY)
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-5, atol=1e-6)
        assert not torch.equal(found[name], seen[-1][name])
    for name in ("frozen", "index", "mask", "norm.num_batches_tracked"):
        assert torch.equal(found[name], seen[-1][name]), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 12 steps."""
    folder = tmp_path_factory.mktemp("averaged") / "run"
    run(folder, recipe(ema=DECAY))
    return folder


def test_training_is_not_changed_by_it(whole: Path, tmp_path: Path) -> None:
    run(tmp_path, recipe())
    last, plain = (runs.read_checkpoint(folder / runs.LAST) for folder in (whole, tmp_path))
    assert "unaveraged" not in plain
    assert all(torch.equal(x, last["unaveraged"][name]) for name, x in plain["model"].items())
    assert not torch.equal(last["model"]["box.weight"], plain["model"]["box.weight"])
    losses = [[r["loss"] for r in curve(folder) if "loss" in r] for folder in (whole, tmp_path)]
    assert losses[0] == losses[1]


def test_the_average_is_measured_and_kept(whole: Path, tmp_path: Path) -> None:
    """The weights of each step are those of a run that saves each of them."""
    states: list[dict[str, Tensor]] = []
    with join("cpu") as processes:
        training = make_trainer(tmp_path, recipe(), processes)

        def keep(record: dict[str, Any]) -> None:
            if "loss" in record:
                states.append({k: v.clone() for k, v in training.model.state_dict().items()})

        training.run({}, None, [keep])
    detector = Detector()
    detector.load_state_dict(
        {name: by_definition([s[name] for s in states], DECAY).float() for name in states[0]}
    )
    measured = curve(whole)[-1]["evaluation"]["summary"]["AP"]
    assert measured == pytest.approx(trainees.evaluate(detector, Pictures()).summary["AP"], 1e-4)
    aps = {r["step"]: r["evaluation"]["summary"]["AP"] for r in curve(whole) if "evaluation" in r}
    best = runs.read_checkpoint(whole / runs.BEST)
    assert best["ap"] == max(aps.values())
    detector.load_state_dict(best["model"])
    assert trainees.evaluate(detector, Pictures()).summary["AP"] == best["ap"]


@pytest.mark.parametrize("step", [1, 4, 9])
def test_a_resumed_run_is_the_uninterrupted_one(step: int, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(trainer.Interrupted):
        run(tmp_path, recipe(ema=DECAY), listeners=[stop_at(step)])
    run(tmp_path, recipe(ema=DECAY))
    assert_same_run(tmp_path, whole)


def test_a_run_without_average_gets_none(tmp_path: Path) -> None:
    run(tmp_path, recipe(3))
    with pytest.raises(runs.RunError, match=r"training\.ema is 0\.0, got 0\.5"):
        run(tmp_path, recipe(3, ema=0.5))


def test_a_detector_is_averaged_and_loaded(tmp_path: Path) -> None:
    """Deep copies, frozen parts and what is loaded, of a real one."""
    small: dict[str, Any] = {"last_level": 4, "channels": 16, "blocks": 1, "max_size": 64}
    model = ModelConfig("atss", 10, "timm/test_resnet.r160_in1k", min_size=64, **small)
    data = DataConfig("digits", {"size": [64, 64], "num_images": 2})
    config = TrainConfig(3, batch_size=2, device="cpu", ema=0.9, body_lr=0, warmup_steps=0)
    train(config, model, data, tmp_path)
    checkpoint = runs.read_checkpoint(tmp_path / runs.LAST)
    for path in (tmp_path, tmp_path / runs.LAST):
        detector, _ = load_model(path)
        found = detector.state_dict()
        assert all(torch.equal(found[name], x) for name, x in checkpoint["model"].items())
    differing = {n for n, x in checkpoint["unaveraged"].items() if not torch.equal(x, found[n])}
    parameters = {n for n in differing if n in dict(detector.named_parameters())}
    assert len(parameters) > 10
    assert not any(name.startswith("backbone.body.") for name in parameters)  # its rate is 0
    assert any("running_var" in name for name in differing)
