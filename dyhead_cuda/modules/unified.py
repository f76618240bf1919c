"""The paper's head: three attentions in turn on one tensor of stacked levels."""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from dyhead_cuda import checks, functional, plain, unfused
from dyhead_cuda.modules.initialisation import reset_deform_weight
from dyhead_cuda.modules.layers import (
    CONV3X3,
    LINEAR,
    DynamicReLU,
    dtype_of,
)
from dyhead_cuda.modules.scripted import NotScriptable
from dyhead_cuda.numerics import ResizeMode, Targets, UnifiedParameters
from dyhead_cuda.pyramid import TAPS, unpack
from dyhead_cuda.recompute import recomputed

RELU = plain.kind(DynamicReLU, (), activation="sigmoid")


class UnifiedDyHeadBlock(NotScriptable, nn.Module):
    """W(F) = pi_C(pi_S(pi_L(F) . F) . F) . F, one block of :class:`UnifiedDyHead`.

    Args:
        levels: L.
        channels: C.
        reduction: of the dynamic ReLU's hidden layer.
        targets: "all" or "median", see :class:`UnifiedDyHead`.
        recompute: see :class:`~dyhead_cuda.DyHead`.

    Raises:
        TypeError: a ``recompute`` that is no bool.
        ValueError: sizes below 1, unknown targets.

    Source: arXiv 2106.08322, equation 2.

    Example:
        >>> import torch
        >>> from dyhead_cuda.modules import UnifiedDyHeadBlock
        >>> UnifiedDyHeadBlock(levels=3, channels=8)(torch.randn(1, 3, 8, 6, 7)).shape
        torch.Size([1, 3, 8, 6, 7])
    """

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
        checks.switch(recompute=recompute)
        self.levels, self.channels, self.targets = levels, channels, targets
        self.recompute = recompute
        self.scale = nn.Linear(levels, levels)
        self.offset_conv = nn.Conv2d(channels, 3 * TAPS, 3, padding=1)
        self.spatial_weight = nn.Parameter(torch.empty(levels, channels, channels, 3, 3))
        self.dynamic_relu = DynamicReLU(channels, reduction, "sigmoid")
        self.dynamic_relu.label = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Spatial weights uniform in +-1 / sqrt(9 * C); inner modules have methods of their own."""
        with torch.no_grad():
            for weight in self.spatial_weight:
                reset_deform_weight(weight)

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

    def unfused_reason(self) -> str | None:
        """Why the inner modules must be called instead of their parameters read, or None."""
        reason = plain.hooks_everywhere() or plain.first_reason(
            (
                ("scale", self.scale, LINEAR),
                ("offset_conv", self.offset_conv, CONV3X3),
                ("dynamic_relu", self.dynamic_relu, RELU),
            )
        )
        if reason is not None:
            return reason
        relu = self.dynamic_relu
        return plain.first_reason(
            (("dynamic_relu.fc1", relu.fc1, LINEAR), ("dynamic_relu.fc2", relu.fc2, LINEAR))
        )

    def forward(self, features: Tensor) -> Tensor:
        """One block.

        Args:
            features: F, [N, L, C, H, W] of float64, float32, float16 or bfloat16.

        Returns:
            As ``features``; [N, 1, C, H, W] for targets "median".

        Raises:
            TypeError: no tensor.
            ValueError: shapes, devices or types that do not fit.
        """
        checks.unified_features(features, self.levels, self.channels)
        reason = self.unfused_reason()
        if reason is not None:
            if plain.say_once(self, "A UnifiedDyHeadBlock", reason):
                plain.say_uncounted(self, "A UnifiedDyHeadBlock")
            return self._unfused(features)
        run = partial(functional.unified_block, targets=self.targets)
        arguments = features, self.parameters_tuple()
        return recomputed(run, *arguments) if self.recompute else run(*arguments)

    def _unfused(self, features: Tensor) -> Tensor:
        return unfused.unified_block(
            features.to(dtype_of(self, features)),
            self.scale,
            self.offset_conv,
            self.spatial_weight,
            self.dynamic_relu,
            self.targets,
        ).to(features.dtype)


class UnifiedDyHead(NotScriptable, nn.Module):
    """The paper's Dynamic Head on one tensor F of [N, L, C, H, W], stackable.

    Args:
        levels: L.
        channels: C, kept by every block.
        num_blocks: 6 in the paper.
        reduction: of the dynamic ReLU's hidden layer.
        targets: "all" (every level keeps its own aggregate) or, with a single block, "median" (the
            formula as printed: one aggregate at the median level).
        resize: how a pyramid is brought to its median level, "bilinear", "nearest" or "max".
        recompute: see :class:`~dyhead_cuda.DyHead`.

    Raises:
        TypeError: a ``recompute`` that is no bool.
        ValueError: sizes below 1, unknown names, "median" with more than one block.

    Source: arXiv 2106.08322, section 3.

    Example:
        >>> import torch, dyhead_cuda
        >>> head = dyhead_cuda.UnifiedDyHead(levels=3, channels=8, num_blocks=2)
        >>> head([torch.randn(1, 8, side, side) for side in (16, 8, 4)]).shape
        torch.Size([1, 3, 8, 8, 8])
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
        """Stack the pyramid, if it is one, and run the blocks.

        Args:
            features: F, [N, L, C, H, W], or a list, tuple or dict of levels [N, C, H_l, W_l] of any
                sizes, finest first; of float64, float32, float16 or bfloat16.

        Returns:
            [N, L, C, H, W] in the dtype of the features ([N, 1, C, H, W] for targets "median"),
            contiguous where F is.

        Raises:
            ValueError: shapes that do not fit, with what was expected.
            TypeError: features that are no tensor and no container of tensors.
        """
        if isinstance(features, Tensor):
            stacked = features
        else:
            stacked = functional.stack_pyramid(unpack(features), self.resize)
        checks.unified_features(stacked)
        contiguous = stacked.is_contiguous()
        if contiguous:
            # With channels innermost, as the kernels read it: blocks keep the order that they get.
            stacked = stacked.permute(1, 0, 3, 4, 2).contiguous().permute(1, 0, 4, 2, 3)
        for block in self.blocks:
            stacked = block(stacked)
        return stacked.contiguous() if contiguous else stacked
