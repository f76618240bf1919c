"""The published head: a stack of blocks on a pyramid of feature maps."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

import torch
from torch import nn

from dyhead_cuda import checks
from dyhead_cuda.modules.initialisation import Init
from dyhead_cuda.modules.published_block import (
    ATTENTIONS,
    PRESERVE,
    Attention,
    DyHeadBlock,
    WithoutTask,
    fused_settings,
    run_fused,
)
from dyhead_cuda.modules.scripted import NotScriptable
from dyhead_cuda.pyramid import Features, HighOffset, Upsample, repack, unpack


class DyHead(NotScriptable, nn.Module):
    """The published Dynamic Head: a stack of blocks on a pyramid of feature maps.

    Args:
        in_channels: channels of the pyramid.
        out_channels: channels of the result and of all blocks but the first one's input.
        num_blocks: 6 in the paper.
        high_offset: which offsets the branch on the coarser level reads: "flat" (every released
            checkpoint), "crop", "mmdet_main" or "aligned" (the paper's formula, any sizes); see
            :func:`dyhead_cuda.reference.pyramid_block`.
        upsample: how that branch comes to the level's size: "bilinear" (published) or "nearest"
            (public forks that resize by ``F.interpolate``'s default).
        deform_bias: a bias on the deformable convolutions (microsoft and GLIP have one, mmdet not).
        num_groups: groups of the group normalisation; out_channels must be divisible by it.
        reduction: of the dynamic ReLU's hidden layer.
        init: "microsoft" or "mmdet", the initialisation of that code base: deformable weights
            uniform in +-1 / sqrt(9 * C_in), scale gate N(0, 0.01); offset convolution and dynamic
            ReLU PyTorch's default, or zero and N(0, 0.01). "local" is as "mmdet", but each level
            starts as little more than itself: the branch on it as the identity and some noise, with
            a normalisation of weight 5. Stacks of many blocks learn faster from it (docs/study.md).
        eps: of the group normalisation.
        recompute: keep for the backward only what goes into and comes out of each block, not what
            is between (predictions and branches, about three times as much), and compute that
            again there. Costs one more forward; results and gradients are the same bits. It is an
            attribute of every block and can be changed at any time.
        attentions: those in use. One that is left out is the identity and has no parameters:
            without "scale" the gates are 1, without "spatial" the offsets 0 and the mask 1 (plain
            3x3 convolutions of three levels), without "task" there is no dynamic ReLU. Detectors
            of two stages leave out the last before the RoI pooling.
        without_task: what stands in place of a task attention that is left out: "identity", or
            "relu", without which blocks that have no other attention either are linear up to their
            normalisation.
        memory_format: of the results, torch.contiguous_format or torch.channels_last;
            torch.preserve_format is that of the features, as for convolutions.

    Raises:
        TypeError: a switch that is no bool.
        ValueError: sizes that do not fit, unknown names.

    Source: arXiv 2106.08322; microsoft/DynamicHead; mmdet ``necks/dyhead.py``.

    Example:
        >>> import torch, dyhead_cuda
        >>> head = dyhead_cuda.DyHead(in_channels=8, out_channels=16, num_blocks=2)
        >>> levels = [torch.randn(1, 8, side, side) for side in (16, 8, 4)]
        >>> [tuple(x.shape) for x in head(levels)]
        [(1, 16, 16, 16), (1, 16, 8, 8), (1, 16, 4, 4)]
    """

    def __init__(
        self,
        in_channels: int = 256,
        out_channels: int = 256,
        num_blocks: int = 6,
        *,
        high_offset: HighOffset = "flat",
        upsample: Upsample = "bilinear",
        deform_bias: bool = True,
        num_groups: int = 16,
        reduction: int = 4,
        init: Init = "microsoft",
        eps: float = 1e-5,
        recompute: bool = False,
        attentions: Collection[Attention] = ATTENTIONS,
        without_task: WithoutTask = "identity",
        memory_format: torch.memory_format = PRESERVE,
    ) -> None:
        super().__init__()
        checks.positive(num_blocks=num_blocks)
        checks.memory_format(memory_format)
        self.memory_format = memory_format
        self.in_channels, self.out_channels = in_channels, out_channels
        self.blocks = nn.ModuleList(
            DyHeadBlock(
                out_channels if i else in_channels,
                out_channels,
                high_offset=high_offset,
                upsample=upsample,
                deform_bias=deform_bias,
                num_groups=num_groups,
                reduction=reduction,
                init=init,
                eps=eps,
                recompute=recompute,
                attentions=attentions,
                without_task=without_task,
            )
            for i in range(num_blocks)
        )
        for i, block in enumerate(self.blocks):
            cast(DyHeadBlock, block).label = f"Block {i} of a DyHead"

    def forward(self, features: Features) -> Features:
        """All blocks in turn; those whose calls nobody would notice run as one.

        Args:
            features: list, tuple or dict of levels [N, C_in, H_l, W_l], finest first, of float64,
                float32, float16 or bfloat16; each level is half of the finer one, rounded up,
                except for "aligned".

        Returns:
            The same kind of container with levels [N, C_out, H_l, W_l] in the dtype of the
            features, each with memory of its own.

        Raises:
            ValueError: sizes, channels, dtypes or devices that do not fit.
            TypeError: features that are no such container of tensors.
        """
        together: list[DyHeadBlock] = []
        settings: tuple[Any, ...] | None = None
        for block in self.blocks:
            found = fused_settings(block)
            if together and found != settings:
                features = repack(features, run_fused(together, unpack(features), PRESERVE))
                together = []
            if found is None:
                features = block(features)
            else:
                together.append(cast(DyHeadBlock, block))
                settings = found
        if together:
            levels = run_fused(together, unpack(features), self.memory_format)
        elif self.memory_format == PRESERVE:
            return features
        else:
            levels = [x.contiguous(memory_format=self.memory_format) for x in unpack(features)]
        return repack(features, levels)

    def extra_repr(self) -> str:
        return f"memory_format={self.memory_format}"
