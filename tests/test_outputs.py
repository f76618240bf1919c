"""Outputs are tensors of their own: to write into, to keep, to save and to view."""

from __future__ import annotations

import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dyhead_cuda import DyHead, DyHeadBlock, UnifiedDyHead, backend, functional, fused
from dyhead_cuda.backends import Backend
from dyhead_cuda.pyramid import HIGH_OFFSETS, HighOffset
from tests.helpers.compare import assert_close, assert_gradients_close, gradients, leaf
from tests.helpers.inputs import halving_sizes, random_pyramid
from tests.helpers.modules import MODULES, as_list, randomise

FORMATS = (torch.contiguous_format, torch.channels_last)

each_module = pytest.mark.parametrize("name", MODULES)
each_backend = pytest.mark.parametrize("runs", ["cpu", "reference"])


def pyramid(memory_format: torch.memory_format = torch.contiguous_format) -> list[Tensor]:
    levels = random_pyramid(2, 4, halving_sizes(9, 6, 3))
    return [x.contiguous(memory_format=memory_format) for x in levels]


def arguments_of(name: str, memory_format: torch.memory_format) -> tuple[Any, ...]:
    """Inputs of a module in float64, maps of four dimensions in a memory format."""

    def laid_out(x: Any) -> Any:
        if isinstance(x, list):
            return [laid_out(y) for y in x]
        x = x.double()
        return x.contiguous(memory_format=memory_format) if x.dim() == 4 else x

    return tuple(map(laid_out, MODULES[name][1]()))


def leaves_of(arguments: Any) -> Any:
    if isinstance(arguments, Tensor):
        return leaf(arguments)
    return type(arguments)(leaves_of(x) for x in arguments)


def flat(arguments: Any) -> list[Tensor]:
    return [arguments] if isinstance(arguments, Tensor) else [t for a in arguments for t in flat(a)]


def module_of(name: str, recompute: bool = False) -> nn.Module:
    module = MODULES[name][0]().double()
    randomise(module)
    for part in module.modules():
        if hasattr(part, "recompute"):
            setattr(part, "recompute", recompute)  # noqa: B010
    return module


IN_PLACE: dict[str, Callable[[Tensor], Any]] = {
    "relu": nn.ReLU(inplace=True),
    "mul_": lambda x: x.mul_(0.5),
    "one pixel": lambda x: x[..., :1].add_(1),
}


@each_backend
@each_module
@pytest.mark.parametrize("operation", IN_PLACE)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("recompute", [False, True])
def test_in_place_operations_in_training(
    name: str, operation: str, memory_format: torch.memory_format, recompute: bool, runs: Backend
) -> None:
    module, change = module_of(name, recompute), IN_PLACE[operation]
    inputs = arguments_of(name, memory_format)
    results = []
    for copied in (False, True):
        arguments = leaves_of(inputs)
        with backend(runs):
            outs = as_list(module(*arguments))
            outs = [x.clone() for x in outs] if copied else outs
            for x in outs:
                change(x)
            results.append((outs, gradients(outs, [*flat(arguments), *module.parameters()])))
    assert_close(results[0][0], results[1][0])
    assert_gradients_close(results[0][1], results[1][1])


@each_backend
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("make", [DyHead, DyHeadBlock])
def test_a_level_holds_its_own_memory_only(
    make: Any, memory_format: torch.memory_format, grad: bool, runs: Backend
) -> None:
    module = make(4, 8, num_groups=2).double()
    with torch.set_grad_enabled(grad), backend(runs):
        outs = module(pyramid(memory_format))
    for x in outs:
        size = x.numel() * x.element_size()
        assert x.untyped_storage().nbytes() == size
        file = io.BytesIO()
        torch.save(x.detach(), file)
        assert len(file.getvalue()) < size + 2000
    assert len({x.untyped_storage().data_ptr() for x in outs}) == len(outs)


@each_backend
@each_module
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_the_memory_format_is_that_of_the_inputs(
    name: str, memory_format: torch.memory_format, runs: Backend
) -> None:
    module, arguments = module_of(name), arguments_of(name, memory_format)
    with backend(runs):
        outs = as_list(module(*arguments))
    for x in outs:
        assert x.is_contiguous(memory_format=memory_format if x.dim() == 4 else FORMATS[0])
        if memory_format == torch.contiguous_format:
            assert x.view(x.shape[0], -1).shape == (x.shape[0], x[0].numel())


@each_backend
def test_strided_inputs_give_contiguous_outputs(runs: Backend) -> None:
    head, levels = module_of("DyHead"), pyramid()
    strided = [torch.cat([x, x], 3)[..., : x.shape[3]] for x in levels]
    mixed = [levels[0], *(x.contiguous(memory_format=torch.channels_last) for x in levels[1:])]
    with backend(runs):
        for x, y, z in zip(head(strided), head(mixed), head(levels), strict=True):
            assert x.is_contiguous()
            assert y.is_contiguous()
            assert_close([x, y], [z, z])


@each_backend
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("high_offset", HIGH_OFFSETS)
def test_a_memory_format_can_be_asked_for(
    high_offset: HighOffset, memory_format: torch.memory_format, hooked: bool, runs: Backend
) -> None:
    other = FORMATS[1 - FORMATS.index(memory_format)]
    options: Any = {"num_groups": 2, "high_offset": high_offset}
    head = DyHead(4, 8, 2, memory_format=memory_format, **options).double()
    block = DyHeadBlock(4, 8, memory_format=memory_format, **options).double()
    assert f"memory_format={memory_format}" in repr(head)
    if hooked:
        head.blocks[1].register_forward_hook(lambda *_: None)
        block.low.register_forward_hook(lambda *_: None)
    parameters = block.parameters_tuple()
    with backend(runs):
        by_function = functional.pyramid_block(
            pyramid(other), parameters, memory_format=memory_format, **options
        )
        by_block = block(pyramid(other))
        for x in (*head(pyramid(other)), *by_block, *by_function):
            assert x.is_contiguous(memory_format=memory_format)
        assert_close(by_block, by_function)


@pytest.mark.parametrize("value", [torch.channels_last_3d, "channels_last", None])
def test_other_memory_formats_are_refused(value: Any) -> None:
    for make in (DyHead, DyHeadBlock):
        with pytest.raises(ValueError, match=r"preserve_format, .*contiguous.*channels_last.*got"):
            make(16, 16, memory_format=value)
    block = DyHeadBlock(4, 8, num_groups=2).double()
    with pytest.raises(ValueError, match="expected memory_format"):
        functional.pyramid_block(
            pyramid(), block.parameters_tuple(), num_groups=2, memory_format=value
        )


def test_a_unified_head_keeps_the_order_that_its_kernels_read() -> None:
    """Contiguous in, contiguous out; between its blocks the channels are innermost."""
    head = UnifiedDyHead(3, 8, 2).double()
    seen: list[Tensor] = []
    head.blocks[0].register_forward_hook(lambda _m, _i, output: seen.append(output))
    f = torch.randn(2, 3, 8, 4, 5, dtype=torch.float64)
    out = head(f)
    assert out.is_contiguous()
    assert seen[0].stride(2) == 1
    strided = f.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    assert head(strided).stride(2) == 1
    assert_close(head(strided), out)


def test_blocks_in_turn() -> None:
    blocks = [DyHeadBlock(4, 8, num_groups=2).double(), DyHeadBlock(8, 8, num_groups=2).double()]
    parameters = [block.parameters_tuple() for block in blocks]
    expected = blocks[1](blocks[0](pyramid()))
    assert_close(functional.pyramid_blocks(pyramid(), parameters, num_groups=2), expected)
    with pytest.raises(ValueError, match="at least one block, got none"):
        functional.pyramid_blocks(pyramid(), [], num_groups=2)
    with pytest.raises(ValueError, match=r"8 input channels \(the output channels.*got 4"):
        functional.pyramid_blocks(pyramid(), parameters[:1] * 2, num_groups=2)


def test_rows_are_freed_before_the_last_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gradients nobody needs what goes into a block once its branches are computed."""
    inputs: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []
    originals = fused.pack, fused.fuse_branches

    def pack(levels: Any) -> Tensor:
        rows = originals[0](levels)
        inputs.append(weakref.ref(rows))
        return rows

    def fuse_branches(*arguments: Any) -> Tensor:
        alive.append(inputs[-1]() is not None)
        rows = originals[1](*arguments)
        inputs.append(weakref.ref(rows))
        return rows

    monkeypatch.setattr(fused, "pack", pack)
    monkeypatch.setattr(fused, "fuse_branches", fuse_branches)
    with torch.no_grad():
        module_of("DyHead")(pyramid())
    assert alive == [False, False]
