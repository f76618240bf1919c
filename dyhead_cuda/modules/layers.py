"""The layers that both forms of the head are made of."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dyhead_cuda import checks, functional, plain, unfused
from dyhead_cuda.modules.initialisation import reset_deform_weight
from dyhead_cuda.modules.scripted import NotScriptable, ScriptableDeformConv2d
from dyhead_cuda.numerics import Activation

CONV3X3 = plain.kind(
    nn.Conv2d,
    kernel_size=(3, 3),
    stride=(1, 1),
    padding=(1, 1),
    dilation=(1, 1),
    groups=1,
    padding_mode="zeros",
)
LINEAR = plain.kind(nn.Linear)


def dtype_of(module: nn.Module, features: Tensor) -> torch.dtype:
    """The type that the layers inside ``module`` compute in: that of its first parameter."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            return parameter.dtype
    return features.dtype


class ModulatedDeformConv2d(nn.Module):
    """Modulated deformable convolution whose offsets and mask are given at each call.

    Args:
        in_channels: C_in.
        out_channels: C_out.
        kernel_size: an int or (kh, kw).
        stride: an int or (vertical, horizontal), in pixels.
        padding: likewise.
        dilation: likewise.
        groups: as for :class:`torch.nn.Conv2d`.
        deform_groups: groups of input channels with offsets of their own.
        bias: whether to add a learned bias.

    Raises:
        TypeError: a bias that is no bool.
        ValueError: channels that the groups do not divide, sizes that are no integers, below 1 or
            too large.

    Source: arXiv 1811.11168, equation 1.

    Example:
        >>> import torch, dyhead_cuda
        >>> conv = dyhead_cuda.ModulatedDeformConv2d(8, 16, 3, padding=1)
        >>> x, offset = torch.randn(2, 8, 10, 12), torch.randn(2, 18, 10, 12)
        >>> conv(x, offset, torch.rand(2, 9, 10, 12)).shape
        torch.Size([2, 16, 10, 12])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        checks.positive(
            in_channels=in_channels,
            out_channels=out_channels,
            groups=groups,
            deform_groups=deform_groups,
        )
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
            if value % groups:
                raise ValueError(f"expected {name} divisible by {groups} groups, got {value}")
        if in_channels % deform_groups:
            raise ValueError(
                f"expected in_channels divisible by {deform_groups} deformable groups, "
                f"got {in_channels}"
            )
        kernel = checks.pair("kernel_size", kernel_size, 1, checks.MAX_KERNEL)
        checks.switch(bias=bias)
        checks.pair("stride", stride, 1)
        checks.pair("padding", padding, 0)
        checks.pair("dilation", dilation, 1)
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.groups, self.deform_groups = groups, deform_groups
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *kernel))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights uniform in +-1 / sqrt(fan_in) and a zero bias, as the published operator."""
        reset_deform_weight(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """Sample ``x`` at the 3x3 (or other) taps plus their offsets, and convolve.

        Args:
            x: [N, C_in, H, W], of float64, float32, float16 or bfloat16.
            offset: [N, 2 * deform_groups * K, H_out, W_out] in pixels of ``x``, dy before dx for
                each of the K taps; of any floating type.
            mask: [N, deform_groups * K, H_out, W_out], after its sigmoid, or None for ones.

        Returns:
            [N, C_out, H_out, W_out] in the dtype and memory format of ``x``.

        Raises:
            TypeError: what should be a tensor is none.
            ValueError: shapes, devices or types that do not fit.
        """
        return functional.modulated_deform_conv2d(
            x, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask
        )

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script compiles in this module's place, on the same parameters.

        Raises:
            RuntimeError: hooks, a subclass or a parametrization, which would be lost.
        """
        reason = plain.why_not_plain(self, CONVOLUTION)
        if reason is None and self._parameters.get("weight") is None:
            reason = "has a weight that is computed"
        if reason is not None:
            raise RuntimeError(
                f"torch.jit.script cannot compile a {type(self).__name__} that {reason}: use "
                "torch.jit.trace, torch.export or torch.compile (docs/export.md)"
            )

        def pair(value: int | tuple[int, int]) -> tuple[int, int]:
            return (value, value) if isinstance(value, int) else value

        return ScriptableDeformConv2d(
            self.weight,
            self.bias,
            pair(self.stride),
            pair(self.padding),
            pair(self.dilation),
            self.groups,
            self.deform_groups,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, "
            f"groups={self.groups}, deform_groups={self.deform_groups}, "
            f"bias={self.bias is not None}"
        )


CONVOLUTION = plain.kind(ModulatedDeformConv2d, ("weight",))


class DynamicReLU(NotScriptable, nn.Module):
    """Task-aware attention: max(a1 . x + b1, a2 . x + b2) with coefficients predicted from x.

    Args:
        channels: C of the input [N, C, ...].
        reduction: the hidden layer has max(1, C // reduction) values.
        activation: "hsigmoid" (the published code) or "sigmoid" (the paper).

    Raises:
        ValueError: sizes below 1, an unknown activation.

    Source: arXiv 2003.10027 as used in arXiv 2106.08322, section 3.2.

    Example:
        >>> import torch, dyhead_cuda
        >>> dyhead_cuda.DynamicReLU(8)(torch.randn(2, 8, 5, 5)).shape
        torch.Size([2, 8, 5, 5])
    """

    label: str | None = "A DynamicReLU"  # what the log calls it; None: a block speaks for it

    def __init__(
        self, channels: int, reduction: int = 4, activation: Activation = "hsigmoid"
    ) -> None:
        super().__init__()
        checks.positive(channels=channels, reduction=reduction)
        checks.one_of("activation", activation, checks.ACTIVATIONS)
        self.channels, self.activation = channels, activation
        hidden = max(1, channels // reduction)
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, 4 * channels)

    def forward(self, x: Tensor) -> Tensor:
        """max(a1 . x + b1, a2 . x + b2), one kernel unless ``fc1`` or ``fc2`` must be called.

        Args:
            x: [N, C, ...] of float64, float32, float16 or bfloat16.

        Returns:
            As ``x``.

        Raises:
            TypeError: no tensor.
            ValueError: another number of channels, or of another device.
        """
        parts = (("fc1", self.fc1, LINEAR), ("fc2", self.fc2, LINEAR))
        reason = plain.hooks_everywhere() or plain.first_reason(parts)
        if reason is not None:
            if self.label is not None:
                plain.say_once(self, self.label, reason)
            checks.relu_input(x, self.channels)
            dtype = dtype_of(self, x)
            return unfused.dynamic_relu(x, self.fc1, self.fc2, self.activation, dtype)
        return functional.dynamic_relu(
            x,
            self.fc1.weight,
            self.fc1.bias,
            self.fc2.weight,
            self.fc2.bias,
            activation=self.activation,
        )

    def extra_repr(self) -> str:
        return f"{self.channels}, activation={self.activation!r}"


class LeftOut(nn.Module):
    """The place of an attention that a block was built without: no parameters, never called."""
