"""The work behind ``from_*`` and ``to_*``: a tower's tensors under other names, checked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dyhead_cuda import checks
from dyhead_cuda.compat.names import MMDET, CodeBase
from dyhead_cuda.compat.towers import find_blocks, unnest
from dyhead_cuda.modules import ATTENTIONS, DyHead, DyHeadBlock
from dyhead_cuda.pyramid import HighOffset, Upsample

# What the public blocks fix and a state dict does not tell.
_NUM_GROUPS, _EPS, _REDUCTION = 16, 1e-5, 4
_RELEASED_MMDET = re.compile(r"(\d+)\.(\d+|x)(?:\.(\d+|x))?(?:rc\d+)?")
_HINTS = {
    "microsoft": "",
    "glip": "; from_glip reads towers built with USE_GN, USE_DYRELU, USE_DYFUSE and USE_DFCONV on",
    "mmdet_glip": "; from_mmdet_glip reads towers built with use_dyrelu, use_dyfuse and use_dcn on",
    "ultralytics": "; from_ultralytics reads blocks with norm_type GN",
    "mmdet": "; from_mmdet reads blocks with norm_cfg of type GN",
}


def _tensor(key: str, value: Any) -> Tensor:
    """A contiguous copy of a parameter, which detectron2 stores as a numpy array."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.array(value, order="C"))
    dense = isinstance(value, Tensor) and value.layout is torch.strided and not value.is_nested
    if not dense or not value.is_floating_point():
        kind = type(value).__name__
        if isinstance(value, Tensor):
            kind = str(value.dtype if dense else "a tensor that is not dense")
        raise ValueError(f'expected a floating-point tensor or array for "{key}", got {kind}')
    return value.detach().clone(memory_format=torch.contiguous_format)


def _block_tensors(
    state_dict: Mapping[str, Any], code_base: CodeBase, prefix: str
) -> dict[str, Tensor]:
    """The parameters of one block by the names they have here, in the shapes they have there."""
    hint = _HINTS[code_base.key]
    theirs = {name.theirs for name in code_base.names}
    missing = [name.theirs for name in code_base.names if prefix + name.theirs not in state_dict]
    if missing:
        raise ValueError(
            f'expected {len(theirs)} {code_base.title} parameters under "{prefix}", found '
            f"{len(theirs) - len(missing)} without {', '.join(missing)}{hint}"
        )
    inside = (key.removeprefix(prefix) for key in state_dict if key.startswith(prefix))
    strange = [
        key for key in inside if key.partition(".")[0] in code_base.roots and key not in theirs
    ]
    if strange:
        raise ValueError(
            f'expected a {code_base.title} block with group normalisation under "{prefix}", found '
            f"{', '.join(strange)} in it, which belong to another kind of layer{hint}"
        )
    return {
        name.ours: _tensor(prefix + name.theirs, state_dict[prefix + name.theirs])
        for name in code_base.names
    }


def _reduction(channels: int, hidden: int) -> int:
    """The reduction that gives the dynamic ReLU of ``channels`` a layer of ``hidden`` values."""
    for reduction in (_REDUCTION, channels // max(hidden, 1)):
        if reduction > 0 and max(1, channels // reduction) == hidden:
            return reduction
    raise ValueError(
        f"expected a hidden layer of {max(1, channels // _REDUCTION)} values in the dynamic ReLU "
        f"of {channels} channels, got {hidden}, which no whole reduction gives"
    )


def convert_from(
    checkpoint: Mapping[str, Any],
    code_base: CodeBase,
    prefix: str | None,
    num_groups: int,
    high_offset: HighOffset,
    upsample: Upsample,
) -> DyHead:
    """The head of a checkpoint; arguments as of the public functions."""
    state_dict = unnest(checkpoint, code_base)
    prefixes = find_blocks(checkpoint, state_dict, code_base, prefix)
    blocks = [_block_tensors(state_dict, code_base, block) for block in prefixes]
    weight, fc1 = blocks[0]["mid.weight"], blocks[0]["dynamic_relu.fc1.weight"]
    if weight.dim() != 4 or fc1.dim() not in (2, 4):
        raise ValueError(
            f'expected deformable weights [C_out, C_in, 3, 3] under "{prefixes[0]}", got '
            f"{list(weight.shape)}, and a dynamic ReLU [C_out // r, C_out], got {list(fc1.shape)}"
        )
    out_channels, in_channels = weight.shape[:2]
    with torch.device("meta"):
        head = DyHead(
            in_channels,
            out_channels,
            len(blocks),
            high_offset=high_offset,
            upsample=upsample,
            deform_bias=code_base.deform_bias,
            num_groups=num_groups,
            reduction=_reduction(out_channels, fc1.shape[0]),
        )
    shapes = {key: tuple(value.shape) for key, value in head.state_dict().items()}
    tensors = {}
    for index, (block, values) in enumerate(zip(prefixes, blocks, strict=True)):
        for name in code_base.names:
            key = f"blocks.{index}.{name.ours}"
            value, shape = values[name.ours], name.shape_there(shapes[key])
            if value.shape != shape:
                raise ValueError(
                    f'expected "{block}{name.theirs}" of shape {list(shape)} (from {in_channels} '
                    f"input and {out_channels} output channels), got {list(value.shape)}"
                )
            tensors[key] = name.to_ours(value)
    head.load_state_dict(tensors, assign=True)
    return head


def mmdet_high_offset(version: str) -> HighOffset:
    if version == "main":
        return "mmdet_main"
    match = _RELEASED_MMDET.fullmatch(version)
    if match:
        major, minor, patch = (int(v) if v and v != "x" else 0 for v in match.groups())
        if (2, 0, 0) <= (major, minor, patch) <= (3, 3, 0):
            return "flat"
    raise ValueError(
        'expected version from "2.x" to "3.3.0" (released: the offsets are read flat) or "main" '
        f"(commit 15a558d and later: offsets flat, mask cropped), got {version!r}; name the one "
        "whose code trained the checkpoint"
    )


def _check_representable(head: DyHead, code_base: CodeBase, any_groups: bool) -> None:
    """Raise unless the public code, with its fixed settings, computes what ``head`` computes."""
    for index, block in enumerate(head.blocks):
        assert isinstance(block, DyHeadBlock)
        hidden = block.hidden
        settings: list[tuple[str, object, tuple[object, ...]]] = [
            ("high_offset", block.high_offset, code_base.high_offsets),
            ("upsample", block.upsample, ("bilinear",)),
            ("eps", block.eps, (_EPS,)),
            ("attentions", block.attentions, (ATTENTIONS,)),
            ("hidden values of the dynamic ReLU", hidden, (block.out_channels // _REDUCTION,)),
        ]
        if not any_groups:
            settings.append(("num_groups", block.num_groups, (_NUM_GROUPS,)))
        for name, value, allowed in settings:
            if value not in allowed:
                raise ValueError(
                    f"expected {name} {' or '.join(map(repr, allowed))}, which {code_base.title} "
                    f"computes, got {value!r} in block {index}; {code_base.title} cannot run this "
                    "head"
                )
        if code_base is not MMDET and block.in_channels != block.out_channels:
            raise ValueError(
                f"expected as many input as output channels, got {block.in_channels} and "
                f"{block.out_channels} in block {index}; {code_base.title} cannot run such a block "
                "(mmdet can)"
            )


def _check_bias_cancels(index: int, block: DyHeadBlock) -> None:
    for branch in ("low", "mid", "high"):
        bias = getattr(block, branch).bias
        if bias is None:
            continue
        groups = bias.detach().unflatten(0, (block.num_groups, -1))
        if not torch.equal(groups, groups[:, :1].expand_as(groups)):
            raise ValueError(
                "expected a deformable bias that is constant within each of the "
                f"{block.num_groups} normalisation groups, so that the normalisation cancels it "
                f"(mmdet has no such bias), got another one in block {index}, branch {branch}; "
                "keep this head in the microsoft or GLIP form"
            )


def convert_to(
    head: DyHead,
    code_base: CodeBase,
    prefix: str,
    indices: Sequence[int] | None = None,
    any_groups: bool = False,
) -> dict[str, Tensor]:
    """The state dict of ``head``; arguments as of the public functions."""
    if not isinstance(head, DyHead):
        raise TypeError(f"expected a dyhead_cuda.DyHead, got {type(head).__name__}")
    _check_representable(head, code_base, any_groups)
    checks.instance("prefix", prefix, str)
    indices = range(len(head.blocks)) if indices is None else indices
    if not isinstance(indices, Sequence) or not all(isinstance(i, int) for i in indices):
        raise TypeError(f"expected indices as a list or range of integers, got {indices!r}")
    if len(indices) != len(head.blocks) or len(set(indices)) != len(indices):
        raise ValueError(
            f"expected {len(head.blocks)} different indices, one per block, got {list(indices)}"
        )
    result = {}
    for position, (index, block) in enumerate(zip(indices, head.blocks, strict=True)):
        assert isinstance(block, DyHeadBlock)
        if not code_base.deform_bias:
            _check_bias_cancels(position, block)
        tensors = block.state_dict()
        for name in code_base.names:
            branch, _, field = name.ours.partition(".")
            if name.ours not in tensors and field == "bias":
                weight = tensors[f"{branch}.weight"]
                tensors[name.ours] = weight.new_zeros(len(weight))
            result[f"{prefix}{index}.{name.theirs}"] = name.to_theirs(tensors[name.ours]).clone()
    return result


def rename_from(
    state_dict: dict[str, Any], code_base: CodeBase, prefix: str, ours: str, head: DyHead
) -> None:
    """Rename the blocks under ``prefix`` in ``state_dict``, in place, as those of ``head``.

    Args:
        state_dict: that is about to be loaded; without blocks under ``prefix`` it is left alone.
        code_base: whose names they have.
        prefix: of the tower there.
        ours: prefix of the blocks of ``head`` here.
        head: which tells the number of blocks.
    """
    for index in range(len(head.blocks)):
        for name in code_base.names:
            value = state_dict.pop(f"{prefix}{index}.{name.theirs}", None)
            if value is not None:
                state_dict[f"{ours}{index}.{name.ours}"] = name.to_ours(value)
