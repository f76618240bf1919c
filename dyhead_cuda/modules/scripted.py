"""What ``torch.jit.script`` makes of the modules: one it can compile, the others it is kept from.

``torch.jit.script`` calls ``__prepare_scriptable__`` of every module inside a model.
"""

from __future__ import annotations

from typing import NoReturn, Optional

import torch
from torch import Tensor, nn

from dyhead_cuda import library
from dyhead_cuda.ops.jobs import ReadRule


class NotScriptable:
    """A module of which ``torch.jit.script`` gets one sentence in place of its own errors."""

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError(
            f"torch.jit.script cannot compile a {type(self).__name__}: use torch.jit.trace, which "
            "serves all sizes, or torch.export or torch.compile (docs/export.md)"
        )


def in_type(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t`` of a type. Without the ``if``, TorchScript would take several conversions in a row for
    a part to differentiate by itself, and lose gradients that its first calls did not ask for.
    """
    if t.dtype != dtype:
        return t.to(dtype)
    return t


class ScriptableDeformConv2d(nn.Module):
    """A ModulatedDeformConv2d, on its parameters, in the Python that ``torch.jit.script`` knows.

    Args:
        weight: [C_out, C_in / groups, kh, kw].
        bias: [C_out] or None.
        stride: (vertical, horizontal), in pixels, like the two that follow.
        padding: likewise.
        dilation: likewise.
        groups: of channels.
        deform_groups: groups of input channels with offsets of their own.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        groups: int,
        deform_groups: int,
    ) -> None:
        super().__init__()
        library.require("cpu")
        self.weight, self.bias = weight, bias
        self.kernel = [weight.shape[2], weight.shape[3]]
        self.stride, self.padding, self.dilation = list(stride), list(padding), list(dilation)
        self.geometry = [groups, deform_groups, *self.kernel, *padding, *dilation]
        rule = int(ReadRule.SAME)
        self.job = [0, rule, rule, *stride, 0, 1, 0]  # JOB_FIELDS

    def forward(self, x: Tensor, offset: Tensor, mask: Optional[Tensor] = None) -> Tensor:  # noqa: UP045
        """See :meth:`dyhead_cuda.ModulatedDeformConv2d.forward`."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        size = [x.size(2), x.size(3)]
        out: list[int] = []
        for i in range(2):
            covered = self.dilation[i] * (self.kernel[i] - 1) + 1
            out.append((size[i] + 2 * self.padding[i] - covered) // self.stride[i] + 1)
        offset = in_type(offset, dtype)
        if mask is None:
            mask = torch.ones_like(offset[:, : offset.size(1) // 2])
        predictions = torch.cat([offset, in_type(mask, dtype)], 1)
        if not x.is_contiguous():
            x = x.contiguous()
        weights, biases = [in_type(self.weight, dtype)], None
        if self.bias is not None:
            biases = [in_type(self.bias, dtype)]
        rows, _, _, _ = torch.ops.dyhead.deform_conv_fwd(
            torch.ops.dyhead.pack_levels([x]),
            torch.ops.dyhead.pack_levels([predictions]),
            weights,
            biases,
            None,
            x.size(0),
            size,
            out,
            out,
            out,
            self.geometry,
            [0, 0],
            self.job,
            False,
            False,
            False,
            False,
        )
        return torch.ops.dyhead.unpack_levels(rows, x.size(0), out)[0]
