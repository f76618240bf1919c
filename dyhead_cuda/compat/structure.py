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
from dyhead_cuda.compat.names import GLIP, MMDET, MMDET_GLIP, ULTRALYTICS, CodeBase
from dyhead_cuda.pyramid import BlockParameters, BranchParameters, HighOffset, Upsample

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MODULATED = ("ModulatedDeformConv", "ModulatedDeformConv2d")  # of detectron2, microsoft and mmcv
_TORCHVISION = "DeformConv2d"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_SPATIAL = (
    "spatial_conv_high",
    "spatial_conv_mid",
    "spatial_conv_low",
    "spatial_conv_offset",
    "scale_attn_module",
)
# Class name, the attributes to expect, and the code base whose names the parameters have. The
# first that fits counts. GLIP's DyConv and microsoft's have the same structure.
_BLOCKS: tuple[tuple[str, tuple[str, ...], CodeBase], ...] = (
    ("DyConv", ("DyConv", "AttnConv", "relu", "offset"), GLIP),
    ("DyConv", ("dyconvs", "attnconv", "relu", "offset"), MMDET_GLIP),
    ("DyHeadBlock", (*_SPATIAL, "task_attn_module.fc"), ULTRALYTICS),
    ("DyHeadBlock", (*_SPATIAL, "task_attn_module"), MMDET),
)
_DYCONV = ("DyConv", "AttnConv", "DYReLU")
_PATHS = {
    code_base.key: tuple((name, tuple(name.theirs.split("."))) for name in code_base.names)
    for _, _, code_base in _BLOCKS
}


class UnsupportedError(Exception):
    """Why a block is left as it is."""


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise UnsupportedError(reason)


def _has(module: object, path: str) -> bool:
    for name in path.split("."):
        if not hasattr(module, name):
            return False
        module = getattr(module, name)
    return True


def _recognise(module: nn.Module) -> tuple[type | None, CodeBase | None]:
    """The class of the public code that ``module`` is an instance of, and its code base."""
    for cls in reversed(type(module).__mro__):
        for name, attributes, code_base in _BLOCKS:
            if cls.__name__ == name and all(_has(module, path) for path in attributes):
                return cls, code_base
    return None, None


def has_known_name(module: nn.Module) -> bool:
    """Whether its class is called like a public block, whatever it is made of."""
    return any(type(module).__name__ == name for name, _, _ in _BLOCKS)


def code_base_of(module: nn.Module) -> CodeBase | None:
    """The code base that ``module`` is a block of, or None."""
    return _recognise(module)[1]


def _code(module: nn.Module) -> Any:
    """The code object of a forward, or None where it has no readable one."""
    return getattr(inspect.unwrap(type(module).forward), "__code__", None)


def published_high_offset(module: nn.Module) -> HighOffset:
    """What the forward of a public block computes, as far as reading it tells.

    mmdet's main branch (commit 15a558d and later) crops offset and mask to ``out_h``, ``out_w``;
    every release up to 3.3.0 and the other code bases read them flat. The operators of torchvision
    and of detectron2 take only offsets of their output's size: on the first the coarser level is
    resized before, on the second the offsets are cropped. A forward without readable code counts
    as released.
    """
    operators = {type(inner) for inner in module.modules()}
    if any(operator.__name__ == _TORCHVISION for operator in operators):
        return "aligned"
    if any(operator.__module__.startswith("detectron2.") for operator in operators):
        return "crop"
    names = getattr(_code(module), "co_varnames", ())
    return "mmdet_main" if {"out_h", "out_w"} <= set(names) else "flat"


def published_upsample(module: nn.Module) -> Upsample:
    """How the forward of a public block resizes, as far as reading it tells.

    A call of ``interpolate`` without ``mode`` is "nearest"; everything else counts as published.
    """
    code = _code(module)
    constants = getattr(code, "co_consts", ())
    words = {word for c in constants for word in (c if isinstance(c, tuple) else (c,))}
    called = "interpolate" in getattr(code, "co_names", ())
    return "nearest" if called and not words & {"mode", "bilinear"} else "bilinear"


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
        type(module).__name__ in (*_MODULATED, _TORCHVISION),
        f"{where} is a {type(module).__name__}, not a modulated deformable convolution",
    )
    for name in ("norm", "activation"):  # detectron2's operator can hold both
        _require(getattr(module, name, None) is None, f"{where} has a {name} of its own")
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
        _require(
            _is_plain(norm, nn.GroupNorm),
            f"{where} is {kind}, not GroupNorm (build the block with group normalisation)",
        )
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
    """``h_sigmoid``, mmcv's ``HSigmoid(bias=3, divisor=6)`` or torch's ``Hardsigmoid``."""
    kind = type(module).__name__
    if _is_plain(module, nn.Hardsigmoid):
        return
    if kind == "HSigmoid":
        settings = (module.bias, module.divisor, module.min_value, module.max_value)
        _require(settings == (3, 6, 0, 1), f"{where} is HSigmoid{settings}, not (3, 6, 0, 1)")
        return
    height = getattr(module, "h_max", 1)  # some forks have it as a constant
    fits = kind == "h_sigmoid" and isinstance(module.relu, nn.ReLU6) and height == 1
    _require(fits, f"{where} is a {kind}, not relu6(x + 3) / 6")


def _sequence(module: object, length: int, where: str) -> list[nn.Module]:
    _require(
        isinstance(module, nn.Sequential) and len(module) == length,
        f"{where} is a {type(module).__name__}, not a Sequential of {length}",
    )
    assert isinstance(module, nn.Sequential)
    return list(module)


def _fully_connected(task: Any, kind: str, where: str) -> None:
    """The dynamic ReLU with linear layers, of any of the code bases."""
    _require(type(task).__name__ == kind, f"{where} is a {type(task).__name__}, not a {kind}")
    expected: dict[str, object] = {
        "lambda_a": 2,
        "K2": True,
        "use_bias": True,
        "exp": 4,
        "init_a": [1, 0],
        "init_b": [0, 0],
        "spa": None,
    }
    if not hasattr(task, "lambda_a"):  # mmdet's GLIP has all this as constants in its forward
        expected = {"expand_ratio": 4}
    for name, value in expected.items():
        got = getattr(task, name, None)
        got = list(got) if isinstance(got, tuple) else got
        shown = "a module" if isinstance(got, nn.Module) else repr(got)
        _require(got == value, f"{where}.{name} is {shown}, not {value!r}")
    _pool(task.avg_pool, f"{where}.avg_pool")
    first, middle, second, last = _sequence(task.fc, 4, f"{where}.fc")
    for layer, name in ((first, "fc.0"), (second, "fc.2")):
        got = type(layer).__name__
        _require(_is_plain(layer, nn.Linear), f"{where}.{name} is a {got}, not a Linear")
        _require(layer.bias is not None, f"{where}.{name} has no bias")
    _relu(middle, f"{where}.fc.1")
    _hsigmoid(last, f"{where}.fc.3")


def _check_dyconv(block: Any, code_base: CodeBase) -> None:
    """The block of microsoft/DynamicHead, of GLIP and of mmdet's GLIP."""
    glip = code_base is MMDET_GLIP
    convs, gate, kind = ("dyconvs", "attnconv", "DyReLU") if glip else _DYCONV
    branches, attention = getattr(block, convs), getattr(block, gate)
    _require(block.offset is not None, "offset is None (built without deformable convolution)")
    _require(attention is not None, f"{gate} is None (built without scale attention)")
    _require(
        isinstance(branches, nn.ModuleList) and len(branches) == 3,
        f"{convs} is not a ModuleList of 3",
    )
    for index, (branch, stride) in enumerate(zip(branches, (1, 1, 2), strict=True)):
        where = f"{convs}.{index}"
        _require(getattr(branch, "bn", None) is not None, f"{where}.bn is None, not GroupNorm")
        _children(branch, "Conv3x3Norm", ("conv", "bn"), where)
        _deform_conv(branch.conv, stride, f"{where}.conv")
    _norms({f"{convs}.{index}.bn": branch.bn for index, branch in enumerate(branches)})
    _conv(block.offset, 3, "offset")
    pool, conv, relu = _sequence(attention, 3, gate)
    _pool(pool, f"{gate}.0")
    _conv(conv, 1, f"{gate}.1")
    _relu(relu, f"{gate}.2")
    _hsigmoid(getattr(block, "h_sigmoid", None), "h_sigmoid")
    _fully_connected(block.relu, kind, "relu")


def _pointwise(task: Any, where: str) -> None:
    """mmdet's dynamic ReLU, whose layers are 1x1 convolutions."""
    _children(task, "DyReLU", ("global_avgpool", "conv1", "conv2"), where)
    _pool(task.global_avgpool, f"{where}.global_avgpool")
    for name, check in (("conv1", _relu), ("conv2", _hsigmoid)):
        layer = getattr(task, name)
        _children(layer, "ConvModule", ("conv", "activate"), f"{where}.{name}")
        _conv(layer.conv, 1, f"{where}.{name}.conv")
        check(layer.activate, f"{where}.{name}.activate")


def _check_dyhead_block(block: Any, code_base: CodeBase) -> None:
    """The block of mmdet and of the Ultralytics forks."""
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
    if code_base is MMDET:
        _pointwise(block.task_attn_module, "task_attn_module")
    else:
        _fully_connected(block.task_attn_module, "DyReLU", "task_attn_module")


def _check_untouched(block: nn.Module) -> None:
    """Nothing may have been hung on the block's inside: the fused forward does not call it."""
    cls, _ = _recognise(block)
    _require(
        type(block).forward is vars(cls).get("forward"),
        f"the subclass {type(block).__name__} has a forward of its own (a module around the block "
        "can do the same)",
    )
    for path, module in block.named_modules():
        inner = path or "the block"
        _require(
            "forward" not in vars(module) and vars(module).get("_compiled_call_impl") is None,
            f"the forward of {inner} was replaced or compiled (call accelerate before that)",
        )
        _require(
            not parametrize.is_parametrized(module),
            f"{inner} has parametrizations (remove_parametrizations makes it plain)",
        )
        hooks = [name for name in _HOOKS if path and getattr(module, name, None)]
        _require(
            not hooks,
            f"{inner} has hooks, which would no longer be called (hooks of the block itself are)",
        )
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


def norm_of(block: nn.Module, code_base: CodeBase) -> nn.GroupNorm:
    """One of the three norms, which have the same settings."""
    path = next(name.theirs for name in code_base.names if name.ours.startswith("mid.norm"))
    norm = block.get_submodule(path.rpartition(".")[0])
    assert isinstance(norm, nn.GroupNorm)
    return norm


def check_supported(block: nn.Module, code_base: CodeBase) -> None:
    """Raise :class:`UnsupportedError` unless the fused block can have the structure of ``block``.

    Which of the fused variants its forward computes is measured, see :mod:`.measure`.
    """
    _check_untouched(block)
    check = _check_dyhead_block if code_base in (MMDET, ULTRALYTICS) else _check_dyconv
    try:
        check(block, code_base)
        parameters = block_parameters(block, code_base)
        checks.block_parameters(parameters, norm_of(block, code_base).num_groups)
    except (AttributeError, TypeError, ValueError) as error:
        raise UnsupportedError(f"its structure differs: {error}") from error
