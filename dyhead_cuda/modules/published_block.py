"""One block of the published head, and the branches that it has."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyhead_cuda import checks, functional, plain, unfused
from dyhead_cuda.modules.initialisation import Init, initialise_block, reset_deform_weight
from dyhead_cuda.modules.layers import (
    CONV3X3,
    LINEAR,
    DynamicReLU,
    LeftOut,
    dtype_of,
)
from dyhead_cuda.modules.scripted import NotScriptable
from dyhead_cuda.numerics import hsigmoid, output_format
from dyhead_cuda.pyramid import (
    HIGH_OFFSETS,
    OFFSET_CHANNELS,
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

Attention = Literal["scale", "spatial", "task"]
ATTENTIONS: tuple[Attention, ...] = get_args(Attention)
WithoutTask = Literal["identity", "relu"]

RELU = plain.kind(DynamicReLU, (), activation="hsigmoid")

PRESERVE = torch.preserve_format
_SATURATED = 40.0  # whose sigmoid is 1 in every type, exactly


class DeformBranch(NotScriptable, nn.Module):
    """One branch of a block: a 3x3 modulated deformable convolution and its group normalisation.

    Args:
        in_channels: C_in.
        out_channels: C_out, divisible by ``num_groups``.
        bias: whether the convolution has one.
        num_groups: of the normalisation.
        eps: of the normalisation.

    Raises:
        TypeError: a bias that is no bool.
        ValueError: sizes below 1, channels that the groups do not divide, an eps that is none.

    Source: microsoft/DynamicHead, ``dyhead/dyhead.py``, ``Conv3x3Norm``.

    Example:
        >>> import torch
        >>> from dyhead_cuda.modules import DeformBranch
        >>> branch = DeformBranch(8, 16, bias=True, num_groups=4)
        >>> offset, mask = torch.zeros(1, 18, 3, 3), torch.ones(1, 9, 3, 3)
        >>> branch(torch.randn(1, 8, 6, 6), offset, mask, stride=2).shape
        torch.Size([1, 16, 3, 3])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        bias: bool,
        num_groups: int = 16,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        checks.positive(in_channels=in_channels, out_channels=out_channels, num_groups=num_groups)
        checks.epsilon(eps)
        checks.switch(bias=bias)
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, 3, 3))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.norm = nn.GroupNorm(num_groups, out_channels, eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights uniform in +-1 / sqrt(9 * C_in), a zero bias; the norm has its own method."""
        reset_deform_weight(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def parameters_tuple(self) -> BranchParameters:
        """The parameters as :func:`dyhead_cuda.functional.pyramid_block` takes them."""
        return BranchParameters(self.weight, self.bias, self.norm.weight, self.norm.bias)

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor, stride: int = 1) -> Tensor:
        """Convolve and normalise. A fused block reads the parameters and does not call this.

        Args:
            x: [N, C_in, H, W], of the parameters' dtype.
            offset: [N, 18, H_out, W_out] in pixels of ``x``, dy before dx for each tap.
            mask: [N, 9, H_out, W_out], after its sigmoid.
            stride: 1 or 2.

        Returns:
            [N, C_out, H_out, W_out].

        Raises:
            TypeError: what should be a tensor is none.
            ValueError: shapes, devices or types that do not fit.
        """
        y = functional.modulated_deform_conv2d(
            x, offset, self.weight, self.bias, stride, 1, 1, mask
        )
        if y.numel() == 0:
            return y
        if y.numel() == y.shape[1] == self.norm.num_groups:
            # One value per group: nn.GroupNorm refuses a single image of these.
            return self.norm(torch.cat([y, y]))[:1]
        return self.norm(y)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in ("weight", "bias"):  # until version 0.1 they were parameters of the branch
            old = f"{prefix}norm_{name}"
            if old in state_dict:
                state_dict[f"{prefix}norm.{name}"] = state_dict.pop(old)
        super()._load_from_state_dict(state_dict, prefix, *rest)


BRANCH = plain.kind(DeformBranch, ("weight",))
NORM = plain.kind(nn.GroupNorm)


class DyHeadBlock(NotScriptable, nn.Module):
    """One block of the published head.

    Args:
        in_channels: C_in, of the levels that come in.
        out_channels: C_out, of the results.
        high_offset: see :class:`DyHead`, as for all that follow.
        upsample: how the branch on the coarser level comes to the level's size.
        deform_bias: a bias on the deformable convolutions.
        num_groups: groups of the normalisations, which divide ``out_channels``.
        reduction: of the dynamic ReLU's hidden layer.
        init: what the parameters start from.
        eps: of the normalisations.
        recompute: keep less for the backward and compute it again there.
        attentions: those in use.
        without_task: what stands in place of a task attention that is left out.
        memory_format: of the results.

    Raises:
        TypeError: a switch that is no bool.
        ValueError: sizes that do not fit, unknown names.

    Source: arXiv 2106.08322; microsoft/DynamicHead, ``dyhead/dyhead.py``, ``DyConv``.

    Example:
        >>> import torch, dyhead_cuda
        >>> block = dyhead_cuda.DyHeadBlock(8, 16)
        >>> levels = {"p3": torch.randn(1, 8, 12, 16), "p4": torch.randn(1, 8, 6, 8)}
        >>> {name: tuple(x.shape) for name, x in block(levels).items()}
        {'p3': (1, 16, 12, 16), 'p4': (1, 16, 6, 8)}
    """

    label = "A DyHeadBlock"  # what the log calls it

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
        without_task: WithoutTask = "identity",
        memory_format: torch.memory_format = PRESERVE,
    ) -> None:
        super().__init__()
        checks.one_of("high_offset", high_offset, HIGH_OFFSETS)
        checks.one_of("upsample", upsample, UPSAMPLES)
        checks.names("attentions", attentions, ATTENTIONS)
        checks.one_of("init", init, get_args(Init))
        checks.one_of("without_task", without_task, get_args(WithoutTask))
        if "task" in attentions and without_task != "identity":
            raise ValueError(
                f'expected attentions without "task" for without_task={without_task!r}, got '
                f"{tuple(attentions)}; leave one of the two out"
            )
        checks.memory_format(memory_format)
        checks.epsilon(eps)
        checks.switch(deform_bias=deform_bias, recompute=recompute)
        checks.positive(
            in_channels=in_channels,
            out_channels=out_channels,
            num_groups=num_groups,
            reduction=reduction,
        )
        if out_channels % num_groups:
            raise ValueError(
                f"expected out_channels divisible by num_groups, got {out_channels} channels and "
                f"{num_groups} groups"
            )
        self.in_channels, self.out_channels = in_channels, out_channels
        self.high_offset, self.upsample = high_offset, upsample
        self.num_groups, self.eps = num_groups, eps
        self.recompute, self.memory_format = recompute, memory_format
        self.deform_bias = deform_bias
        self.attentions = tuple(name for name in ATTENTIONS if name in attentions)
        self.without_task = without_task
        self.hidden = max(1, out_channels // reduction)
        self.offset_conv = nn.Conv2d(in_channels, 3 * TAPS, 3, padding=1)
        branch = in_channels, out_channels, deform_bias, num_groups, eps
        self.low, self.mid, self.high = (DeformBranch(*branch) for _ in range(3))
        self.scale_gate = nn.Linear(out_channels, 1)
        self.dynamic_relu = DynamicReLU(out_channels, reduction)
        self.dynamic_relu.label = None
        initialise_block(self, init)
        for attention, name in (
            ("scale", "scale_gate"),
            ("spatial", "offset_conv"),
            ("task", "dynamic_relu"),
        ):
            if attention not in self.attentions:
                setattr(self, name, LeftOut())

    def parameters_tuple(self) -> BlockParameters:
        """The parameters as :func:`dyhead_cuda.functional.pyramid_block` takes them.

        An attention that is left out has constants there, which make it the identity, or the task
        attention a ReLU.
        """
        low, mid, high = (b.parameters_tuple() for b in (self.low, self.mid, self.high))
        weight = mid.weight
        offset: tuple[Tensor, Tensor]
        gate: tuple[Tensor, Tensor]
        task: tuple[Tensor, Tensor, Tensor, Tensor]
        if "spatial" in self.attentions:
            offset = self.offset_conv.weight, cast(Tensor, self.offset_conv.bias)
        else:
            offset = weight.new_zeros(3 * TAPS, self.in_channels, 3, 3), weight.new_zeros(3 * TAPS)
            offset[1][OFFSET_CHANNELS:] = _SATURATED  # the mask is 1
        if "scale" in self.attentions:
            gate = self.scale_gate.weight[0], self.scale_gate.bias
        else:
            gate = weight.new_zeros(self.out_channels), weight.new_full((1,), 3.0)  # hsigmoid is 1
        if "task" in self.attentions:
            fc1, fc2 = self.dynamic_relu.fc1, self.dynamic_relu.fc2
            task = fc1.weight, fc1.bias, fc2.weight, fc2.bias
        else:
            channels, hidden = self.out_channels, self.hidden
            task = (
                weight.new_zeros(hidden, channels),
                weight.new_zeros(hidden),
                weight.new_zeros(4 * channels, hidden),
                weight.new_zeros(4 * channels),
            )
            if self.without_task == "identity":
                task[3][2 * channels : 3 * channels] = 3.0  # a1 = a2 = 1, b1 = b2 = 0
        return BlockParameters(*offset, low, mid, high, *gate, *task)

    def unfused_reason(self) -> str | None:
        """Why the inner modules must be called instead of their parameters read, or None."""
        # Each forward asks this: plain dictionaries are read, which is several times as fast.
        state = self.__dict__
        modules: dict[str, Any] = state["_modules"]
        low, mid, high = modules["low"], modules["mid"], modules["high"]
        norms = [branch._modules.get("norm") for branch in (low, mid, high)]
        parts = [
            ("low", low, BRANCH),
            ("mid", mid, BRANCH),
            ("high", high, BRANCH),
            ("low.norm", norms[0], NORM),
            ("mid.norm", norms[1], NORM),
            ("high.norm", norms[2], NORM),
        ]
        attentions = state["attentions"]
        if "spatial" in attentions:
            parts.append(("offset_conv", modules["offset_conv"], CONV3X3))
        if "scale" in attentions:
            parts.append(("scale_gate", modules["scale_gate"], LINEAR))
        if "task" in attentions:
            relu = modules["dynamic_relu"]
            parts.append(("dynamic_relu", relu, RELU))
            parts.append(("dynamic_relu.fc1", relu._modules.get("fc1"), LINEAR))
            parts.append(("dynamic_relu.fc2", relu._modules.get("fc2"), LINEAR))
        reason = plain.hooks_everywhere() or plain.first_reason(parts)
        if reason is not None:
            return reason
        num_groups, eps = state["num_groups"], state["eps"]
        for name, norm in zip(("low", "mid", "high"), norms, strict=True):
            if norm.num_groups != num_groups:
                return f"{name}.norm has num_groups={norm.num_groups}, not {num_groups}"
            if norm.eps != eps:
                return f"{name}.norm has eps={norm.eps}, not {eps}"
        without_bias = [b._parameters.get("bias", b) is None for b in (low, mid, high)]
        if any(without_bias) != all(without_bias):
            return "some of its branches have a bias and some have none"
        return None

    def forward(self, features: Features) -> Features:
        """One block.

        Args:
            features: list, tuple or dict of levels [N, C_in, H_l, W_l], finest first, of one
                floating type; each level is half of the finer one, rounded up, except for
                "aligned".

        Returns:
            The same kind of container with levels [N, C_out, H_l, W_l] in the dtype of the
            features, each with memory of its own.

        Raises:
            ValueError: sizes, channels, dtypes or devices that do not fit.
            TypeError: features that are no such container of tensors.
        """
        reason, levels = self.unfused_reason(), unpack(features)
        if reason is None:
            return repack(features, run_fused([self], levels, self.memory_format))
        if plain.say_once(self, self.label, reason):
            plain.say_uncounted(self, self.label)
        return repack(features, self._unfused(levels))

    def _unfused(self, levels: list[Tensor]) -> list[Tensor]:
        checks.pyramid(levels, self.in_channels, self.high_offset)
        parts = unfused.BlockParts(
            self.offset_conv if "spatial" in self.attentions else None,
            self.low,
            self.mid,
            self.high,
            self._gate,
            self._activation(),
        )
        outs = unfused.pyramid_block(
            levels,
            parts,
            high_offset=self.high_offset,
            upsample=self.upsample,
            dtype=dtype_of(self, levels[0]),
        )
        memory_format = output_format(levels, self.memory_format)
        return [x.contiguous(memory_format=memory_format) for x in outs]

    def _activation(self) -> Callable[[Tensor], Tensor]:
        if "task" in self.attentions:
            return self.dynamic_relu
        return torch.clone if self.without_task == "identity" else F.relu

    def _gate(self, y: Tensor) -> Tensor:
        """The scale gate of a branch [N, C, H, W], as [N, 1, 1, 1]."""
        if "scale" not in self.attentions:
            return y.new_ones(1)
        return hsigmoid(F.relu(self.scale_gate(y.mean((2, 3)))))[:, :, None, None]

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, high_offset={self.high_offset!r}, "
            f"upsample={self.upsample!r}, num_groups={self.num_groups}, "
            f"deform_bias={self.deform_bias}, eps={self.eps}, recompute={self.recompute}, "
            f"attentions={self.attentions}, without_task={self.without_task!r}, "
            f"memory_format={self.memory_format}"
        )


def run_fused(
    blocks: Sequence[DyHeadBlock], levels: Sequence[Tensor], memory_format: torch.memory_format
) -> list[Tensor]:
    """Blocks of the same settings in turn, on their parameters; nothing is called."""
    first = blocks[0]
    return functional.pyramid_blocks(
        levels,
        [block.parameters_tuple() for block in blocks],
        high_offset=first.high_offset,
        upsample=first.upsample,
        num_groups=first.num_groups,
        eps=first.eps,
        recompute=first.recompute,
        memory_format=memory_format,
    )


def fused_settings(block: nn.Module) -> tuple[Any, ...] | None:
    """What blocks must have in common to run as one; None if the block must be called.

    A call does more than the parameters say where the block has hooks, another class or forward,
    where it was compiled, or where an inner module is not plain.
    """
    if (
        type(block) is not DyHeadBlock
        or plain.why_called(block) is not None
        or block._compiled_call_impl is not None
        or block.unfused_reason() is not None
    ):
        return None
    return block.high_offset, block.upsample, block.num_groups, block.eps, block.recompute
