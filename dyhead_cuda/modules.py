"""Dynamic Head as modules: the published head on a pyramid, and the paper's head on one tensor."""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import partial
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from dyhead_cuda import checks, functional
from dyhead_cuda.pyramid import (
    HIGH_OFFSETS,
    TAPS,
    UPSAMPLES,
    BlockParameters,
    BranchParameters,
    Features,
    HighOffset,
    Upsample,
    repack,
    unpack,
)
from dyhead_cuda.recompute import recomputed
from dyhead_cuda.reference import Activation, ResizeMode, Targets, UnifiedParameters

Init = Literal["microsoft", "mmdet"]
Attention = Literal["scale", "spatial", "task"]
ATTENTIONS: tuple[Attention, ...] = get_args(Attention)

_SATURATED = 40.0  # whose sigmoid is 1 in every type, exactly


def _reset_deform_weight(weight: Tensor) -> None:
    bound = 1 / math.sqrt(weight[0].numel())
    nn.init.uniform_(weight, -bound, bound)


def _normal(layer: nn.Linear | nn.Conv2d) -> None:
    nn.init.normal_(layer.weight, 0, 0.01)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _fix(layer: nn.Linear | nn.Conv2d, bias: Tensor) -> None:
    """Makes ``layer`` give ``bias`` whatever it reads, without parameters and in no state dict."""
    weight = torch.zeros_like(layer.weight)
    del layer.weight, layer.bias
    layer.register_buffer("weight", weight, persistent=False)
    layer.register_buffer("bias", bias.to(weight), persistent=False)


class ModulatedDeformConv2d(nn.Module):
    """Modulated deformable convolution whose offsets and mask are given at each call.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups: as for
            :class:`torch.nn.Conv2d`.
        deform_groups: groups of input channels with offsets of their own.
        bias: whether to add a learned bias.

    ``forward(x, offset, mask)`` takes x [N, C_in, H, W], offset
    [N, 2 * deform_groups * K, H_out, W_out] in pixels (dy before dx) and mask
    [N, deform_groups * K, H_out, W_out] or None, and returns [N, C_out, H_out, W_out].
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
        kernel = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.groups, self.deform_groups = groups, deform_groups
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *kernel))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights uniform in +-1 / sqrt(fan_in) and a zero bias, as the published operator."""
        _reset_deform_weight(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        return functional.modulated_deform_conv2d(
            x, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, "
            f"groups={self.groups}, deform_groups={self.deform_groups}, "
            f"bias={self.bias is not None}"
        )


class DynamicReLU(nn.Module):
    """Task-aware attention: max(a1 . x + b1, a2 . x + b2) with coefficients predicted from x.

    Args:
        channels: C of the input [N, C, ...].
        reduction: the hidden layer has max(1, C // reduction) values.
        activation: "hsigmoid" (the published code) or "sigmoid" (the paper).

    Source: arXiv 2003.10027 as used in arXiv 2106.08322, section 3.2.
    """

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


class DeformBranch(nn.Module):
    """Parameters of one branch of :class:`DyHeadBlock`: a deformable convolution and its norm."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.norm_weight = nn.Parameter(torch.ones(out_channels))
        self.norm_bias = nn.Parameter(torch.zeros(out_channels))
        _reset_deform_weight(self.weight)

    def parameters_tuple(self) -> BranchParameters:
        return BranchParameters(self.weight, self.bias, self.norm_weight, self.norm_bias)


class DyHeadBlock(nn.Module):
    """One block of the published head; see :class:`DyHead` for the arguments.

    ``forward`` takes and returns a list, tuple or dict of levels [N, C, H_l, W_l], finest first.
    """

    def __init__(
        self,
        in_channels: int = 256,
        out_channels: int = 256,
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
    ) -> None:
        super().__init__()
        checks.one_of("high_offset", high_offset, HIGH_OFFSETS)
        checks.one_of("upsample", upsample, UPSAMPLES)
        for attention in attentions:
            checks.one_of("attentions", attention, ATTENTIONS)
        checks.one_of("init", init, get_args(Init))
        checks.positive(in_channels=in_channels, out_channels=out_channels, num_groups=num_groups)
        if out_channels % num_groups:
            raise ValueError(
                f"expected out_channels divisible by num_groups, got {out_channels} channels and "
                f"{num_groups} groups"
            )
        self.in_channels, self.out_channels = in_channels, out_channels
        self.high_offset, self.upsample = high_offset, upsample
        self.num_groups, self.eps = num_groups, eps
        self.recompute = recompute
        self.attentions = tuple(name for name in ATTENTIONS if name in attentions)
        self.offset_conv = nn.Conv2d(in_channels, 3 * TAPS, 3, padding=1)
        self.low = DeformBranch(in_channels, out_channels, deform_bias)
        self.mid = DeformBranch(in_channels, out_channels, deform_bias)
        self.high = DeformBranch(in_channels, out_channels, deform_bias)
        self.scale_gate = nn.Linear(out_channels, 1)
        self.dynamic_relu = DynamicReLU(out_channels, reduction)
        _normal(self.scale_gate)
        if init == "mmdet":
            for parameter in self.offset_conv.parameters():
                nn.init.zeros_(parameter)
            _normal(self.dynamic_relu.fc1)
            _normal(self.dynamic_relu.fc2)
        self._fix_absent_attentions()

    def _fix_absent_attentions(self) -> None:
        if "scale" not in self.attentions:
            _fix(self.scale_gate, torch.tensor([3.0]))  # hsigmoid(3) = 1
        if "spatial" not in self.attentions:
            _fix(self.offset_conv, torch.tensor([0.0] * 2 * TAPS + [_SATURATED] * TAPS))
        if "task" not in self.attentions:
            relu = self.dynamic_relu
            _fix(relu.fc1, torch.zeros(relu.fc1.out_features))
            # Logits of a1, b1, a2, b2 for max(1 x + 0, 1 x + 0).
            _fix(relu.fc2, torch.tensor([0.0, 0.0, 3.0, 0.0]).repeat_interleave(self.out_channels))

    def parameters_tuple(self) -> BlockParameters:
        """The parameters as :func:`dyhead_cuda.functional.pyramid_block` takes them."""
        relu = self.dynamic_relu
        return BlockParameters(
            self.offset_conv.weight,
            cast(Tensor, self.offset_conv.bias),
            self.low.parameters_tuple(),
            self.mid.parameters_tuple(),
            self.high.parameters_tuple(),
            self.scale_gate.weight[0],
            self.scale_gate.bias,
            relu.fc1.weight,
            relu.fc1.bias,
            relu.fc2.weight,
            relu.fc2.bias,
        )

    def forward(self, features: Features) -> Features:
        run = partial(
            functional.pyramid_block,
            high_offset=self.high_offset,
            upsample=self.upsample,
            num_groups=self.num_groups,
            eps=self.eps,
        )
        arguments = unpack(features), self.parameters_tuple()
        levels = recomputed(run, *arguments) if self.recompute else run(*arguments)
        return repack(features, levels)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, high_offset={self.high_offset!r}, "
            f"upsample={self.upsample!r}, "
            f"num_groups={self.num_groups}, deform_bias={self.mid.bias is not None}, "
            f"eps={self.eps}, recompute={self.recompute}, attentions={self.attentions}"
        )


class DyHead(nn.Module):
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
            ReLU PyTorch's default, or zero and N(0, 0.01).
        eps: of the group normalisation.
        recompute: keep for the backward only what goes into and comes out of each block, not what
            is between (predictions and branches, about three times as much), and compute that
            again there. Costs one more forward; results and gradients are the same bits. It is an
            attribute of every block and can be changed at any time.
        attentions: those in use. One that is left out is the identity and has no parameters:
            without "scale" the gates are 1, without "spatial" the offsets 0 and the mask 1 (plain
            3x3 convolutions of three levels), without "task" there is no dynamic ReLU. Detectors
            of two stages leave out the last before the RoI pooling.

    ``forward`` takes a list, tuple or dict of levels [N, C, H_l, W_l], finest first, and returns
    the same kind of container with levels [N, out_channels, H_l, W_l].
    Each level must be half of the finer one, rounded up, except for "aligned".

    Raises:
        ValueError: sizes, channels, dtypes or devices that do not fit, before anything runs.

    Source: arXiv 2106.08322; microsoft/DynamicHead; mmdet ``necks/dyhead.py``.
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
    ) -> None:
        super().__init__()
        checks.positive(num_blocks=num_blocks)
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
            )
            for i in range(num_blocks)
        )

    def forward(self, features: Features) -> Features:
        for block in self.blocks:
            features = block(features)
        return features


class UnifiedDyHeadBlock(nn.Module):
    """W(F) = pi_C(pi_S(pi_L(F) . F) . F) . F; see :class:`UnifiedDyHead` for the arguments."""

    def __init__(
        self,
        levels: int = 5,
        channels: int = 256,
        reduction: int = 4,
        targets: Targets = "all",
        recompute: bool = False,
    ) -> None:
        super().__init__()
        checks.one_of("targets", targets, checks.TARGETS)
        checks.positive(levels=levels, channels=channels)
        self.levels, self.channels, self.targets = levels, channels, targets
        self.recompute = recompute
        self.scale = nn.Linear(levels, levels)
        self.offset_conv = nn.Conv2d(channels, 3 * TAPS, 3, padding=1)
        self.spatial_weight = nn.Parameter(torch.empty(levels, channels, channels, 3, 3))
        self.dynamic_relu = DynamicReLU(channels, reduction, "sigmoid")
        with torch.no_grad():
            for weight in self.spatial_weight:
                _reset_deform_weight(weight)

    def parameters_tuple(self) -> UnifiedParameters:
        """The parameters as :func:`dyhead_cuda.functional.unified_block` takes them."""
        relu = self.dynamic_relu
        return UnifiedParameters(
            self.scale.weight,
            self.scale.bias,
            self.offset_conv.weight,
            cast(Tensor, self.offset_conv.bias),
            self.spatial_weight,
            relu.fc1.weight,
            relu.fc1.bias,
            relu.fc2.weight,
            relu.fc2.bias,
        )

    def forward(self, features: Tensor) -> Tensor:
        run = partial(functional.unified_block, targets=self.targets)
        arguments = features, self.parameters_tuple()
        return recomputed(run, *arguments) if self.recompute else run(*arguments)


class UnifiedDyHead(nn.Module):
    """The paper's Dynamic Head on one tensor F of [N, L, C, H, W], stackable.

    Args:
        levels: L.
        channels: C, kept by every block.
        num_blocks: 6 in the paper.
        reduction: of the dynamic ReLU's hidden layer.
        targets: "all" (every level keeps its own aggregate) or, with a single block, "median" (the
            formula as printed: one aggregate at the median level).
        resize: how a pyramid is brought to its median level, "bilinear", "nearest" or "max".
        recompute: see :class:`DyHead`.

    ``forward`` takes F, or a list, tuple or dict of levels [N, C, H_l, W_l] of any sizes, finest
    first, and returns [N, L, C, H, W] ([N, 1, C, H, W] for "median").

    Raises:
        ValueError: shapes that do not fit, with what was expected.

    Source: arXiv 2106.08322, section 3.
    """

    def __init__(
        self,
        levels: int = 5,
        channels: int = 256,
        num_blocks: int = 6,
        *,
        reduction: int = 4,
        targets: Targets = "all",
        resize: ResizeMode = "bilinear",
        recompute: bool = False,
    ) -> None:
        super().__init__()
        checks.positive(num_blocks=num_blocks)
        if targets == "median" and num_blocks > 1:
            raise ValueError(
                'expected num_blocks 1 with targets "median", whose result has one level, got '
                f'{num_blocks}; use targets="all" to stack blocks'
            )
        checks.one_of("resize", resize, checks.RESIZE_MODES)
        self.resize = resize
        self.blocks = nn.ModuleList(
            UnifiedDyHeadBlock(levels, channels, reduction, targets, recompute)
            for _ in range(num_blocks)
        )

    def forward(
        self, features: Tensor | list[Tensor] | tuple[Tensor, ...] | dict[str, Tensor]
    ) -> Tensor:
        if isinstance(features, Tensor):
            stacked = features
        else:
            stacked = functional.stack_pyramid(unpack(features), self.resize)
        for block in self.blocks:
            stacked = block(stacked)
        return stacked
