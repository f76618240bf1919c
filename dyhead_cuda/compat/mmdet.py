"""The fused Dynamic Head as a neck of mmdet 3; importing this registers it.

In a config::

    custom_imports = dict(imports=["dyhead_cuda.compat.mmdet"])
    model = dict(neck=[dict(type="FPN", ...), dict(type="FusedDyHead", in_channels=256, ...)])

This module needs mmdet and is imported by nothing else in the package.
"""

from __future__ import annotations

from typing import Any

from mmdet.models.necks import DyHead as _DyHead
from mmdet.registry import MODELS

from dyhead_cuda.compat.accelerate import AcceleratedBlock, accelerate
from dyhead_cuda.pyramid import HighOffset, Upsample


@MODELS.register_module()
class FusedDyHead(_DyHead):
    """mmdet's ``DyHead`` neck on fused blocks: the same parameters, numbers and checkpoints.

    It is built by mmdet, so that the initialisation and the keys of the state dict are its own,
    and accelerated at once. mmcv's operator is not called except to measure that the numbers
    agree.

    Args:
        in_channels, out_channels, num_blocks, zero_init_offset, init_cfg: as of mmdet's neck.
        high_offset, upsample, recompute, verify: as of :func:`dyhead_cuda.accelerate`.

    ``forward`` takes a tuple or list of levels [N, in_channels, H_l, W_l], finest first, and
    returns a tuple of levels [N, out_channels, H_l, W_l].

    Raises:
        RuntimeError: the blocks of the mmdet at hand cannot be fused; the log says why.

    Source: mmdet, ``necks/dyhead.py``.
    """

    def __init__(
        self,
        *args: Any,
        high_offset: HighOffset | None = None,
        upsample: Upsample | None = None,
        recompute: bool = False,
        verify: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__(*args, **settings)
        accelerate(
            self, high_offset=high_offset, upsample=upsample, recompute=recompute, verify=verify
        )
        left = [
            name
            for name, block in self.dyhead_blocks.named_children()
            if not isinstance(block, AcceleratedBlock)
        ]
        if left:
            raise RuntimeError(
                f"expected blocks of mmdet that can be fused, blocks {', '.join(left)} were left; "
                'the log of "dyhead_cuda" says why; use type="DyHead" to go on without'
            )
