"""The published head as an ONNX file: numbers, open sizes, and how many nodes it has."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from dyhead_cuda import DyHead, DyHeadBlock, accelerate
from dyhead_cuda.pyramid import HIGH_OFFSETS, UPSAMPLES
from tests.helpers import onnx_files, published_models
from tests.helpers.compare import relative_l2
from tests.helpers.inputs import halving_sizes, random_pyramid
from tests.helpers.modules import randomise
from tests.helpers.onnx_files import Each, Session, assert_same, export, operators, sizes_open
from tests.helpers.paths import ROOT

CHANNELS = 16
# How predictions are read and how the branch is upsampled do not meet, but in "aligned".
VARIANTS = [
    ("flat", "bilinear"),
    ("crop", "nearest"),
    ("mmdet_main", "bilinear"),
    ("aligned", "bilinear"),
    ("aligned", "nearest"),
]
assert {offset for offset, _ in VARIANTS} == set(HIGH_OFFSETS)
assert {upsample for _, upsample in VARIANTS} == set(UPSAMPLES)


def nodes_of(levels: int) -> int:
    """Of one block whose sizes are fixed, from opset 21 on.

    A level takes three nodes for its predictions, one for the average and five for the two lines. A
    branch takes a deformable convolution, a norm, a mean and a product; a high branch also a
    Resize, and three nodes each to read offset and mask. The rest is done once for all of them.
    """
    return 9 * levels + 4 * (3 * levels - 2) + 7 * (levels - 1) + 18


def nodes_of_sizes(levels: int) -> int:
    """What open sizes add, once for all blocks."""
    return levels + 5 * (levels - 1)


def pyramid(batch: int, height: int, width: int, levels: int = 2) -> list[Tensor]:
    sizes = halving_sizes(height, width, levels)
    return random_pyramid(batch, CHANNELS, sizes, torch.float32)


def block(**options: Any) -> DyHeadBlock:
    made = DyHeadBlock(CHANNELS, CHANNELS, **{"num_groups": 4, **options})
    randomise(made)
    return made


class OneLevel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = block()

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        return cast(list[Tensor], self.block([levels[1]]))


def hooked() -> DyHeadBlock:
    made = block(high_offset="mmdet_main")
    made.low.register_forward_hook(lambda module, inputs, out: 1.5 * out)
    return made


PARTS: Mapping[str, Callable[[], nn.Module]] = {
    **{
        f"{offset}-{upsample}": partial(block, high_offset=offset, upsample=upsample)
        for offset, upsample in VARIANTS
    },
    "no attentions": lambda: block(attentions=()),
    "scale only, no bias": lambda: block(attentions=("scale",), deform_bias=False),
    "one level": OneLevel,
    "module by module": hooked,
}


@cache
def parts() -> tuple[Each, Session]:
    """All parts of two levels with open sizes, exported once for a batch of 1."""
    model = Each({name: make() for name, make in PARTS.items()})
    return model, Session(export(model, (pyramid(1, 9, 12),), dynamic_shapes=(sizes_open(2),)))


@pytest.mark.parametrize(
    "levels",
    [pyramid(1, 9, 12), pyramid(3, 8, 7), pyramid(2, 1, 5), pyramid(2, 2, 2)],
    ids=["as exported", "another batch and size", "a row", "one pixel"],
)
def test_every_variant_is_the_reference(levels: list[Tensor]) -> None:
    model, session = parts()
    onnx_files.assert_each_same(session, model, levels)


def test_blocks_share_the_nodes_of_sizes() -> None:
    model = DyHead(CHANNELS, CHANNELS, 2, num_groups=4)
    randomise(model)
    levels = pyramid(1, 9, 14)
    file = export(model, (levels,), dynamic_shapes=(sizes_open(2),))
    assert onnx_files.output_sizes(file) == [["n", CHANNELS, f"h{i}", f"w{i}"] for i in range(2)]
    assert_same(Session(file), model, (pyramid(2, 12, 7),))
    counts = operators(file)
    assert counts["DeformConv"] == counts["GroupNormalization"] == 2 * 4
    assert counts["Resize"] == 2
    assert counts.total() <= 2 * nodes_of(2) + nodes_of_sizes(2)


def test_nodes_of_five_levels() -> None:
    model, levels = block(), pyramid(1, 32, 32, 5)
    file = export(model, (levels,))
    assert operators(file).total() <= nodes_of(5) == 143
    assert_same(Session(file), model, (levels,))


@pytest.mark.parametrize("opset", [19, None], ids=["the oldest", "the default"])
def test_before_opset_21_norms_are_instance_norms(opset: int | None) -> None:
    model, levels = block(), pyramid(1, 6, 8)
    file = export(model, (levels,), opset_version=opset)
    assert [found.version for found in file.opset_import] == [opset or 20]
    assert operators(file)["InstanceNormalization"] == 4
    assert_same(Session(file), model, (levels,))


@pytest.mark.parametrize(
    "sizes",
    [
        lambda: [{0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}] * 2,
        lambda: [{0: Dim("n"), 2: k * Dim("h"), 3: k * Dim("w")} for k in (2, 1)],
    ],
    ids=["Dim.AUTO", "multiples"],
)
def test_sizes_of_torch_export(sizes: Callable[[], list[Any]]) -> None:
    model, levels = block(), pyramid(1, 8, 12)
    session = Session(export(model, (levels,), dynamic_shapes=(sizes(),)))
    assert_same(session, model, (pyramid(2, 6, 10),))


def test_aligned_takes_any_sizes() -> None:
    def levels(batch: int, *sizes: tuple[int, int]) -> list[Tensor]:
        return random_pyramid(batch, CHANNELS, sizes, torch.float32)

    model = block(high_offset="aligned")
    features = levels(1, (11, 13), (4, 15))
    file = export(model, (features,), dynamic_shapes=(sizes_open(2),))
    for other in (features, levels(2, (5, 6), (7, 2))):
        assert_same(Session(file), model, (other,))
    # Two sizes, and twice one of them, which low reads; no node reads predictions.
    assert operators(file).total() <= nodes_of(2) - 6 + 4


def test_an_accelerated_model() -> None:
    class Levels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = accelerate(published_models.microsoft_model().float())

        def forward(self, levels: list[Tensor]) -> list[Tensor]:
            return published_models.run(self.model, levels)

    model, levels = Levels(), published_models.pyramid(dtype=torch.float32)
    assert len(published_models.fused(model)) == 2
    file = export(model, (levels,))
    assert operators(file)["DeformConv"] == 2 * 7
    assert_same(Session(file), model, (levels,))


def test_half_precision_computes_in_float32() -> None:
    """Of a type that onnxruntime has no deformable convolution for."""
    model, levels = block().half(), [x.half() for x in pyramid(2, 9, 12)]
    file = export(model, (levels,))
    assert operators(file)["Cast"] == 2 * len(levels)
    found = Session(file)(levels)
    assert {x.dtype for x in found} == {torch.float16}
    assert_same(Session(file), model, (levels,), tolerance=1e-3)


def test_export_of_a_model_that_is_elsewhere() -> None:
    """PyTorch takes what an ONNX node returns for a tensor of the CPU, wherever the model is."""
    model = block().to("meta")
    levels = [x.to("meta") for x in pyramid(1, 6, 8)]
    assert torch.onnx.export(model.eval(), (levels,), dynamo=True, verbose=False, optimize=False)


def test_the_examples_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "export.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    namespace: dict[str, Any] = {}
    for code in blocks:
        exec(compile(code, "export.md", "exec"), namespace)
    assert len(blocks) == 5  # torch.compile, torch.export and its library, ONNX and its session
    assert relative_l2(torch.from_numpy(namespace["p3"]), namespace["expected"]) < 1e-5


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_shows(value: float) -> None:
    """Though onnxruntime has zero for such offsets: masks come from the same convolution."""
    levels = pyramid(1, 8, 8)
    model = nn.Sequential(block(), block())
    session = Session(export(model, (levels,)))
    levels[1][0, 3, 2, 2] = value
    assert all(out.isnan().all() for out in session((levels,)))
