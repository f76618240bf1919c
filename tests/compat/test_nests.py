"""Checkpoints as training code nests them, and what is said about those without a tower."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

from dyhead_cuda import DyHead, compat
from dyhead_cuda.compat.towers import NESTS
from tests.helpers.published import glip_language, ultralytics
from tests.helpers.published_models import (
    CHANNELS,
    assert_close,
    assert_same,
    language_model,
    microsoft_model,
    mmdet_glip_model,
    mmdet_model,
    pyramid,
    ultralytics_model,
)

EVERY = ("model", "state_dict", "model_state_dict", "params")
AVERAGES = ("ema_state_dict", "state_dict_ema", "ema", "model_ema")


@pytest.mark.parametrize("key", [*EVERY, *AVERAGES])
def test_every_nest_is_found(key: str) -> None:
    state = compat.to_microsoft(DyHead(16, 16, 2))
    for checkpoint in (
        {key: state},
        {key: state, "epoch": 3, "optimizer_state_dict": {}, "meta": {"cfg": "text"}},
        {key: {"module": 1, "state_dict": {f"module.{k}": v for k, v in state.items()}}},
        {"model": {key: state}},
        {"model": None, "state_dict": {"unrelated": torch.ones(1)}, key: state},
    ):
        found = compat.to_microsoft(compat.from_microsoft(checkpoint))
        assert_same(found, state)
    assert key in NESTS


@pytest.mark.parametrize("key", AVERAGES)
def test_of_two_the_trained_ones_are_taken_and_the_log_says_so(
    key: str, caplog: pytest.LogCaptureFixture
) -> None:
    state = compat.to_microsoft(DyHead(16, 16, 1))
    average = {name: value * 0.5 for name, value in state.items()}
    with caplog.at_level(logging.INFO, "dyhead_cuda"):
        head = compat.from_microsoft({key: average, "state_dict": state})
    assert_same(compat.to_microsoft(head), state)
    assert f'took the parameters under "state_dict"; pass checkpoint["{key}"]' in caplog.text


def test_a_module_in_a_checkpoint_counts_as_its_state_dict() -> None:
    model = ultralytics.DetectDyHead((8, 12), CHANNELS, 2)
    for checkpoint in ({"model": model, "ema": None}, {"model": None, "ema": model}):
        state = compat.to_ultralytics(compat.from_ultralytics(checkpoint))
        own = {k: v for k, v in model.state_dict().items() if k.startswith("dyhead.")}
        assert_same(state, own)


def test_mmdets_glip_is_read_and_written() -> None:
    model, levels = mmdet_glip_model(), pyramid()
    state = {k: v for k, v in model.state_dict().items() if "VLFuse" not in k}
    head = compat.from_mmdet_glip(
        {"state_dict": {f"bbox_head.head.{k}": v for k, v in state.items()}}
    )
    plain: dict[str, Any] = {"visual": levels, "lang": None}
    tower = model.get_submodule("dyhead_tower")
    for index in (2, 5):
        plain = tower.get_submodule(str(index))(plain)
    assert_close(head(levels), plain["visual"])
    again = compat.to_mmdet_glip(head, indices=(2, 5))
    assert_same(again, {key: state[key] for key in again})
    # The same mathematics as GLIP's under other names.
    twin = glip_language.DyConv(CHANNELS, CHANNELS).double()
    first = {k.partition(".0.")[2]: v for k, v in compat.to_glip(head).items() if ".0." in k[:15]}
    twin.load_state_dict(first)
    expected = tower.get_submodule("2")({"visual": levels, "lang": None})["visual"]
    assert_close(twin({"visual": levels, "lang": None})["visual"], expected)


def test_what_a_code_base_cannot_compute_is_not_written() -> None:
    nearest = DyHead(16, 16, 1, upsample="nearest", deform_bias=False)
    for to in (
        compat.to_microsoft,
        compat.to_glip,
        compat.to_mmdet,
        compat.to_mmdet_glip,
        compat.to_ultralytics,
    ):
        with pytest.raises(ValueError, match=r"expected upsample 'bilinear', .*got 'nearest'"):
            to(nearest)
    for narrow in (compat.to_mmdet_glip, compat.to_ultralytics):
        with pytest.raises(ValueError, match="as many input as output channels, got 32 and 16"):
            narrow(DyHead(32, 16, 1, deform_bias=False))
    head = DyHead(32, 32, 1)
    torch.nn.init.normal_(head.get_parameter("blocks.0.mid.bias"))
    with pytest.raises(ValueError, match="so that the normalisation cancels it"):
        compat.to_ultralytics(head)


def test_a_head_can_resize_as_forks_do() -> None:
    state = microsoft_model().state_dict()
    head = compat.from_microsoft(state, upsample="nearest")
    assert {block.upsample for block in head.blocks} == {"nearest"}
    for read, model in (
        (compat.from_glip, language_model()),
        (compat.from_mmdet_glip, mmdet_glip_model()),
        (compat.from_ultralytics, ultralytics_model()),
    ):
        head = read(model.state_dict(), upsample="nearest", high_offset="crop")
        assert {(b.upsample, b.high_offset) for b in head.blocks} == {("nearest", "crop")}


@pytest.mark.parametrize(
    ("read", "make", "name"),
    [
        (compat.from_mmdet, ultralytics_model, "ultralytics"),
        (compat.from_ultralytics, mmdet_model, "mmdet"),
        (compat.from_glip, mmdet_glip_model, "mmdet_glip"),
        (compat.from_mmdet_glip, language_model, "glip"),
    ],
)
def test_the_right_function_is_named(read: Any, make: Any, name: str) -> None:
    state = make().state_dict()
    for checkpoint in (state, {"ema": state}, {"model": None, "ema_state_dict": state}):
        with pytest.raises(ValueError, match=rf"use compat.from_(microsoft|{name})$"):
            read(checkpoint)


def test_a_refusal_says_what_was_found_and_what_to_do() -> None:
    plain = nn.Linear(2, 2).state_dict()
    with pytest.raises(ValueError, match=r"found 2 keys \(\"weight\", \"bias\"\), none of which"):
        compat.from_microsoft(plain)
    with pytest.raises(ValueError, match=r"found 2 keys .*pass the state dict of a model that has"):
        compat.from_microsoft({"model": plain})
    with pytest.raises(
        ValueError,
        match=r'found mappings under "weights" with 2 keys \("weight", "bias"\); pass the',
    ):
        compat.from_microsoft({"weights": plain, "epoch": 3})
    with pytest.raises(
        TypeError, match=r"got str; read a file with compat.load_checkpoint\(path\)"
    ):
        compat.from_microsoft("model.pth")  # type: ignore[arg-type]
    for message in (plain, {"model": plain}, {"weights": plain}):
        with pytest.raises(ValueError) as refusal:  # noqa: PT011 (the text is what is tested)
            compat.from_mmdet(message)
        assert "whole checkpoint" not in str(refusal.value)
