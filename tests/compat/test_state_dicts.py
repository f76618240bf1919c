"""State dicts of the public code bases: found, converted, converted back, and refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dyhead_cuda
from dyhead_cuda import DyHead, compat
from tests.helpers.published import (
    glip,
    microsoft,
    mmdet,
    mmdet_main,
)
from tests.helpers.published_models import (
    CHANNELS,
    assert_close,
    assert_same,
    glip_model,
    language_model,
    microsoft_model,
    mmdet_model,
    pyramid,
    randomised,
    ultralytics_model,
)


def run_published(model: nn.Module, levels: list[Tensor]) -> list[Tensor]:
    if isinstance(model, microsoft.DyHead):
        return list(model({f"p{i}": x for i, x in enumerate(levels)}).values())
    if isinstance(model, nn.ModuleDict):
        return list(model["dyhead"](levels))
    tower = model.dyhead_tower if isinstance(model, glip.DyHead) else model
    return list(tower(levels))


SINGLE: dict[str, tuple[Callable[[], nn.Module], Callable[..., DyHead], Callable[..., Any]]] = {
    "microsoft": (microsoft_model, compat.from_microsoft, compat.to_microsoft),
    "glip": (glip_model, compat.from_glip, compat.to_glip),
    "mmdet": (mmdet_model, compat.from_mmdet, compat.to_mmdet),
    "ultralytics": (ultralytics_model, compat.from_ultralytics, compat.to_ultralytics),
}
each_code_base = pytest.mark.parametrize("name", SINGLE)


def tower_of(model: nn.Module) -> dict[str, Tensor]:
    return {
        key: value
        for key, value in model.state_dict().items()
        if key.startswith(("dyhead_tower.", "dyhead_blocks.", "dyhead."))
    }


@each_code_base
def test_converted_head_computes_the_published_numbers(name: str) -> None:
    make, from_, _ = SINGLE[name]
    model, levels = make(), pyramid()
    head = from_(model.state_dict())
    assert len(head.blocks) == 2
    assert_close(head(levels), run_published(model, levels))


@each_code_base
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_round_trip_is_exact(name: str, dtype: torch.dtype) -> None:
    make, from_, to = SINGLE[name]
    model = make().to(dtype)
    assert_same(to(from_(model.state_dict())), tower_of(model))


@each_code_base
def test_head_round_trip_is_exact(name: str) -> None:
    _, from_, to = SINGLE[name]
    head = DyHead(CHANNELS, CHANNELS, 3, deform_bias=name not in ("mmdet", "ultralytics"))
    randomised(head, torch.float32)
    assert_same(from_(to(head)).state_dict(), head.state_dict())


def test_language_aware_tower_round_trip() -> None:
    model, levels = language_model(), pyramid()
    head = compat.from_glip(model.state_dict())
    blocks = list(model.get_submodule("dyhead_tower").children())[2::3]
    assert len(head.blocks) == len(blocks) == 2
    expected = {"visual": levels, "lang": None}
    for block in blocks:
        expected = block(expected)
    visual = expected["visual"]
    assert isinstance(visual, list)
    assert_close(head(levels), visual)
    back = compat.to_glip(head, indices=(2, 5))
    original = model.state_dict()
    assert {key.split(".")[1] for key in back} == {"2", "5"}
    assert_same(back, {key: original[key] for key in back})


def test_more_than_ten_blocks_keep_their_order() -> None:
    head = randomised(DyHead(16, 16, 12), torch.float32)
    assert isinstance(head, DyHead)
    shuffled = dict(sorted(compat.to_microsoft(head).items()))
    assert next(iter(shuffled)).startswith("dyhead_tower.0.")
    assert_same(compat.from_microsoft(shuffled).state_dict(), head.state_dict())


@pytest.mark.parametrize(
    "prefix", ["", "dyhead_tower.", "module.backbone.dyhead_tower.", "0.", "a.DyConv.", "mat."]
)
def test_prefixes_are_found(prefix: str) -> None:
    head = DyHead(16, 16, 2)
    state = compat.to_microsoft(head, prefix=prefix)
    state |= {"module.backbone.conv1.weight": torch.ones(2), "iteration": torch.tensor(3)}
    assert_same(compat.from_microsoft(state).state_dict(), head.state_dict())


@pytest.mark.parametrize("prefix", ["", "block.", "neck.1.head."])
def test_bare_block(prefix: str) -> None:
    block = microsoft.DyConv(CHANNELS, CHANNELS)
    head = compat.from_microsoft({prefix + k: v for k, v in block.state_dict().items()})
    assert len(head.blocks) == 1
    back = compat.to_microsoft(head, prefix="")
    assert_same({key.removeprefix("0."): v for key, v in back.items()}, block.state_dict())


def test_single_block_by_prefix() -> None:
    model = microsoft_model()
    for prefix in ("dyhead_tower.1.", "dyhead_tower.1"):
        head = compat.from_microsoft(model.state_dict(), prefix=prefix)
        assert len(head.blocks) == 1
        key = "dyhead_tower.1.offset.weight"
        assert torch.equal(
            head.state_dict()["blocks.0.offset_conv.weight"], model.state_dict()[key]
        )


@pytest.mark.parametrize(
    "nest",
    [
        lambda sd: {"state_dict": sd, "meta": {"epoch": 1}},
        lambda sd: {"model": sd, "optimizer": {"state": {}}},
        lambda sd: {"model": {"state_dict": sd}},
        lambda sd: {"model": {"other": torch.ones(1)}, "state_dict": sd},
        lambda sd: {**sd, "model": {"other": torch.ones(1)}},
    ],
)
def test_nested_checkpoints(nest: Callable[[Any], Any]) -> None:
    model = microsoft_model()
    head = compat.from_microsoft(nest(model.state_dict()))
    assert_same(compat.to_microsoft(head), tower_of(model))


def test_numpy_checkpoint() -> None:
    model = microsoft_model().float()
    arrays = {key: value.numpy() for key, value in model.state_dict().items()}
    for array in arrays.values():
        array.flags.writeable = False
    head = compat.from_microsoft({"model": arrays, "__author__": "x", "matching_heuristics": True})
    assert_same(compat.to_microsoft(head), tower_of(model))


def test_the_head_owns_its_parameters() -> None:
    state = microsoft_model().state_dict()
    before = {key: value.clone() for key, value in state.items()}
    head = compat.from_microsoft(state)
    exported = compat.to_microsoft(head)
    with torch.no_grad():
        for parameter in head.parameters():
            assert parameter.requires_grad
            assert parameter.is_contiguous()
            parameter.zero_()
    assert_same(state, before)
    assert exported["dyhead_tower.0.offset.weight"].any()


def test_random_state_is_untouched() -> None:
    state, before = microsoft_model().state_dict(), torch.get_rng_state()
    compat.from_microsoft(state)
    assert torch.equal(torch.get_rng_state(), before)


def test_mixed_dtypes_are_kept() -> None:
    state = {
        k: v.float() if "bn" in k else v.half() for k, v in tower_of(microsoft_model()).items()
    }
    assert_same(compat.to_microsoft(compat.from_microsoft(state)), state)


def test_high_offset_follows_the_version() -> None:
    model, levels = mmdet_model(), pyramid()
    state = model.state_dict()
    for version in ("2.x", "2.28.2", "3.x", "3.0.0rc5", "3.2.0", "3.3.0"):
        assert {b.high_offset for b in compat.from_mmdet(state, version=version).blocks} == {"flat"}
    main = mmdet_main.DyHead(CHANNELS, CHANNELS, 2).double()
    main.load_state_dict(state)
    head = compat.from_mmdet(state, version="main")
    assert {block.high_offset for block in head.blocks} == {"mmdet_main"}
    assert_close(head(levels), list(main(levels)))
    assert (head(levels)[0] - model(levels)[0]).abs().max() > 1e-3
    assert_same(compat.to_mmdet(head), state)


@pytest.mark.parametrize("version", ["1.2.0", "3.3.1", "3.4", "4.x", "master", "", "3.3.0+cu118"])
def test_unknown_versions_are_refused(version: str) -> None:
    with pytest.raises(ValueError, match=r'"2.x" to "3.3.0".*"main"'):
        compat.from_mmdet(mmdet_model().state_dict(), version=version)


def test_other_input_channels() -> None:
    model, levels = mmdet_model(48), pyramid(48)
    head = compat.from_mmdet(model.state_dict())
    assert (head.in_channels, head.out_channels) == (48, CHANNELS)
    assert_close(head(levels), list(model(levels)))
    assert_same(compat.to_mmdet(head), tower_of(model))
    for to in (compat.to_microsoft, compat.to_glip):
        with pytest.raises(ValueError, match=r"got 48 and 32 in block 0"):
            to(head)


def test_other_groups() -> None:
    model, levels = randomised(glip.DyHead(CHANNELS, 2, groups=8)), pyramid()
    head = compat.from_glip(model.state_dict(), num_groups=8)
    assert_close(head(levels), run_published(model, levels))
    assert_same(compat.to_glip(head), tower_of(model))
    for to in (compat.to_microsoft, compat.to_mmdet):
        with pytest.raises(ValueError, match=r"num_groups 16.*got 8 in block 0"):
            to(head)


def test_zero_biases_for_a_head_without() -> None:
    head, levels = compat.from_mmdet(mmdet_model().state_dict()), pyramid()
    state = compat.to_microsoft(head)
    assert not state["dyhead_tower.1.DyConv.2.conv.bias"].any()
    assert state["dyhead_tower.1.DyConv.2.conv.bias"].dtype == torch.float64
    model = microsoft.DyHead(nn.Identity(), CHANNELS, 2).double()
    model.load_state_dict(state)
    assert_close(run_published(model, levels), head(levels))


def test_biases_that_cancel_are_dropped_and_others_refused() -> None:
    head, levels = compat.from_microsoft(microsoft_model().state_dict()), pyramid()
    with pytest.raises(ValueError, match=r"16 normalisation groups.*block 0, branch low"):
        compat.to_mmdet(head)
    for key, parameter in head.named_parameters():
        if key.endswith(("low.bias", "mid.bias", "high.bias")):
            constant = torch.arange(16.0).repeat_interleave(CHANNELS // 16)
            parameter.data.copy_(constant)
    model = mmdet.DyHead(CHANNELS, CHANNELS, 2).double()
    model.load_state_dict(compat.to_mmdet(head))
    assert_close(list(model(levels)), head(levels))
    head.get_parameter("blocks.1.high.bias").data[3] += 1e-6
    with pytest.raises(ValueError, match=r"block 1, branch high"):
        compat.to_mmdet(head)


def test_unrepresentable_settings_are_refused() -> None:
    for to in (compat.to_microsoft, compat.to_glip, compat.to_mmdet):
        for high_offset in ("crop", "aligned"):
            with pytest.raises(ValueError, match=f"high_offset.*got '{high_offset}' in block 0"):
                to(DyHead(32, 32, 1, deform_bias=False, high_offset=high_offset))
        with pytest.raises(ValueError, match="eps"):
            to(DyHead(32, 32, 1, deform_bias=False, eps=1e-3))
        with pytest.raises(ValueError, match=r"dynamic ReLU 8, .*got 4"):
            to(DyHead(32, 32, 1, deform_bias=False, reduction=8))
        with pytest.raises(TypeError, match="DyHead"):
            to(nn.Linear(1, 1))  # type: ignore[arg-type]
    for to in (compat.to_microsoft, compat.to_glip):
        with pytest.raises(ValueError, match="high_offset 'flat'"):
            to(DyHead(32, 32, 1, high_offset="mmdet_main"))
    with pytest.raises(ValueError, match="expected 2 different indices"):
        compat.to_glip(DyHead(32, 32, 2), indices=(1, 1))


def test_high_offset_can_be_chosen() -> None:
    head = compat.from_microsoft(microsoft_model().state_dict(), high_offset="aligned")
    assert {block.high_offset for block in head.blocks} == {"aligned"}


def test_several_towers() -> None:
    one, two = compat.to_microsoft(DyHead(16, 16, 2)), compat.to_microsoft(DyHead(16, 16, 3))
    state = one | {f"ema.{key}": value for key, value in two.items()}
    with pytest.raises(ValueError, match=r'several: "dyhead_tower.", "ema.dyhead_tower.".*prefix='):
        compat.from_microsoft(state)
    assert len(compat.from_microsoft(state, prefix="dyhead_tower.").blocks) == 2
    assert len(compat.from_microsoft(state, prefix="ema").blocks) == 3
    with pytest.raises(ValueError, match=r'under prefix "none.", found .*"ema.dyhead_tower."'):
        compat.from_microsoft(state, prefix="none")


def test_wrong_function_names_the_right_one() -> None:
    with pytest.raises(ValueError, match=r"use compat.from_mmdet"):
        compat.from_microsoft(mmdet_model().state_dict())
    with pytest.raises(ValueError, match=r"use compat.from_mmdet"):
        compat.from_glip({"state_dict": mmdet_model().state_dict()})
    with pytest.raises(ValueError, match=r"use compat.from_microsoft"):
        compat.from_mmdet(microsoft_model().state_dict())
    with pytest.raises(ValueError, match=r"use compat.from_glip"):
        compat.from_microsoft(language_model().state_dict())
    with pytest.raises(ValueError, match=r"DyHead\(...\).load_state_dict"):
        compat.from_microsoft(DyHead(16, 16, 1).state_dict())


def test_no_tower() -> None:
    with pytest.raises(ValueError, match=r'such as "<prefix>DyConv.0.conv.weight".*"bias"'):
        compat.from_microsoft(nn.Linear(2, 2).state_dict())
    with pytest.raises(ValueError, match=r"found 0 keys"):
        compat.from_mmdet({})
    with pytest.raises(TypeError, match=r"got DyHead; pass model.state_dict\(\)"):
        compat.from_microsoft(microsoft_model())  # type: ignore[arg-type]


@each_code_base
def test_missing_key(name: str) -> None:
    make, from_, _ = SINGLE[name]
    state = make().state_dict()
    lost = [key for key in state if ".1." in key and "attn_module.1.bias" in key.lower()]
    lost = lost or [key for key in state if key.endswith("tower.1.AttnConv.1.bias")]
    del state[lost[-1]]
    with pytest.raises(ValueError, match=r"1\.\", found \d+ without \w+\.1\.bias"):
        from_(state)


def test_missing_block() -> None:
    state = compat.to_microsoft(DyHead(16, 16, 4))
    for missing in ((0,), (2,), (0, 1)):
        part = {k: v for k, v in state.items() if int(k.split(".")[1]) not in missing}
        with pytest.raises(ValueError, match=rf"without \[{missing[0]}.*prefix="):
            compat.from_microsoft(part)
    # Other modules may come first in a Sequential.
    state = compat.to_microsoft(DyHead(16, 16, 2), prefix="")
    moved = {f"{int(k[0]) + 1}{k[1:]}": v for k, v in state.items()} | {"0.weight": torch.ones(1)}
    assert len(compat.from_microsoft(moved).blocks) == 2


def test_other_layers_in_a_block_are_refused() -> None:
    batch_norm = glip.DyHead(CHANNELS, 1, norm="bn").state_dict()
    with pytest.raises(ValueError, match=r"DyConv.0.bn.running_mean.*USE_GN"):
        compat.from_glip(batch_norm)
    plain = glip.DyHead(CHANNELS, 1, use_deform=False, use_dyrelu=False).state_dict()
    with pytest.raises(ValueError, match=r"without relu.fc.0.weight.*offset.bias.*USE_DFCONV"):
        compat.from_glip(plain)
    spatial = microsoft_model().state_dict()
    spatial["dyhead_tower.0.relu.spa.0.weight"] = torch.ones(1, CHANNELS, 1, 1)
    with pytest.raises(ValueError, match=r"relu.spa.0.weight"):
        compat.from_microsoft(spatial)


def test_wrong_shapes_and_dtypes() -> None:
    state = microsoft_model().state_dict()
    key = "dyhead_tower.1.DyConv.2.bn.weight"
    with pytest.raises(ValueError, match=rf'"{key}" of shape \[32\].*got \[31\]'):
        compat.from_microsoft(state | {key: torch.ones(31)})
    key = "dyhead_tower.0.AttnConv.1.weight"
    with pytest.raises(ValueError, match=rf'"{key}" of shape \[1, 32, 1, 1\].*got \[1, 32\]'):
        compat.from_microsoft(state | {key: torch.ones(1, 32)})
    with pytest.raises(ValueError, match=rf'floating-point .* "{key}", got torch.int8'):
        compat.from_microsoft(state | {key: torch.ones(1, 32, 1, 1, dtype=torch.int8)})
    with pytest.raises(ValueError, match=rf'floating-point .* "{key}", got list'):
        compat.from_microsoft(state | {key: [1.0]})
    with pytest.raises(ValueError, match="num_groups"):
        compat.from_microsoft(state, num_groups=5)
    key = "dyhead_tower.0.relu.fc.0.weight"
    with pytest.raises(ValueError, match="no whole reduction"):
        compat.from_microsoft(state | {key: torch.ones(17, 32)})
    key = "dyhead_tower.0.DyConv.1.conv.weight"
    with pytest.raises(ValueError, match=r"\[C_out, C_in, 3, 3\].*got \[32\]"):
        compat.from_microsoft(state | {key: torch.ones(32)})


def test_public_names() -> None:
    assert dyhead_cuda.accelerate is compat.accelerate
    assert sorted(compat.__all__) == [
        "accelerate",
        "from_glip",
        "from_microsoft",
        "from_mmdet",
        "from_mmdet_glip",
        "from_ultralytics",
        "load_checkpoint",
        "to_glip",
        "to_microsoft",
        "to_mmdet",
        "to_mmdet_glip",
        "to_ultralytics",
    ]
