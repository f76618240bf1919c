"""What each public code base calls the parameters of a block."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Name(NamedTuple):
    """One parameter: its name in :class:`dyhead_cuda.DyHeadBlock` and in a public block."""

    ours: str
    theirs: str
    pointwise: bool = False  # [O, I, 1, 1] there (a 1x1 convolution), [O, I] here

    def to_ours(self, tensor: Tensor) -> Tensor:
        """``tensor`` in this package's shape."""
        return tensor.flatten(1) if self.pointwise else tensor

    def to_theirs(self, tensor: Tensor) -> Tensor:
        """``tensor`` in the public block's shape."""
        return tensor[:, :, None, None] if self.pointwise else tensor

    def shape_there(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The public block's shape of a parameter that has ``shape`` here."""
        return (*shape, 1, 1) if self.pointwise else shape


class CodeBase(NamedTuple):
    """How one public code base names its blocks; ``names`` are in its state-dict order."""

    title: str
    key: str  # as in compat.from_<key> and to_<key>
    names: tuple[Name, ...]
    high_offsets: tuple[str, ...]  # what its forward computes
    adjacent_blocks: bool  # whether a tower holds nothing but blocks
    foreign: tuple[str, ...] = ()  # names that a block of another code base has instead

    @property
    def roots(self) -> frozenset[str]:
        """First components of the names, such as "DyConv"."""
        return frozenset(name.theirs.partition(".")[0] for name in self.names)

    @property
    def deform_bias(self) -> bool:
        return any(name.ours == "mid.bias" for name in self.names)


def _branch(ours: str, theirs: str, norm: str, bias: bool) -> tuple[Name, ...]:
    return (
        Name(f"{ours}.weight", f"{theirs}.conv.weight"),
        *((Name(f"{ours}.bias", f"{theirs}.conv.bias"),) if bias else ()),
        Name(f"{ours}.norm.weight", f"{theirs}.{norm}.weight"),
        Name(f"{ours}.norm.bias", f"{theirs}.{norm}.bias"),
    )


def _layer(ours: str, theirs: str, pointwise: bool = False) -> tuple[Name, Name]:
    return (
        Name(f"{ours}.weight", f"{theirs}.weight", pointwise),
        Name(f"{ours}.bias", f"{theirs}.bias"),
    )


def _dyconv(branches: str, gate: str) -> tuple[Name, ...]:
    """The names in a DyConv whose branches and scale gate are called ``branches`` and ``gate``."""
    return (
        *_branch("high", f"{branches}.0", "bn", bias=True),
        *_branch("mid", f"{branches}.1", "bn", bias=True),
        *_branch("low", f"{branches}.2", "bn", bias=True),
        *_layer("scale_gate", f"{gate}.1", pointwise=True),
        *_layer("dynamic_relu.fc1", "relu.fc.0"),
        *_layer("dynamic_relu.fc2", "relu.fc.2"),
        *_layer("offset_conv", "offset"),
    )


def _dyhead_block(fc1: str, fc2: str, pointwise: bool) -> tuple[Name, ...]:
    """The names in a DyHeadBlock, whose two layers of the dynamic ReLU differ between packages."""
    return (
        *_branch("high", "spatial_conv_high", "norm", bias=False),
        *_branch("mid", "spatial_conv_mid", "norm", bias=False),
        *_branch("low", "spatial_conv_low", "norm", bias=False),
        *_layer("offset_conv", "spatial_conv_offset"),
        *_layer("scale_gate", "scale_attn_module.1", pointwise=True),
        *_layer("dynamic_relu.fc1", f"task_attn_module.{fc1}", pointwise),
        *_layer("dynamic_relu.fc2", f"task_attn_module.{fc2}", pointwise),
    )


_DYCONV = _dyconv("DyConv", "AttnConv")

MICROSOFT = CodeBase("microsoft/DynamicHead", "microsoft", _DYCONV, ("flat",), True)

# GLIP's language-aware tower holds fusion and language layers between the blocks.
GLIP = CodeBase("GLIP", "glip", _DYCONV, ("flat",), False)

# The head "ATSSVLFusionHead" of mmdet 3: GLIP with names of its own.
MMDET_GLIP = CodeBase(
    "mmdet's GLIP", "mmdet_glip", _dyconv("dyconvs", "attnconv"), ("flat",), False
)

MMDET = CodeBase(
    "mmdet",
    "mmdet",
    _dyhead_block("conv1.conv", "conv2.conv", pointwise=True),
    ("flat", "mmdet_main"),
    True,
    foreign=("task_attn_module.fc.",),
)

# Forks of Ultralytics' YOLO: mmdet's block with the fully connected dynamic ReLU of microsoft.
ULTRALYTICS = CodeBase(
    "the Ultralytics forks",
    "ultralytics",
    _dyhead_block("fc.0", "fc.2", pointwise=False),
    ("flat",),
    True,
    foreign=("task_attn_module.conv1.", "task_attn_module.conv2."),
)

CODE_BASES = (MICROSOFT, GLIP, MMDET_GLIP, MMDET, ULTRALYTICS)
