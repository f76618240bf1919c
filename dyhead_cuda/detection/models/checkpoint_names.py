"""What the published code bases call the parameters of an ATSS detector with a Dynamic Head."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from dyhead_cuda.compat.names import MICROSOFT, MMDET, CodeBase
from dyhead_cuda.detection.names import Extra, Postprocess

FIRST, LAST = 3, 7
COARSEST = 5  # level of the backbone


class Source(NamedTuple):
    """A code base: how its detectors name and connect what :class:`ATSS` has."""

    blocks: CodeBase
    body: str  # prefix of the backbone's keys
    tower: str  # prefix of the Dynamic Head's
    classes: str
    scales: str
    extra: Extra
    unfolded: bool  # whether patch merging takes its input as torch.nn.Unfold orders it
    postprocess: Postprocess
    rules: tuple[tuple[str, str], ...]  # a key of ours (regex, all of it) -> theirs (template)

    def theirs(self, key: str) -> str:
        """Their key of a parameter of ours, other than of the Dynamic Head and the scales."""
        for pattern, template in self.rules:
            match = re.fullmatch(pattern, key)
            if match:
                return match.expand(template)
        raise KeyError(key)


def _mmdet_rules() -> Iterable[tuple[str, str]]:
    body = r"backbone\.body\.stages"
    yield rf"{body}\.0\.0\.(.+)", r"backbone.patch_embed.projection.\1"
    yield rf"{body}\.0\.2\.(.+)", r"backbone.patch_embed.norm.\1"
    for stage in range(4):
        # Patch embedding, then stage, patch merging, stage, ...
        ours = rf"{body}\.{2 * stage + 1}\.(\d+)"
        theirs = rf"backbone.stages.{stage}.blocks.\1"
        yield rf"{ours}\.mlp\.0\.(.+)", rf"{theirs}.ffn.layers.0.0.\2"
        yield rf"{ours}\.mlp\.3\.(.+)", rf"{theirs}.ffn.layers.1.\2"
        yield rf"{ours}\.attn\.(.+)", rf"{theirs}.attn.w_msa.\2"
        yield rf"{ours}\.(.+)", rf"{theirs}.\2"
        yield rf"{body}\.{2 * stage + 2}\.(.+)", rf"backbone.stages.{stage}.downsample.\1"
    for index in range(COARSEST - FIRST + 1):
        yield rf"backbone\.body\.norms\.{index}\.(.+)", rf"backbone.norm{index + 1}.\1"
    yield r"backbone\.body\.(.+)", r"backbone.\1"
    yield r"backbone\.fpn\.inner_blocks\.(\d)\.0\.(.+)", r"neck.0.lateral_convs.\1.conv.\2"
    yield r"backbone\.fpn\.layer_blocks\.(\d)\.0\.(.+)", r"neck.0.fpn_convs.\1.conv.\2"
    for level in range(COARSEST + 1, LAST + 1):
        theirs = rf"neck.0.fpn_convs.{level - FIRST}.conv.\1"
        yield rf"backbone\.fpn\.extra_blocks\.p{level}\.(.+)", theirs
    yield r"head\.classes\.(.+)", r"bbox_head.atss_cls.\1"
    yield r"head\.boxes\.(.+)", r"bbox_head.atss_reg.\1"
    yield r"head\.centerness\.(.+)", r"bbox_head.atss_centerness.\1"


def _microsoft_rules() -> Iterable[tuple[str, str]]:
    bottom_up, body = "backbone.backbone.bottom_up", r"backbone\.body"
    yield rf"{body}\.conv1\.(.+)", rf"{bottom_up}.stem.conv1.\1"
    yield rf"{body}\.bn1\.(.+)", rf"{bottom_up}.stem.conv1.norm.\1"
    yield rf"{body}\.stages\.0\.0\.(.+)", rf"{bottom_up}.patch_embed.proj.\1"
    yield rf"{body}\.stages\.0\.2\.(.+)", rf"{bottom_up}.patch_embed.norm.\1"
    for stage in range(4):
        ours, theirs = rf"{body}\.layer{stage + 1}\.(\d+)", rf"{bottom_up}.res{stage + 2}.\1"
        yield rf"{ours}\.(conv\d)\.(.+)", rf"{theirs}.\2.\3"
        yield rf"{ours}\.bn(\d)\.(.+)", rf"{theirs}.conv\2.norm.\3"
        yield rf"{ours}\.downsample\.0\.(.+)", rf"{theirs}.shortcut.\2"
        yield rf"{ours}\.downsample\.1\.(.+)", rf"{theirs}.shortcut.norm.\2"
        ours = rf"{body}\.stages\.{2 * stage + 1}\.(\d+)"
        theirs = rf"{bottom_up}.layers.{stage}.blocks.\1"
        yield rf"{ours}\.mlp\.0\.(.+)", rf"{theirs}.mlp.fc1.\2"
        yield rf"{ours}\.mlp\.3\.(.+)", rf"{theirs}.mlp.fc2.\2"
        yield rf"{ours}\.(.+)", rf"{theirs}.\2"
        merging = rf"{bottom_up}.layers.{stage}.downsample.\1"
        yield rf"{body}\.stages\.{2 * stage + 2}\.(.+)", merging
    for index in range(COARSEST - FIRST + 1):
        yield rf"{body}\.norms\.{index}\.(.+)", rf"{bottom_up}.norm{index + 1}.\1"
        for ours, theirs in (("inner_blocks", "fpn_lateral"), ("layer_blocks", "fpn_output")):
            here = rf"backbone\.fpn\.{ours}\.{index}\.0\.(.+)"
            yield here, rf"backbone.backbone.{theirs}{index + FIRST}.\1"
    yield r"backbone\.fpn\.extra_blocks\.(.+)", r"backbone.backbone.top_block.\1"
    yield r"head\.classes\.(.+)", r"head.cls_logits.\1"
    yield r"head\.boxes\.(.+)", r"head.bbox_pred.\1"
    yield r"head\.centerness\.(.+)", r"head.centerness.\1"


MMDET_ATSS = Source(
    blocks=MMDET,
    body="backbone.",
    tower="neck.1.dyhead_blocks.",
    classes="bbox_head.atss_cls.weight",
    scales="bbox_head.scales.{}.scale",
    extra="conv",
    unfolded=True,
    postprocess="mmdet",
    rules=tuple(_mmdet_rules()),
)
MICROSOFT_ATSS = Source(
    blocks=MICROSOFT,
    body="backbone.backbone.bottom_up.",
    tower="backbone.dyhead_tower.",
    classes="head.cls_logits.weight",
    scales="head.scales.{}.scale",
    extra="conv_relu",
    unfolded=False,
    postprocess="microsoft",
    rules=tuple(_microsoft_rules()),
)
