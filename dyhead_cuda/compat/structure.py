"""Recognising the blocks of the public code bases, and what keeps one from being replaced.

None of those packages is imported: a block is known by its class name and its attributes.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dyhead_cuda import checks
from dyhead_cuda.compat.names import GLIP, MMDET, CodeBase
from dyhead_cuda.pyramid import BlockParameters, BranchParameters, HighOffset

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_DEFORM_CONVS = ("ModulatedDeformConv", "ModulatedDeformConv2d")
_PATHS = {
    code_base.key: tuple((name, tuple(name.theirs.split("."))) for name in code_base.names)
    for code_base in (GLIP, MMDET)
}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Class name -> the code base whose names its parameters have, and the attributes to expect.
# GLIP's DyConv and microsoft's have the same structure.
_BLOCKS: dict[str, tuple[CodeBase, tuple[str, ...]]] = {
    "DyConv": (GLIP, ("DyConv", "AttnConv", "relu", "offset")),
    "DyHeadBlock": (
        MMDET,
        (
            "spatial_conv_high",
            "spatial_conv_mid",
            "spatial_conv_low",
            "spatial_conv_offset",
            "scale_attn_module",
            "task_attn_module",
        ),
    ),
}


class UnsupportedError(Exception):
    """Why a block is left as it is."""


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise UnsupportedError(reason)


def _named_class(module: nn.Module) -> type | None:
    """The class of the public code that ``module`` is an instance of, by name and attributes."""
    for cls in reversed(type(module).__mro__):
        _, attributes = _BLOCKS.get(cls.__name__, (None, ()))
        if attributes and all(hasattr(module, name) for name in attributes):
            return cls
    return None


def code_base_of(module: nn.Module) -> CodeBase | None:
    """The code base that ``module`` is a block of, or None."""
    cls = _named_class(module)
    return _BLOCKS[cls.__name__][0] if cls else None


def published_high_offset(module: nn.Module) -> HighOffset:
    """What the forward of a public block computes.

    mmdet's main branch (commit 15a558d and later) crops offset and mask to ``out_h``, ``out_w``;
    every release up to 3.3.0 and the other code bases read them flat. A forward without readable
    code counts as released.
    """
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return "mmdet_main" if {"out_h", "out_w"} <= set(getattr(code, "co_varnames", ())) else "flat"


def _pair(value: Any) -> tuple[Any, ...]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _is_plain(module: object, cls: type[nn.Module]) -> bool:
    """Whether ``module`` computes exactly what ``cls`` does, be it a subclass."""
    methods = ("forward", "_conv_forward") if cls is nn.Conv2d else ("forward",)
    return isinstance(module, cls) and all(
        getattr(type(module), name) is getattr(cls, name) for name in methods
    )


def _children(module: object, cls: str, names: tuple[str, ...], where: str) -> None:
    _require(
        isinstance(module, nn.Module)
        and type(module).__name__ == cls
        and tuple(sorted(name for name, _ in module.named_children())) == tuple(sorted(names)),
        f"{where} is not a {cls} with {' and '.join(names)}",
    )


def _conv(module: object, size: int, where: str) -> None:
    _require(_is_plain(module, nn.Conv2d), f"{where} is a {type(module).__name__}, not a Conv2d")
    assert isinstance(module, nn.Conv2d)
    half = size // 2
    geometry = (module.kernel_size, module.stride, module.padding, module.dilation)
    expected = ((size, size), (1, 1), (half, half), (1, 1))
    plain = module.groups == 1 and module.padding_mode == "zeros" and module.bias is not None
    _require(
        geometry == expected and plain,
        f"{where} is not a biased {size}x{size} convolution with stride 1, padding {half}, "
        "dilation 1 and one group",
    )


def _deform_conv(module: Any, stride: int, where: str) -> None:
    _require(
        type(module).__name__ in _DEFORM_CONVS,
        f"{where} is a {type(module).__name__}, not a modulated deformable convolution",
    )
    deform_groups = getattr(module, "deform_groups", getattr(module, "deformable_groups", 1))
    _require(module.groups == 1, f"{where} has {module.groups} groups, not 1")
    _require(deform_groups == 1, f"{where} has {deform_groups} deformable groups, not 1")
    geometry = {
        "kernel size": (tuple(module.weight.shape[2:]), 3),
        "stride": (_pair(module.stride), stride),
        "padding": (_pair(module.padding), 1),
        "dilation": (_pair(module.dilation), 1),
    }
    for name, (value, expected) in geometry.items():
        _require(
            value == (expected, expected),
            f"{where} has {name} {value}, not {(expected, expected)}",
        )


def _norms(norms: dict[str, Any]) -> None:
    for where, norm in norms.items():
        kind = "no norm" if norm is None else type(norm).__name__
        _require(_is_plain(norm, nn.GroupNorm), f"{where} is {kind}, not GroupNorm")
        _require(norm.affine, f"{where} has no weight and bias")
    settings = {(norm.num_groups, norm.eps) for norm in norms.values()}
    _require(
        len(settings) == 1, f"the norms differ in (num_groups, eps): {sorted(settings)}, not one"
    )


def _pool(module: object, where: str) -> None:
    _require(
        isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1)),
        f"{where} is not AdaptiveAvgPool2d(1)",
    )


def _relu(module: object, where: str) -> None:
    _require(_is_plain(module, nn.ReLU), f"{where} is a {type(module).__name__}, not a ReLU")


def _hsigmoid(module: Any, where: str) -> None:
    """microsoft's and GLIP's ``h_sigmoid`` or mmcv's ``HSigmoid(bias=3, divisor=6)``."""
    kind = type(module).__name__
    if kind == "HSigmoid":
        settings = (module.bias, module.divisor, module.min_value, module.max_value)
        _require(settings == (3, 6, 0, 1), f"{where} is HSigmoid{settings}, not (3, 6, 0, 1)")
        return
    fits = kind == "h_sigmoid" and isinstance(module.relu, nn.ReLU6) and module.h_max == 1
    _require(fits, f"{where} is a {kind}, not relu6(x + 3) / 6")


def _sequence(module: object, length: int, where: str) -> list[nn.Module]:
    _require(
        isinstance(module, nn.Sequential) and len(module) == length,
        f"{where} is a {type(module).__name__}, not a Sequential of {length}",
    )
    assert isinstance(module, nn.Sequential)
    return list(module)


def _check_dyconv(block: Any) -> None:
    """microsoft/DynamicHead's and GLIP's block."""
    _require(block.offset is not None, "offset is None (built without deformable convolution)")
    _require(block.AttnConv is not None, "AttnConv is None (built without scale attention)")
    _require(
        isinstance(block.DyConv, nn.ModuleList) and len(block.DyConv) == 3,
        "DyConv is not a ModuleList of 3",
    )
    for index, (branch, stride) in enumerate(zip(block.DyConv, (1, 1, 2), strict=True)):
        where = f"DyConv.{index}"
        _require(getattr(branch, "bn", None) is not None, f"{where}.bn is None, not GroupNorm")
        _children(branch, "Conv3x3Norm", ("conv", "bn"), where)
        _deform_conv(branch.conv, stride, f"{where}.conv")
    _norms({f"DyConv.{index}.bn": branch.bn for index, branch in enumerate(block.DyConv)})
    _conv(block.offset, 3, "offset")
    pool, conv, relu = _sequence(block.AttnConv, 3, "AttnConv")
    _pool(pool, "AttnConv.0")
    _conv(conv, 1, "AttnConv.1")
    _relu(relu, "AttnConv.2")
    _hsigmoid(getattr(block, "h_sigmoid", None), "h_sigmoid")
    task = block.relu
    _require(type(task).__name__ == "DYReLU", f"relu is a {type(task).__name__}, not a DYReLU")
    expected = {
        "lambda_a": 2,
        "K2": True,
        "use_bias": True,
        "exp": 4,
        "init_a": [1, 0],
        "init_b": [0, 0],
        "spa": None,
    }
    for name, value in expected.items():
        got = getattr(task, name, None)
        got = list(got) if isinstance(got, tuple) else got
        shown = "a module" if isinstance(got, nn.Module) else repr(got)
        _require(got == value, f"relu.{name} is {shown}, not {value!r}")
    _pool(task.avg_pool, "relu.avg_pool")
    first, middle, second, last = _sequence(task.fc, 4, "relu.fc")
    for layer, where in ((first, "relu.fc.0"), (second, "relu.fc.2")):
        _require(_is_plain(layer, nn.Linear), f"{where} is a {type(layer).__name__}, not a Linear")
        _require(layer.bias is not None, f"{where} has no bias")
    _relu(middle, "relu.fc.1")
    _hsigmoid(last, "relu.fc.3")


def _check_dyhead_block(block: Any) -> None:
    """mmdet's block."""
    branches = {"high": 1, "mid": 1, "low": 2}
    norms = {}
    for branch, stride in branches.items():
        where = f"spatial_conv_{branch}"
        module = getattr(block, where)
        _require(getattr(module, "norm", None) is not None, f"{where} has no norm, not GroupNorm")
        _children(module, "DyDCNv2", ("conv", "norm"), where)
        _deform_conv(module.conv, stride, f"{where}.conv")
        _require(module.conv.bias is None, f"{where}.conv has a bias")
        norms[f"{where}.norm"] = module.norm
    _norms(norms)
    _conv(block.spatial_conv_offset, 3, "spatial_conv_offset")
    pool, conv, relu, gate = _sequence(block.scale_attn_module, 4, "scale_attn_module")
    _pool(pool, "scale_attn_module.0")
    _conv(conv, 1, "scale_attn_module.1")
    _relu(relu, "scale_attn_module.2")
    _hsigmoid(gate, "scale_attn_module.3")
    task = block.task_attn_module
    _children(task, "DyReLU", ("global_avgpool", "conv1", "conv2"), "task_attn_module")
    _pool(task.global_avgpool, "task_attn_module.global_avgpool")
    for name, check in (("conv1", _relu), ("conv2", _hsigmoid)):
        where, layer = f"task_attn_module.{name}", getattr(task, name)
        _children(layer, "ConvModule", ("conv", "activate"), where)
        _conv(layer.conv, 1, f"{where}.conv")
        check(layer.activate, f"{where}.activate")


def _check_untouched(block: nn.Module) -> None:
    """Nothing may have been hung on the block's inside: the fused forward does not call it."""
    cls = _named_class(block)
    _require(
        type(block).forward is vars(cls).get("forward"),
        f"the subclass {type(block).__name__} has a forward of its own",
    )
    for path, module in block.named_modules():
        inner = path or "the block"
        _require(
            "forward" not in vars(module) and vars(module).get("_compiled_call_impl") is None,
            f"the forward of {inner} was replaced or compiled (call accelerate before that)",
        )
        _require(not parametrize.is_parametrized(module), f"{inner} has parametrizations")
        hooks = [name for name in _HOOKS if path and getattr(module, name, None)]
        _require(not hooks, f"{inner} has hooks, which would no longer be called")
    for path, parameter in block.named_parameters():
        _require(
            type(parameter) is nn.Parameter and parameter.dtype in _DTYPES,
            f"{path} is a {type(parameter).__name__} of {parameter.dtype}, not a plain floating-"
            "point parameter",
        )


def _find(block: nn.Module, path: tuple[str, ...]) -> Tensor:
    value: Any = block
    for name in path:
        value = getattr(value, name)
    return value


def block_parameters(block: nn.Module, code_base: CodeBase) -> BlockParameters:
    """The parameters of a public block as :func:`dyhead_cuda.functional.pyramid_block` takes them.

    They are looked up anew at each call, so that replacing or loading one has its effect.
    """
    found = {name.ours: name.to_ours(_find(block, path)) for name, path in _PATHS[code_base.key]}

    def branch(name: str) -> BranchParameters:
        return BranchParameters(
            found[f"{name}.weight"],
            found.get(f"{name}.bias"),
            found[f"{name}.norm.weight"],
            found[f"{name}.norm.bias"],
        )

    return BlockParameters(
        found["offset_conv.weight"],
        found["offset_conv.bias"],
        branch("low"),
        branch("mid"),
        branch("high"),
        found["scale_gate.weight"][0],
        found["scale_gate.bias"],
        found["dynamic_relu.fc1.weight"],
        found["dynamic_relu.fc1.bias"],
        found["dynamic_relu.fc2.weight"],
        found["dynamic_relu.fc2.bias"],
    )


def norm_of(block: Any, code_base: CodeBase) -> nn.GroupNorm:
    """One of the three norms, which have the same settings."""
    return block.spatial_conv_mid.norm if code_base is MMDET else block.DyConv[1].bn


def check_supported(block: nn.Module, code_base: CodeBase) -> None:
    """Raise :class:`UnsupportedError` unless the fused block computes what ``block`` computes."""
    _check_untouched(block)
    try:
        (_check_dyhead_block if code_base is MMDET else _check_dyconv)(block)
        parameters = block_parameters(block, code_base)
        checks.block_parameters(parameters, norm_of(block, code_base).num_groups)
    except (AttributeError, ValueError) as error:
        raise UnsupportedError(f"its structure differs: {error}") from error
