"""Parameters: their modules, their names now and before, and modules that are built on "meta"."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dyhead_cuda import DyHead, DyHeadBlock, UnifiedDyHead
from dyhead_cuda.modules import ATTENTIONS, Attention, DeformBranch, LeftOut
from tests.helpers.compare import assert_close
from tests.helpers.inputs import halving_sizes, random_pyramid
from tests.helpers.modules import randomise


def make_head(**options: Any) -> DyHead:
    head = DyHead(4, 8, 2, num_groups=2, **options)
    randomise(head)
    return head


def features(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return random_pyramid(2, 4, halving_sizes(9, 6, 3), dtype)


def old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names that norms had when they were parameters of their branch."""
    return {key.replace(".norm.", ".norm_"): value for key, value in state.items()}


def test_norms_are_modules() -> None:
    """Recipes find what has no weight decay by the type of its module."""
    head = make_head()
    norms = [m for m in head.modules() if isinstance(m, nn.GroupNorm)]
    assert len(norms) == 2 * 3
    assert {(m.num_groups, m.num_channels, m.eps) for m in norms} == {(2, 8, 1e-5)}
    in_norms = {id(p) for m in norms for p in m.parameters()}
    vectors = {n for n, p in head.named_parameters() if p.dim() == 1 and not n.endswith("bias")}
    assert {n for n, p in head.named_parameters() if id(p) in in_norms and "weight" in n} == vectors


def test_every_parameter_has_a_type_that_recipes_know() -> None:
    owners = Counter(
        type(module).__name__
        for module in make_head().modules()
        for _ in module.named_parameters(recurse=False)
    )
    assert owners == {"Conv2d": 4, "DeformBranch": 12, "GroupNorm": 12, "Linear": 12}


@pytest.mark.parametrize("make", [make_head, lambda: make_head().blocks[0]])
@pytest.mark.parametrize("assign", [False, True])
def test_old_state_dicts_load(make: Any, assign: bool) -> None:
    source, target = make(), make()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.1)
    old = old_names(source.state_dict())
    assert "low.norm_weight" in str(list(old))
    assert not any(".norm." in key for key in old)
    kept = dict(old)
    target.load_state_dict(old, strict=True, assign=assign)
    assert list(old) == list(kept), "the caller's state dict was changed"
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value)


def test_old_state_dicts_load_inside_a_model() -> None:
    source = nn.ModuleDict({"neck": nn.Sequential(make_head())})
    target = copy.deepcopy(source)
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.zero_()
    target.load_state_dict(old_names(source.state_dict()))
    for a, b in zip(target.parameters(), source.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_is_missing_or_too_much_is_named() -> None:
    head, state = make_head(), make_head().state_dict()
    del state["blocks.0.mid.norm.bias"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"blocks\.0\.mid\.norm\.bias"'):
        head.load_state_dict(state)
    state = make_head().state_dict()
    state["blocks.0.mid.norm_scale"] = torch.ones(8)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"blocks\.0\.mid\.norm_scale"'):
        head.load_state_dict(state)


def test_the_order_of_parameters_is_that_of_before() -> None:
    """Optimizers keep their state by the place of a parameter."""
    names = [name for name, _ in DyHeadBlock(4, 8, num_groups=2).named_parameters()]
    branch = ["weight", "bias", "norm.weight", "norm.bias"]
    assert names == [
        *(f"offset_conv.{n}" for n in ("weight", "bias")),
        *(f"{b}.{n}" for b in ("low", "mid", "high") for n in branch),
        *(f"scale_gate.{n}" for n in ("weight", "bias")),
        *(f"dynamic_relu.{layer}.{n}" for layer in ("fc1", "fc2") for n in ("weight", "bias")),
    ]


# --- parameters that are set later ----------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_reset_parameters_of_a_branch(bias: bool) -> None:
    torch.manual_seed(0)
    branch = DeformBranch(16, 32, bias, num_groups=4)
    fresh = branch.weight.detach().clone()
    bound = 1 / (9 * 16) ** 0.5
    randomise(branch)
    torch.manual_seed(0)
    branch.reset_parameters()
    assert torch.equal(branch.weight, fresh)
    assert 0.9 * bound < branch.weight.abs().max() <= bound
    assert branch.bias is None or not branch.bias.any()


@pytest.mark.parametrize("make", [lambda: DyHead(16, 16, 1), lambda: UnifiedDyHead(3, 16, 1)])
def test_every_module_with_parameters_can_reset_them(make: Any) -> None:
    """What builds a model on "meta" calls reset_parameters of each module that has parameters."""
    with torch.device("meta"):
        head = make()
    head.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.fill_(torch.nan)
    for module in head.modules():
        if list(module.parameters(recurse=False)):
            module.reset_parameters()
    assert all(p.isfinite().all() for p in head.parameters())


LEFT_OUT: list[tuple[Attention, ...]] = [
    tuple(a for a in ATTENTIONS if a != absent) for absent in ATTENTIONS
] + [()]


@pytest.mark.parametrize("attentions", [ATTENTIONS, *LEFT_OUT], ids=str)
@pytest.mark.parametrize("how", ["to_empty", "assign", "to_empty and assign"])
@pytest.mark.parametrize("hooked", [False, True])
def test_built_on_meta(attentions: tuple[Attention, ...], how: str, hooked: bool) -> None:
    whole = make_head(attentions=attentions)
    with torch.device("meta"):
        head = DyHead(4, 8, 2, num_groups=2, attentions=attentions)
    if "to_empty" in how:
        head.to_empty(device="cpu")
        with torch.no_grad():
            for tensor in (*head.parameters(), *head.buffers()):
                tensor.fill_(torch.nan)  # what uninitialised memory may be
    head.load_state_dict(whole.state_dict(), assign="assign" in how)
    if hooked:
        head.get_submodule("blocks.0.mid").register_forward_hook(lambda *_: None)
    assert_close(head(features()), whole(features()), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_is_left_out_follows_the_type_of_the_rest(dtype: torch.dtype) -> None:
    head = make_head(attentions=()).to(dtype)
    assert sum(isinstance(m, LeftOut) for m in head.modules()) == 2 * 3
    assert not list(head.buffers())
    outs = head(features(dtype))
    assert {x.dtype for x in outs} == {dtype}
    assert all(x.isfinite().all() for x in outs)
