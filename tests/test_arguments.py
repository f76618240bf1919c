"""What is no tensor, no dense one or no container of them is refused in words, everywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dyhead_cuda
from dyhead_cuda import compat, functional, modules, reference
from dyhead_cuda.inspect import record
from dyhead_cuda.reference import UnifiedParameters
from tests.helpers.inputs import (
    halving_sizes,
    random_block_parameters,
    random_pyramid,
    random_relu_inputs,
)
from tests.helpers.unified import random_parameters

X = torch.randn(2, 4, 6, 6, dtype=torch.float64)
LEVELS = random_pyramid(1, 4, halving_sizes(4, 4, 2))
BLOCK = random_block_parameters(4, 8)
UNIFIED = random_parameters(3, 4, 4)
FEATURES = torch.randn(1, 3, 4, 5, 5, dtype=torch.float64)
RELU = [t.detach() for t in random_relu_inputs((2, 4, 3))]
CONVOLUTION = [X, torch.randn(2, 18, 6, 6), torch.randn(8, 4, 3, 3)]

# Not dense, or not of a floating type. (A factory, as some of them warn when they are made.)
NOT_DENSE: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "integers": (lambda t: t.long(), "floating-point"),
    "booleans": (lambda t: t > 0, "floating-point"),
    "complex": (lambda t: t.to(torch.complex64), "floating-point"),
    "float8": (lambda t: t.to(torch.float8_e4m3fn), "floating-point.*float8"),
    "quantised": (lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8), "floating"),
    "sparse": (lambda t: t.to_sparse(), "dense.*to_dense"),
    "nested": (lambda t: torch.nested.nested_tensor([t], layout=torch.jagged), "dense.*nested"),
}
NO_TENSORS: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "a number": lambda: 3,
    "a string": lambda: "features",
    "a mixed list": lambda: [1, "a", None],
    "a dict": lambda: {"p3": X},
    "an array": lambda: np.zeros((2, 4, 6, 6)),
    "a generator": lambda: (x for x in [X]),
}
each_non_tensor = pytest.mark.parametrize("name", NO_TENSORS)

Entry = tuple[Callable[..., Any], list[Any]]
# Functions, and good tensors for each of their arguments.
TENSOR_ENTRIES: dict[str, Entry] = {
    "modulated_deform_conv2d": (
        lambda x, o, w: functional.modulated_deform_conv2d(x, o, w, padding=1),
        CONVOLUTION,
    ),
    "dynamic_relu": (functional.dynamic_relu, RELU),
    "scale_gates": (functional.scale_gates, [FEATURES, *UNIFIED[:2]]),
    "scale_attention": (functional.scale_attention, [FEATURES, *UNIFIED[:2]]),
    "spatial_attention": (
        functional.spatial_attention,
        [FEATURES, UNIFIED.spatial_weight, UNIFIED.offset_weight, UNIFIED.offset_bias],
    ),
    "task_attention": (functional.task_attention, [FEATURES, *UNIFIED[5:]]),
    "unified_block": (
        lambda x, *p: functional.unified_block(x, UnifiedParameters(*p)),
        [FEATURES, *UNIFIED],
    ),
    "reference.modulated_deform_conv2d": (
        lambda x, o, w: reference.modulated_deform_conv2d(x, o, w, padding=1),
        CONVOLUTION,
    ),
    "reference.spatial_attention": (
        reference.spatial_attention,
        [FEATURES, UNIFIED.spatial_weight, UNIFIED.offset_weight, UNIFIED.offset_bias],
    ),
    "branch_gate": (reference.branch_gate, [X, X[0, :, 0, 0], X[0, :1, 0, 0]]),
    "hsigmoid": (reference.hsigmoid, [X]),
    "high_offset_and_mask": (
        lambda o, m: reference.high_offset_and_mask(o, m, (3, 3), "flat"),
        [torch.randn(1, 18, 6, 6), torch.randn(1, 9, 6, 6)],
    ),
    "ModulatedDeformConv2d": (
        lambda x, o: modules.ModulatedDeformConv2d(4, 8, 3, padding=1)(x, o),
        CONVOLUTION[:2],
    ),
    "DynamicReLU": (lambda x: modules.DynamicReLU(4)(x), [X]),
    "UnifiedDyHeadBlock": (lambda x: modules.UnifiedDyHeadBlock(3, 4)(x), [FEATURES]),
}
each_tensor_entry = pytest.mark.parametrize("entry", TENSOR_ENTRIES)


@each_tensor_entry
@each_non_tensor
def test_what_is_no_tensor(entry: str, name: str) -> None:
    function, arguments = TENSOR_ENTRIES[entry]
    for place in range(len(arguments)):
        bad = [*arguments]
        bad[place] = NO_TENSORS[name]()
        with pytest.raises(TypeError, match=r"expected .* as a torch.Tensor, got \w+"):
            function(*bad)
    function(*arguments)


@pytest.mark.filterwarnings("ignore:.*nested tensors")
@each_tensor_entry
@pytest.mark.parametrize("name", NOT_DENSE)
def test_tensors_that_are_not_dense_floats(entry: str, name: str) -> None:
    function, arguments = TENSOR_ENTRIES[entry]
    make, message = NOT_DENSE[name]
    for place in range(len(arguments)):
        bad = [*arguments]
        bad[place] = make(arguments[place])
        with pytest.raises(ValueError, match=message):
            function(*bad)


def head_of(kind: str) -> Callable[[Any], Any]:
    if kind == "DyHead":
        return dyhead_cuda.DyHead(4, 8, 2, num_groups=2).double()
    if kind == "DyHeadBlock, hooked":
        block = dyhead_cuda.DyHeadBlock(4, 8, num_groups=2).double()
        block.scale_gate.register_forward_hook(lambda *_: None)
        return block
    return dyhead_cuda.UnifiedDyHead(2, 4, 1).double()


PYRAMID_ENTRIES: dict[str, Callable[[Any], Any]] = {
    "pyramid_block": lambda x: functional.pyramid_block(x, BLOCK, num_groups=2),
    "pyramid_blocks": lambda x: functional.pyramid_blocks(x, [BLOCK], num_groups=2),
    "stack_pyramid": functional.stack_pyramid,
    "reference.pyramid_block": lambda x: reference.pyramid_block(x, BLOCK, num_groups=2),
    "reference.branch_maps": lambda x: reference.branch_maps(x, BLOCK, num_groups=2),
    "DyHead": lambda x: head_of("DyHead")(x),
    "DyHeadBlock, hooked": lambda x: head_of("DyHeadBlock, hooked")(x),
    "UnifiedDyHead": lambda x: head_of("UnifiedDyHead")(x),
    "record": lambda x: record.record(dyhead_cuda.DyHead(4, 8, 1, num_groups=2).double(), x),
}


@pytest.mark.parametrize("entry", PYRAMID_ENTRIES)
@each_non_tensor
def test_what_is_no_pyramid(entry: str, name: str) -> None:
    takes_dicts = "Head" in entry or entry == "record"
    if not (name == "a dict" and takes_dicts):
        with pytest.raises(TypeError, match=r"expected .*(list|Tensor).*, got \w+"):
            PYRAMID_ENTRIES[entry](NO_TENSORS[name]())
    with pytest.raises(TypeError, match=r"expected level 1 as a torch.Tensor, got \w+"):
        PYRAMID_ENTRIES[entry]([LEVELS[0], NO_TENSORS[name]()])
    PYRAMID_ENTRIES[entry](LEVELS)


def test_a_dict_or_a_map_for_a_pyramid_says_what_to_do() -> None:
    with pytest.raises(TypeError, match=r"got dict; pass list\(features.values\(\)\)"):
        functional.pyramid_block({"p3": LEVELS[0]}, BLOCK)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got Tensor; wrap a single map in a list"):
        functional.pyramid_block(LEVELS[0], BLOCK)  # type: ignore[arg-type]


@each_non_tensor
def test_parameters_of_a_block(name: str) -> None:
    bad = NO_TENSORS[name]()
    with pytest.raises(TypeError, match=r"BlockParameters, got .*parameters_tuple\(\)"):
        functional.pyramid_block(LEVELS, bad)
    with pytest.raises(TypeError, match=r"UnifiedParameters, got .*parameters_tuple\(\)"):
        functional.unified_block(FEATURES, bad)
    with pytest.raises(TypeError, match=r"low as a BranchParameters, got"):
        functional.pyramid_block(LEVELS, BLOCK._replace(low=bad))
    with pytest.raises(TypeError, match=r"fc1_weight as a torch.Tensor, got"):
        functional.pyramid_block(LEVELS, BLOCK._replace(fc1_weight=bad))
    with pytest.raises(TypeError, match=r"mid.norm_weight as a torch.Tensor, got"):
        functional.pyramid_block(LEVELS, BLOCK._replace(mid=BLOCK.mid._replace(norm_weight=bad)))


@pytest.mark.parametrize("eps", ["small", None, -1.0, float("nan"), float("inf")])
def test_eps(eps: Any) -> None:
    for make in (
        lambda: functional.pyramid_block(LEVELS, BLOCK, num_groups=2, eps=eps),
        lambda: dyhead_cuda.DyHead(4, 8, 1, num_groups=2, eps=eps),
    ):
        with pytest.raises(ValueError, match="eps as a number of at least 0, got"):
            make()


def test_sizes_and_switches() -> None:
    conv = dyhead_cuda.ModulatedDeformConv2d
    with pytest.raises(ValueError, match=r"kernel_size as one or two integers >= 1, got 1.5"):
        conv(4, 4, 1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="stride of at most 1048576"):
        conv(4, 4, 3, stride=2**40)
    with pytest.raises(TypeError, match="bias as True or False, got 'no'"):
        conv(4, 4, 3, bias="no")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="recompute as True or False"):
        dyhead_cuda.DyHead(4, 8, 1, num_groups=2, recompute="no")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_blocks as an integer of at least 1, got True"):
        dyhead_cuda.DyHead(4, 8, True, num_groups=2)
    for size in ("44", 4, (4,), (4, -1), (4.0, 4)):
        with pytest.raises(ValueError, match=r"size as two integers >= 0, \(H, W\), got"):
            functional.stack_pyramid(LEVELS, size=size)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"float64 on cpu on every level.*got torch.float32"):
        functional.stack_pyramid([LEVELS[0], LEVELS[1].float()])


def test_checkpoints_and_records() -> None:
    head: Any = dyhead_cuda.DyHead(16, 16, 1)
    state: dict[Any, Any] = {**compat.to_microsoft(head)}
    state[3] = "no name"
    assert len(compat.from_microsoft(state).blocks) == 1
    with pytest.raises(TypeError, match="prefix as a str, got int"):
        compat.from_microsoft(state, prefix=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="prefix as a str, got NoneType"):
        compat.to_microsoft(head, prefix=None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="indices as a list or range of integers"):
        compat.to_glip(head, indices=iter([0]))  # type: ignore[arg-type]
    for path in (None, 3, b"x", ["x"]):
        with pytest.raises(TypeError, match="expected the path of a file, got"):
            compat.load_checkpoint(path)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="head as a DyHead, got Linear"):
        record.record(torch.nn.Linear(2, 2), LEVELS)  # type: ignore[arg-type]
    (levels,) = record.record(dyhead_cuda.DyHead(4, 8, 1, num_groups=2).double(), LEVELS)
    with pytest.raises(TypeError, match="row as an integer, got 'a'"):
        record.samples(levels, 0, "a", 0, "flat")  # type: ignore[arg-type]


def test_a_record_needs_an_image() -> None:
    head = dyhead_cuda.DyHead(4, 8, 1, num_groups=2).double()
    with pytest.raises(ValueError, match=r"an image and of pixels, got \[0, 4, 4, 4\]"):
        record.record(head, [LEVELS[0][:0]])
