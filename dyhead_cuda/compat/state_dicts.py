"""State dicts of the public code bases to :class:`dyhead_cuda.DyHead`, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dyhead_cuda.compat.convert import convert_from, convert_to, mmdet_high_offset
from dyhead_cuda.compat.names import GLIP, MICROSOFT, MMDET, MMDET_GLIP, ULTRALYTICS
from dyhead_cuda.modules import DyHead
from dyhead_cuda.pyramid import HighOffset, Upsample


def from_microsoft(
    state_dict: Mapping[str, Any],
    *,
    prefix: str | None = None,
    num_groups: int = 16,
    high_offset: HighOffset = "flat",
    upsample: Upsample = "bilinear",
) -> DyHead:
    """A :class:`~dyhead_cuda.DyHead` with the parameters of a microsoft/DynamicHead checkpoint.

    Args:
        state_dict: of a model, of a tower or of one block; or a checkpoint that holds it under
            "state_dict", "model", "model_state_dict", "params", "ema_state_dict",
            "state_dict_ema", "model_ema" or "ema", nested as deep as it may be. Of several that
            hold a tower the first in this order is taken, and the log names the others. Values are
            floating-point tensors, or numpy arrays as in detectron2's ``.pkl``, in the shapes that
            the published modules have: deformable weights [C_out, C_in, 3, 3], the gate
            [1, C_in, 1, 1]. Keys of other modules are ignored. The tensors are copied.
        prefix: of the tower ("backbone.dyhead_tower.") or of a single block of it
            ("backbone.dyhead_tower.0."), needed only where the dict holds several towers.
        num_groups: of the group normalisation, which the dict does not tell; 16 as published.
        high_offset: see :class:`~dyhead_cuda.DyHead`; the published code computes "flat".
        upsample: see :class:`~dyhead_cuda.DyHead`; the published code computes "bilinear", forks
            that call ``F.interpolate`` without a mode "nearest".

    Returns:
        A head of the dict's depth and channels, each parameter with its dtype and device.

    Raises:
        ValueError: no tower, several, missing or foreign parameters, with what to do.
        TypeError: not a mapping.

    Source: microsoft/DynamicHead, ``dyhead/dyhead.py``.

    Example:
        >>> from dyhead_cuda import DyHead, compat
        >>> checkpoint = {"model": compat.to_microsoft(DyHead(16, 16, 2), prefix="backbone.tower.")}
        >>> head = compat.from_microsoft(checkpoint)
        >>> len(head.blocks), head.out_channels
        (2, 16)
    """
    return convert_from(state_dict, MICROSOFT, prefix, num_groups, high_offset, upsample)


def from_glip(
    state_dict: Mapping[str, Any],
    *,
    prefix: str | None = None,
    num_groups: int = 16,
    high_offset: HighOffset = "flat",
    upsample: Upsample = "bilinear",
) -> DyHead:
    """A :class:`~dyhead_cuda.DyHead` with the parameters of a GLIP checkpoint.

    The blocks of a language-aware tower stand between fusion and language layers (at 2, 5, 8, ...
    of ``dyhead_tower``); they are collected in their order.

    Args:
        state_dict, prefix, upsample: as for :func:`from_microsoft`; the tower's prefix is
            "module.rpn.head.dyhead_tower." in the released checkpoints.
        num_groups: GLIP's ``MODEL.GROUP_NORM.NUM_GROUPS``.
        high_offset: "flat" as published; ports to detectron2 compute "crop".

    Returns:
        A head as of :func:`from_microsoft`, without the layers between the blocks.

    Raises:
        ValueError, TypeError: as :func:`from_microsoft`.

    Source: GLIP, ``maskrcnn_benchmark/modeling/rpn/vldyhead.py``.

    Example:
        >>> from dyhead_cuda import DyHead, compat
        >>> state = compat.to_glip(DyHead(16, 16, 2), indices=(2, 5))
        >>> len(compat.from_glip(state).blocks)
        2
    """
    return convert_from(state_dict, GLIP, prefix, num_groups, high_offset, upsample)


def from_mmdet_glip(
    state_dict: Mapping[str, Any],
    *,
    prefix: str | None = None,
    num_groups: int = 16,
    high_offset: HighOffset = "flat",
    upsample: Upsample = "bilinear",
) -> DyHead:
    """A :class:`~dyhead_cuda.DyHead` with the parameters of mmdet's GLIP (``ATSSVLFusionHead``).

    Args:
        state_dict, num_groups, high_offset, upsample: as for :func:`from_microsoft`.
        prefix: as for :func:`from_microsoft`; "bbox_head.head.dyhead_tower." in mmdet's own
            configurations.

    Returns:
        A head as of :func:`from_microsoft`, without the layers between the blocks.

    Raises:
        ValueError, TypeError: as :func:`from_microsoft`.

    Source: mmdet, ``dense_heads/atss_vlfusion_head.py``.

    Example:
        >>> from dyhead_cuda import DyHead, compat
        >>> state = compat.to_mmdet_glip(DyHead(16, 16, 2), indices=(2, 5))
        >>> len(compat.from_mmdet_glip(state).blocks)
        2
    """
    return convert_from(state_dict, MMDET_GLIP, prefix, num_groups, high_offset, upsample)


def from_mmdet(
    state_dict: Mapping[str, Any],
    *,
    version: str = "3.3.0",
    prefix: str | None = None,
    num_groups: int = 16,
) -> DyHead:
    """A :class:`~dyhead_cuda.DyHead` with the parameters of an mmdet checkpoint.

    Args:
        state_dict, num_groups: as for :func:`from_microsoft`.
        version: of the mmdet whose numbers are wanted: "2.x" to "3.3.0" give ``high_offset``
            "flat", "main" (commit 15a558d and later) "mmdet_main".
        prefix: as for :func:`from_microsoft`; the tower's is "neck.1.dyhead_blocks." in mmdet's own
            configurations.

    Returns:
        A head as of :func:`from_microsoft`, without deformable biases, as mmdet's.

    Raises:
        ValueError: an unknown version; no tower, several, missing or foreign parameters.
        TypeError: not a mapping.

    Source: mmdet, ``necks/dyhead.py``.

    Example:
        >>> from dyhead_cuda import DyHead, compat
        >>> state = compat.to_mmdet(DyHead(16, 16, 2, deform_bias=False))
        >>> compat.from_mmdet(state, version="main").blocks[0].high_offset
        'mmdet_main'
    """
    high_offset = mmdet_high_offset(version)
    return convert_from(state_dict, MMDET, prefix, num_groups, high_offset, "bilinear")


def from_ultralytics(
    state_dict: Mapping[str, Any],
    *,
    prefix: str | None = None,
    num_groups: int = 16,
    high_offset: HighOffset = "flat",
    upsample: Upsample = "bilinear",
) -> DyHead:
    """A :class:`~dyhead_cuda.DyHead` with the parameters of a fork of Ultralytics' YOLO.

    These forks have mmdet's ``DyHeadBlock`` with microsoft's dynamic ReLU of linear layers. Their
    files hold whole modules: read them with :func:`load_checkpoint`, which makes state dicts of
    them, or pass ``model.state_dict()``.

    Args:
        state_dict, num_groups, high_offset, upsample: as for :func:`from_microsoft`. A module under
            "model" or "ema" counts as its state dict.
        prefix: as for :func:`from_microsoft`; the tower's is that of the detection layer, such as
            "model.22.dyhead.".

    Returns:
        A head as of :func:`from_microsoft`, without deformable biases and without the 1x1
        convolutions that bring each level to the blocks' width.

    Raises:
        ValueError, TypeError: as :func:`from_microsoft`.

    Source: the ``DyHeadBlock`` that many forks of Ultralytics' YOLO have in ``Detect_DyHead``.

    Example:
        >>> from dyhead_cuda import DyHead, compat
        >>> head = DyHead(16, 16, 2, deform_bias=False)
        >>> state = compat.to_ultralytics(head, prefix="model.22.dyhead.")
        >>> len(compat.from_ultralytics({"ema": None, "model": state}).blocks)
        2
    """
    return convert_from(state_dict, ULTRALYTICS, prefix, num_groups, high_offset, upsample)


def to_microsoft(head: DyHead, *, prefix: str = "dyhead_tower.") -> dict[str, Tensor]:
    """The parameters of ``head`` as microsoft/DynamicHead names them; copies.

    A head without deformable biases gets zero ones, which compute the same.

    Args:
        head: whose blocks the published code can compute, see below.
        prefix: in front of each block's index.

    Returns:
        The state dict of a ``dyhead_tower``, in its own order, dtypes and shapes: the gate
        [1, C, 1, 1], everything else as in the head.

    Raises:
        TypeError: not a :class:`~dyhead_cuda.DyHead`.
        ValueError: a head that the published code cannot compute: ``high_offset`` other than
            "flat", ``upsample`` other than "bilinear", ``num_groups`` other than 16, another
            ``eps`` or reduction, attentions left out, or ``in_channels`` other than
            ``out_channels``.

    Example:
        >>> from dyhead_cuda import DyHead, compat
        >>> list(compat.to_microsoft(DyHead(16, 16, 1)))[:2]
        ['dyhead_tower.0.DyConv.0.conv.weight', 'dyhead_tower.0.DyConv.0.conv.bias']
    """
    return convert_to(head, MICROSOFT, prefix)


def to_glip(
    head: DyHead, *, prefix: str = "dyhead_tower.", indices: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """The parameters of ``head`` as GLIP names them; copies.

    Args:
        head, prefix: as for :func:`to_microsoft`.
        indices: of the blocks in ``dyhead_tower``: 0, 1, 2, ... (the default) in the plain head,
            ``range(2, 3 * num_blocks, 3)`` in a language-aware tower.

    Returns:
        The state dict of the tower's blocks.

    Raises:
        TypeError, ValueError: as :func:`to_microsoft`, except that GLIP configures ``num_groups``;
            or indices that are not one per block.

    Example:
        >>> from dyhead_cuda import DyHead, compat
        >>> next(iter(compat.to_glip(DyHead(16, 16, 1), indices=[2])))
        'dyhead_tower.2.DyConv.0.conv.weight'
    """
    return convert_to(head, GLIP, prefix, indices, any_groups=True)


def to_mmdet_glip(
    head: DyHead, *, prefix: str = "dyhead_tower.", indices: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """The parameters of ``head`` as mmdet's GLIP names them; copies.

    Args:
        head, prefix, indices: as for :func:`to_glip`.

    Returns:
        The state dict of the tower's blocks.

    Raises:
        TypeError, ValueError: as :func:`to_microsoft`; or indices that are not one per block.

    Example:
        >>> from dyhead_cuda import DyHead, compat
        >>> next(iter(compat.to_mmdet_glip(DyHead(16, 16, 1), indices=[2])))
        'dyhead_tower.2.dyconvs.0.conv.weight'
    """
    return convert_to(head, MMDET_GLIP, prefix, indices)


def to_mmdet(head: DyHead, *, prefix: str = "dyhead_blocks.") -> dict[str, Tensor]:
    """The parameters of ``head`` as mmdet names them; copies.

    mmdet has no deformable biases. One that is constant within each group of the normalisation
    cancels exactly and is dropped.

    Args:
        head, prefix: as for :func:`to_microsoft`.

    Returns:
        The state dict of a ``DyHead`` neck, in its own order, dtypes and shapes: gate and dynamic
        ReLU as 1x1 convolutions [O, I, 1, 1], everything else as in the head.

    Raises:
        TypeError: not a :class:`~dyhead_cuda.DyHead`.
        ValueError: another deformable bias; or a head that mmdet cannot compute: ``high_offset``
            other than "flat" or "mmdet_main", ``upsample`` other than "bilinear", ``num_groups``
            other than 16, another ``eps`` or reduction, or attentions left out.

    Example:
        >>> from dyhead_cuda import DyHead, compat
        >>> next(iter(compat.to_mmdet(DyHead(16, 16, 1, deform_bias=False))))
        'dyhead_blocks.0.spatial_conv_high.conv.weight'
    """
    return convert_to(head, MMDET, prefix)


def to_ultralytics(head: DyHead, *, prefix: str = "dyhead.") -> dict[str, Tensor]:
    """The parameters of ``head`` as forks of Ultralytics' YOLO name them; copies.

    Args:
        head, prefix: as for :func:`to_microsoft`.

    Returns:
        The state dict of the blocks: the gate as a 1x1 convolution [1, C, 1, 1], everything else
        as in the head.

    Raises:
        TypeError, ValueError: as :func:`to_microsoft`; or a deformable bias that does not cancel,
            see :func:`to_mmdet`.

    Example:
        >>> from dyhead_cuda import DyHead, compat
        >>> state = compat.to_ultralytics(DyHead(16, 16, 1, deform_bias=False))
        >>> list(state)[-1]
        'dyhead.0.task_attn_module.fc.2.bias'
    """
    return convert_to(head, ULTRALYTICS, prefix)
