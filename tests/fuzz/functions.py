"""Calls of dyhead_cuda.functional and of the modules, judged by the reference in float64."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

import dyhead_cuda
from dyhead_cuda import functional, modules, reference
from dyhead_cuda.pyramid import HIGH_OFFSETS, UPSAMPLES, BlockParameters, BranchParameters
from dyhead_cuda.reference import UnifiedParameters
from tests.fuzz.cases import Call, Source

BLOCK = 20  # times the tolerance of one operator: maps are tiny, and a norm of few values is steep
NOT_FINITE = (float("nan"), float("inf"), -float("inf"))
FLOOR = 0.05  # of the size of a result's values below which errors are not relative to it


def modulated_deform_conv2d(source: Source) -> Call:
    images, groups, deform_groups = source.size(3), source.randint(1, 3), source.randint(1, 3)
    channels = groups * deform_groups * source.randint(1, 3)
    dtype, other = source.dtype(), source.dtype()
    kernel = source.randint(1, 3), source.randint(1, 4)
    stride, padding, dilation = ((source.randint(1, 2), source.randint(1, 3)) for _ in range(3))
    size, out = [], []
    for k, st, p, d in zip(kernel, stride, padding, dilation, strict=True):
        covered = d * (k - 1) + 1
        size.append(max(source.size(12), covered - 2 * p))
        out.append((size[-1] + 2 * p - covered) // st + 1)
    taps = deform_groups * kernel[0] * kernel[1]
    scale = source.choice((0.5, 2, 30, 1e4))
    offset = source.normal(images, 2 * taps, *out, dtype=other, scale=scale)
    mask = source.normal(images, taps, *out, dtype=other)
    for t in (offset, mask):
        if source.chance(0.05) and t.numel() > 0:
            t[..., 0, 0] = source.choice(NOT_FINITE)
    outputs = groups * source.randint(1, 4)
    arguments = [
        source.normal(images, channels, *size, dtype=dtype),
        offset,
        source.normal(outputs, channels // groups, *kernel, dtype=other),
    ]
    options: dict[str, Any] = {
        "bias": source.choice((None, source.normal(outputs, dtype=other))),
        "stride": stride if source.chance(0.8) or stride[0] != stride[1] else stride[0],
        "padding": padding,
        "dilation": list(dilation),
        "mask": source.choice((None, mask)),
    }
    return Call(
        "functional.modulated_deform_conv2d",
        functional.modulated_deform_conv2d,
        arguments,
        options,
        reference.modulated_deform_conv2d,
        gradients=source.chance(0.4) and dtype.itemsize > 2,
    )


def relu_parameters(source: Source, channels: int, dtype: torch.dtype) -> list[Tensor]:
    hidden = source.randint(1, 5)
    return [
        source.normal(hidden, channels, dtype=dtype, scale=(channels or 1) ** -0.5),
        source.normal(hidden, dtype=dtype),
        source.normal(4 * channels, hidden, dtype=dtype),
        source.normal(4 * channels, dtype=dtype, scale=2),
    ]


def dynamic_relu(source: Source) -> Call:
    channels, dtype = source.size(20), source.dtype()
    shape = source.size(3), channels, *(source.size(7) for _ in range(source.randint(0, 3)))
    return Call(
        "functional.dynamic_relu",
        functional.dynamic_relu,
        [source.normal(*shape, dtype=dtype), *relu_parameters(source, channels, source.dtype())],
        {"activation": source.choice(("hsigmoid", "sigmoid"))},
        reference.dynamic_relu,
        factor=2,
        gradients=source.chance(0.4) and dtype == torch.float64,
    )


def block_parameters(
    source: Source, channels: int, outputs: int, dtype: torch.dtype
) -> BlockParameters:
    def branch(bias: bool) -> BranchParameters:
        return BranchParameters(
            source.normal(outputs, channels, 3, 3, dtype=dtype, scale=(9 * channels) ** -0.5),
            source.normal(outputs, dtype=dtype) if bias else None,
            source.normal(outputs, dtype=dtype, scale=0.5),
            source.normal(outputs, dtype=dtype, scale=0.5),
        )

    biases = source.choice(((True,) * 3, (False,) * 3, (True, False, True)))
    relu: Any = relu_parameters(source, outputs, dtype)
    return BlockParameters(
        source.normal(27, channels, 3, 3, dtype=dtype, scale=(9 * channels) ** -0.5),
        source.normal(27, dtype=dtype, scale=0.5),
        branch(biases[0]),
        branch(biases[1]),
        branch(biases[2]),
        source.normal(outputs, dtype=dtype, scale=outputs**-0.5),
        source.normal(1, dtype=dtype),
        *relu,
    )


def pyramid_options(source: Source) -> dict[str, Any]:
    return {
        "high_offset": source.choice(HIGH_OFFSETS),
        "upsample": source.choice(UPSAMPLES),
        "num_groups": source.choice((1, 2)),
        "eps": source.choice((1e-5, 1e-3, 0.5)),
        "memory_format": source.choice((torch.preserve_format, torch.channels_last)),
    }


def chained(dtype: torch.dtype) -> float:
    """The factor of the tolerance for blocks in turn, each of which makes errors grow.

    In 16 bits they may grow to the size of the result, where a group has two values.
    """
    return 100 if dtype.itemsize > 2 else math.inf


def pyramid_block(source: Source) -> Call:
    options = pyramid_options(source)
    channels, outputs, dtype = source.randint(1, 6), 2 * source.randint(1, 5), source.dtype()
    features = source.pyramid(
        source.size(3), channels, dtype, halved=options["high_offset"] != "aligned"
    )
    # Parameters of a coarser type would move samples by more than the features' tolerance allows.
    parameters = block_parameters(source, channels, outputs, dtype)
    return Call(
        "functional.pyramid_block",
        functional.pyramid_block,
        [features, parameters],
        options,
        functional.pyramid_block,
        factor=BLOCK if dtype.itemsize > 2 else 100,
        floor=FLOOR,
        gradients=source.chance(0.3) and dtype == torch.float64 and features[0].shape[0] > 0,
    )


def pyramid_blocks(source: Source) -> Call:
    call = pyramid_block(source)
    features, first = call.arguments
    outputs = first.mid.weight.shape[0]
    second = block_parameters(source, outputs, 2, features[0].dtype)
    call.name, call.function = "functional.pyramid_blocks", functional.pyramid_blocks
    call.expected, call.arguments[1] = functional.pyramid_blocks, [first, second]
    call.options["recompute"] = source.chance(0.5)
    call.factor = chained(features[0].dtype)
    return call


def unified(source: Source) -> tuple[Tensor, UnifiedParameters]:
    levels, channels, dtype = source.randint(1, 4), source.randint(1, 6), source.dtype()
    shape = source.size(3), levels, channels, source.size(8), source.size(8)
    relu = relu_parameters(source, channels, dtype)
    weight = channels, channels, 3, 3
    parameters = UnifiedParameters(
        source.normal(levels, levels, dtype=dtype),
        source.normal(levels, dtype=dtype),
        source.normal(27, channels, 3, 3, dtype=dtype, scale=(9 * channels) ** -0.5),
        source.normal(27, dtype=dtype),
        source.normal(levels, *weight, dtype=dtype, scale=(9 * channels) ** -0.5),
        *relu,
    )
    return source.normal(*shape, dtype=dtype), parameters


def unified_function(source: Source) -> Call:
    """One of the five functions of the paper's form."""
    features, p = unified(source)
    double = features.dtype == torch.float64
    some_gates = source.normal(*features.shape[:2], dtype=features.dtype)
    gates, targets = source.choice((None, some_gates)), source.choice(("all", "median"))
    activation = source.choice(("sigmoid", "hsigmoid"))
    calls: dict[str, tuple[list[Any], dict[str, Any]]] = {
        "scale_gates": ([features, p.scale_weight, p.scale_bias], {}),
        "scale_attention": ([features, p.scale_weight, p.scale_bias], {}),
        "spatial_attention": (
            [features, p.spatial_weight, p.offset_weight, p.offset_bias],
            {"targets": targets, "gates": gates},
        ),
        "task_attention": ([features, *p[5:]], {"activation": activation}),
        "unified_block": ([features, p, targets], {}),
    }
    name = source.choice(list(calls))
    arguments, options = calls[name]
    return Call(
        f"functional.{name}",
        getattr(functional, name),
        arguments,
        options,
        getattr(reference, name),
        factor=BLOCK,
        floor=FLOOR,
        gradients=double and source.chance(0.3) and features.numel() > 0,
        owns=name != "task_attention",
    )


def stack_pyramid(source: Source) -> Call:
    features = source.pyramid(source.size(3), source.size(5), source.dtype(), halved=False)
    size = source.choice((None, (source.size(6), source.size(6))))
    mode = source.choice(("bilinear", "nearest", "max"))
    return Call(
        "functional.stack_pyramid",
        functional.stack_pyramid,
        [features, mode, size],
        expected=reference.stack_pyramid,
    )


def contained(source: Source, levels: list[Tensor]) -> Any:
    """The levels in one of the containers that a head takes."""
    named = {f"p{3 + i}": x for i, x in enumerate(levels)}
    return source.choice((levels, tuple(levels), named))


def module_call(source: Source, name: str, module: nn.Module, arguments: list[Any]) -> Call:
    """The forward of a module in a type; the judge is a copy of it in float64."""
    dtype = arguments[0].dtype if isinstance(arguments[0], Tensor) else source.dtype()
    module = module.to(dtype)

    def call(module: nn.Module, *arguments: Any) -> Any:
        return module(*arguments)

    factor = chained(dtype) if hasattr(module, "blocks") else 5 * BLOCK
    made = Call(name, call, [module, *arguments], {}, call, factor, FLOOR, owns=False)
    if any(inner._forward_hooks for inner in module.modules()):
        made.raised += (RuntimeError,)  # of inner modules, which are called
    return made


def head(source: Source) -> Call:
    """A DyHead or one block of it."""
    options = pyramid_options(source)
    options |= {"deform_bias": source.chance(0.5), "init": source.choice(("microsoft", "mmdet"))}
    options["attentions"] = source.sample(modules.ATTENTIONS, source.randint(0, 3))
    channels, outputs, dtype = source.randint(1, 5), 2 * source.randint(1, 5), source.dtype()
    halved = options["high_offset"] != "aligned"
    levels = source.pyramid(source.size(2), channels, dtype, halved)
    torch.manual_seed(source.getrandbits(32))
    module: nn.Module
    if source.chance(0.5):
        module = dyhead_cuda.DyHead(channels, outputs, source.randint(1, 3), **options)
    else:
        module = dyhead_cuda.DyHeadBlock(channels, outputs, **options)
    if source.chance(0.2):  # its inner modules are called
        module.register_forward_hook(lambda *_: None)
        next(iter(module.children())).register_forward_hook(lambda *_: None)
    features = contained(source, levels)
    call = module_call(source, type(module).__name__, module.to(dtype), [features])
    call.arguments[0] = module.to(dtype)
    return call


def unified_head(source: Source) -> Call:
    levels, channels = source.randint(1, 4), source.randint(1, 6)
    torch.manual_seed(source.getrandbits(32))
    module = dyhead_cuda.UnifiedDyHead(levels, channels, source.randint(1, 2))
    features: Any
    dtype = source.dtype()
    if source.chance(0.5):
        shape = source.size(2), levels, channels, source.size(7), source.size(7)
        features = source.normal(*shape, dtype=dtype)
    else:
        images = source.size(2)
        maps = [
            source.normal(images, channels, source.randint(1, 8), source.randint(1, 8), dtype=dtype)
            for _ in range(levels)
        ]
        features = contained(source, maps)
    if source.chance(0.2):
        module.blocks[0].scale.register_forward_hook(lambda *_: None)  # type: ignore[union-attr]
    call = module_call(source, "UnifiedDyHead", module, [features])
    call.arguments[0] = module.to(dtype)
    return call


def layer(source: Source) -> Call:
    """A module of one operator."""
    torch.manual_seed(source.getrandbits(32))
    dtype, channels = source.dtype(), source.randint(1, 8)
    if source.chance(0.5):
        relu = dyhead_cuda.DynamicReLU(channels, source.randint(1, 4))
        if source.chance(0.3):
            relu.fc1.register_forward_hook(lambda *_: None)
        x = source.normal(source.size(2), channels, source.size(5), dtype=dtype)
        return module_call(source, "DynamicReLU", relu, [x])
    images, height, width = source.size(2), source.size(6), source.size(6)
    x = source.normal(images, channels, height, width, dtype=dtype)
    offset = source.normal(images, 18, height, width, dtype=dtype)
    mask = source.normal(images, 9, height, width, dtype=dtype)
    if source.chance(0.5):
        conv = dyhead_cuda.ModulatedDeformConv2d(channels, source.randint(1, 6), 3, padding=1)
        return module_call(source, "ModulatedDeformConv2d", conv, [x, offset, mask])
    branch = modules.DeformBranch(channels, 4, source.chance(0.5), 2)
    return module_call(source, "DeformBranch", branch, [x, offset, mask, 1])


FUNCTIONS = {
    "modulated_deform_conv2d": modulated_deform_conv2d,
    "dynamic_relu": dynamic_relu,
    "pyramid_block": pyramid_block,
    "pyramid_blocks": pyramid_blocks,
    "unified": unified_function,
    "stack_pyramid": stack_pyramid,
    "head": head,
    "unified_head": unified_head,
    "layer": layer,
}
