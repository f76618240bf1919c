"""Heads without one or more of the three attentions: the others compute what they always do."""

from __future__ import annotations

import copy
from collections.abc import Collection

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dyhead_cuda import DyHead, DyHeadBlock, backend, compat, functional
from dyhead_cuda.modules import ATTENTIONS, Attention
from tests.helpers.compare import assert_close, gradients
from tests.helpers.inputs import halving_sizes, random_pyramid
from tests.helpers.modules import randomise

SIZES = halving_sizes(9, 6, 3)
PARAMETERS = {"scale": "scale_gate.", "spatial": "offset_conv.", "task": "dynamic_relu."}


def block_with(attentions: Collection[Attention], **options: str) -> DyHeadBlock:
    block = DyHeadBlock(4, 8, num_groups=2, attentions=attentions, **options).double()  # type: ignore[arg-type]
    randomise(block)
    return block


def features(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return random_pyramid(2, 4, SIZES, dtype)


def plain_block(block: DyHeadBlock, levels: list[Tensor]) -> list[Tensor]:
    """The block without offsets and masks, in plain convolutions; gates where it has them."""

    def branch(name: str, x: Tensor, stride: int) -> Tensor:
        part = getattr(block, name)
        y = F.conv2d(x, part.weight, part.bias, stride, padding=1)
        return F.group_norm(y, block.num_groups, part.norm.weight, part.norm.bias, block.eps)

    def gate(y: Tensor) -> Tensor:
        if "scale" not in block.attentions:
            return torch.ones(())
        pooled = block.scale_gate(y.mean((2, 3)))
        return F.hardsigmoid(F.relu(pooled))[:, :, None, None]

    outputs = []
    for index, x in enumerate(levels):
        branches = [branch("mid", x, 1)]
        if index:
            branches.append(branch("low", levels[index - 1], 2))
        if index + 1 < len(levels):
            y = branch("high", levels[index + 1], 1)
            branches.append(F.interpolate(y, x.shape[2:], mode="bilinear", align_corners=True))
        outputs.append(torch.stack([gate(y) * y for y in branches]).mean(0))
    return outputs


@pytest.mark.parametrize("runs", ["reference", "cpu"])
@pytest.mark.parametrize("attentions", [(), ("scale",)], ids=str)
def test_without_spatial_attention_the_branches_are_plain_convolutions(
    attentions: tuple[Attention, ...], runs: str
) -> None:
    block, levels = block_with(attentions), features()
    expected = plain_block(block, levels)
    with backend(runs):  # type: ignore[arg-type]
        for ours, theirs in zip(block(levels), expected, strict=True):
            assert_close(ours, theirs)


@pytest.mark.parametrize("runs", ["reference", "cpu"])
@pytest.mark.parametrize("without", [("scale", "spatial"), ("scale",), ("spatial",), ()], ids=str)
def test_task_attention_is_what_comes_last(without: tuple[Attention, ...], runs: str) -> None:
    attentions = [name for name in ATTENTIONS if name not in without]
    whole, levels = block_with(attentions), features()
    before = block_with([name for name in attentions if name != "task"])
    missing, unexpected = before.load_state_dict(whole.state_dict(), strict=False)
    assert not missing
    assert {key.partition(".")[0] for key in unexpected} == {"dynamic_relu"}
    relu = whole.dynamic_relu
    with backend(runs):  # type: ignore[arg-type]
        for ours, level in zip(whole(levels), before(levels), strict=True):
            parameters = relu.fc1.weight, relu.fc1.bias, relu.fc2.weight, relu.fc2.bias
            assert_close(ours, functional.dynamic_relu(level, *parameters))


def test_without_scale_attention_the_gates_are_one() -> None:
    whole, levels = block_with(ATTENTIONS), features()
    without = block_with(("spatial", "task"))
    without.load_state_dict(whole.state_dict(), strict=False)
    assert any(
        not torch.allclose(a, b) for a, b in zip(whole(levels), without(levels), strict=True)
    )
    with torch.no_grad():
        whole.scale_gate.weight.zero_()
        whole.scale_gate.bias.fill_(3)
    for ours, theirs in zip(without(levels), whole(levels), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("how", ["reference", "cpu", "called"])
@pytest.mark.parametrize("attentions", [(), ("scale", "spatial")], ids=str)
def test_a_relu_in_place_of_the_task_attention(attentions: tuple[Attention, ...], how: str) -> None:
    identity, levels = block_with(attentions), features()
    relu = block_with(attentions, without_task="relu")
    relu.load_state_dict(identity.state_dict())
    if how == "called":
        relu.low.register_forward_hook(lambda *_: None)
    with backend("reference" if how == "reference" else "cpu"):
        for ours, theirs in zip(relu(levels), identity(levels), strict=True):
            assert_close(ours, F.relu(theirs))
    assert "without_task='relu'" in repr(relu)


@pytest.mark.parametrize("absent", ATTENTIONS)
def test_an_absent_attention_has_no_parameters_and_no_gradients(absent: Attention) -> None:
    head = DyHead(4, 8, 2, num_groups=2, attentions=[a for a in ATTENTIONS if a != absent])
    names = [name for name, _ in head.named_parameters()]
    assert not any(PARAMETERS[absent] in name for name in [*names, *head.state_dict()])
    assert all(any(PARAMETERS[a] in name for name in names) for a in ATTENTIONS if a != absent)
    outputs = head(features(torch.float32))
    loss = torch.stack([y.square().sum() for y in outputs]).sum()
    given = torch.autograd.grad(loss, list(head.parameters()))
    assert all(torch.isfinite(g).all() for g in given)
    assert sum(bool(g.any()) for g in given) > len(given) // 2


@pytest.mark.parametrize("attentions", [("scale", "spatial"), ("task",), ()], ids=str)
def test_gradients_of_the_compiled_head_are_those_of_the_reference(
    attentions: tuple[Attention, ...],
) -> None:
    block, levels = block_with(attentions), [x.requires_grad_() for x in features()]
    inputs = [*levels, *block.parameters()]
    found = {}
    for runs in ("reference", "cpu"):
        with backend(runs):
            found[runs] = gradients(block(levels), inputs)
    for ours, theirs in zip(found["cpu"], found["reference"], strict=True):
        assert_close(ours, theirs)


def test_copies_types_and_containers() -> None:
    block = copy.deepcopy(block_with(ATTENTIONS[1:2]))
    assert block.parameters_tuple().gate_bias.dtype == torch.float64
    half = block.to(torch.bfloat16)
    assert {t.dtype for t in half.parameters_tuple() if isinstance(t, Tensor)} == {torch.bfloat16}
    levels = {str(i): x for i, x in enumerate(features(torch.bfloat16))}
    assert list(half(levels)) == ["0", "1", "2"]
    assert "attentions=('spatial',)" in repr(block)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attentions.*'scale', 'spatial', 'task'.*'channel'"):
        DyHead(attentions=("scale", "channel"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"without_task.*'identity', 'relu'.*'gelu'"):
        DyHead(attentions=("scale",), without_task="gelu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"attentions without \"task\" for without_task='relu'"):
        DyHead(without_task="relu")
    head = DyHead(64, 64, 1, attentions=("scale", "spatial"))
    with pytest.raises(ValueError, match=r"attentions.*block 0.*cannot run this head"):
        compat.to_microsoft(head)
