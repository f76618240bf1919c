"""The fused Dynamic Head behind a backbone of detectron2; importing this registers a builder.

This module needs detectron2 and is imported by nothing else in the package.
"""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor

from dyhead_cuda.compat.convert import rename_from
from dyhead_cuda.compat.names import MICROSOFT
from dyhead_cuda.modules import DyHead


class DyHeadBackbone(Backbone):
    """A backbone with a feature pyramid, and a Dynamic Head on its levels.

    Checkpoints of microsoft/DynamicHead, which holds its tower as ``dyhead_tower`` at this place,
    load as they are; those that this module writes have ``dyhead.blocks``.

    Args:
        backbone: whose levels have one number of channels and halve from one to the next.
        channels: of the result and of all blocks but the first one's input.
        num_blocks: 6 in the paper.
        settings: any other argument of :class:`~dyhead_cuda.DyHead`.

    ``forward`` takes images [N, 3, H, W] and returns a dict of levels [N, channels, H_l, W_l] with
    the names of the backbone's.

    Raises:
        ValueError: levels that differ in channels, or a backbone without levels.

    Source: microsoft/DynamicHead, ``dyhead/dyhead.py``.
    """

    def __init__(
        self, backbone: Any, *, channels: int = 256, num_blocks: int = 6, **settings: Any
    ) -> None:
        super().__init__()
        shapes = backbone.output_shape()
        self.levels = sorted(shapes, key=lambda name: shapes[name].stride)
        widths = sorted({shape.channels for shape in shapes.values()})
        if len(widths) != 1:
            raise ValueError(
                f"expected levels of one number of channels, got {widths} on {self.levels}; put a "
                "feature pyramid (FPN) between the backbone and the head"
            )
        self.strides = {name: shapes[name].stride for name in self.levels}
        self.channels = channels
        self.backbone = backbone
        self.dyhead = DyHead(widths[0], channels, num_blocks, **settings)
        # Without an underscore from torch 2.5 on.
        self._register_load_state_dict_pre_hook(_take_microsoft, with_module=True)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The backbone's levels after the head, by name."""
        features = self.backbone(images)
        return self.dyhead({name: features[name] for name in self.levels})

    def output_shape(self) -> dict[str, Any]:
        """Channels and stride of every level, by name."""
        return {
            name: ShapeSpec(channels=self.channels, stride=stride)
            for name, stride in self.strides.items()
        }

    @property
    def size_divisibility(self) -> int:
        """What the sides of an image must be a multiple of: every level is half of the finer."""
        return max(self.backbone.size_divisibility, *self.strides.values())

    @property
    def padding_constraints(self) -> dict[str, int]:
        """How images are padded, with the head's own demand."""
        inner = dict(self.backbone.padding_constraints)
        return {**inner, "size_divisibility": self.size_divisibility}


def _take_microsoft(
    module: DyHeadBackbone, state_dict: dict[str, Any], prefix: str, *_: Any
) -> None:
    """Give a tower of microsoft/DynamicHead the names that it has here."""
    rename_from(
        state_dict, MICROSOFT, f"{prefix}dyhead_tower.", f"{prefix}dyhead.blocks.", module.dyhead
    )


def add_dyhead_config(cfg: Any) -> None:
    """Add ``MODEL.DYHEAD`` to a detectron2 config.

    Args:
        cfg: gets ``BACKBONE`` (the builder of the pyramid), ``NUM_CONVS`` (blocks), ``CHANNELS``
            and ``HIGH_OFFSET``, with the names that microsoft/DynamicHead uses.
    """
    cfg.MODEL.DYHEAD = CfgNode(
        {
            "BACKBONE": "build_retinanet_resnet_fpn_backbone",
            "NUM_CONVS": 6,
            "CHANNELS": 256,
            "HIGH_OFFSET": "flat",
        }
    )


@BACKBONE_REGISTRY.register()
def build_fused_dyhead_backbone(cfg: Any, input_shape: Any) -> DyHeadBackbone:
    """The backbone of ``cfg.MODEL.DYHEAD.BACKBONE`` and a Dynamic Head on its levels.

    Args:
        cfg: with ``MODEL.DYHEAD``, see :func:`add_dyhead_config`.
        input_shape: of the images, as detectron2 passes it.

    Returns:
        The backbone to put under ``MODEL.BACKBONE.NAME = "build_fused_dyhead_backbone"``.
    """
    settings = cfg.MODEL.DYHEAD
    backbone = BACKBONE_REGISTRY.get(settings.BACKBONE)(cfg, input_shape)
    return DyHeadBackbone(
        backbone,
        channels=settings.CHANNELS,
        num_blocks=settings.NUM_CONVS,
        high_offset=settings.HIGH_OFFSET,
    )
