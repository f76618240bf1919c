"""The assignment against a loop written from the paper."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from dyhead_cuda.detection.models.atss_assigner import assign
from tests.helpers.detection.slow_assigner import slow_assign


def grid(height: int, width: int, stride: int, side: float, offset: float = 0.5) -> Tensor:
    return torch.tensor(
        [
            (
                (x + offset) * stride - side / 2,
                (y + offset) * stride - side / 2,
                (x + offset) * stride + side / 2,
                (y + offset) * stride + side / 2,
            )
            for y in range(height)
            for x in range(width)
        ]
    )


def random_boxes(count: int, size: float, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    center = torch.rand(count, 2, generator=random) * size
    side = 4 + torch.rand(count, 2, generator=random) ** 2 * size
    return torch.cat((center - side / 2, center + side / 2), dim=1)


@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 12),
    topk=st.sampled_from([1, 4, 9]),
    offset=st.sampled_from([0.0, 0.5]),
)
def test_agrees_with_the_paper(seed: int, count: int, topk: int, offset: float) -> None:
    levels = [grid(8 // 2**i, 12 // 2**i, 8 * 2**i, 24 * 2**i, offset) for i in range(3)]
    boxes = random_boxes(count, 80, seed)
    owners = assign(levels, boxes, topk)
    assert owners.dtype == torch.int64
    assert owners.tolist() == slow_assign(levels, boxes, topk)


def test_the_loop_is_no_constant() -> None:
    """Random boxes have positives, on several levels, and anchors that two of them want."""
    levels = [grid(8 // 2**i, 12 // 2**i, 8 * 2**i, 24 * 2**i) for i in range(3)]
    boxes = random_boxes(12, 80, 4)
    owners = assign(levels, boxes)
    assert all((part >= 0).any() for part in owners.split([len(level) for level in levels]))
    alone = torch.stack([assign(levels, box[None]) for box in boxes]) >= 0
    assert int((alone.sum(0) > 1).sum()) > 3
    assert torch.equal(alone.any(0), owners >= 0)


def test_center_must_lie_in_the_box() -> None:
    level = grid(4, 4, 16, 32)
    between = torch.tensor([[17.0, 17.0, 23.0, 23.0]])  # the centres are 8, 24, 40 ...
    assert assign([level], between).tolist() == [-1] * 16
    around = torch.tensor([[17.0, 17.0, 25.0, 25.0]])
    assert assign([level], around).nonzero().flatten().tolist() != []
    assert assign([level], around)[5] == 0


def test_contested_anchor_goes_to_the_larger_overlap() -> None:
    level = grid(4, 4, 16, 32)
    anchor = level[5]
    worse = anchor + torch.tensor([-6.0, -6.0, 6.0, 6.0])
    better = anchor + torch.tensor([-1.0, -1.0, 1.0, 1.0])
    assert assign([level], torch.stack((worse, better)), topk=3)[5] == 1
    assert assign([level], torch.stack((better, worse)), topk=3)[5] == 0


def test_levels_smaller_than_topk() -> None:
    levels = [grid(2, 2, 16, 32), grid(1, 1, 32, 64)]
    box = torch.tensor([[1.0, 2.0, 30.0, 31.0]])
    assert assign(levels, box, 9).tolist() == slow_assign(levels, box, 9)


def test_a_single_anchor() -> None:
    level = grid(1, 1, 32, 32)
    assert assign([level], torch.tensor([[2.0, 3.0, 30.0, 31.0]])).tolist() == [0]


def test_no_boxes() -> None:
    owners = assign([grid(2, 3, 8, 64)], torch.zeros(0, 4))
    assert owners.tolist() == [-1] * 6
    assert owners.dtype == torch.int64


@pytest.mark.gpu
def test_same_on_cuda() -> None:
    levels = [grid(8 // 2**i, 12 // 2**i, 8 * 2**i, 24 * 2**i) for i in range(3)]
    boxes = random_boxes(12, 80, 5)
    there = assign([level.cuda() for level in levels], boxes.cuda())
    assert there.cpu().tolist() == assign(levels, boxes).tolist()
