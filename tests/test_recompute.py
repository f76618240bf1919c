"""What the forward keeps for the backward, and that recompute=True keeps less for the same bits."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dyhead_cuda import (
    DyHead,
    DyHeadBlock,
    ModulatedDeformConv2d,
    UnifiedDyHead,
    accelerate,
    backend,
)
from dyhead_cuda.backends import Backend
from dyhead_cuda.compat.accelerate import AcceleratedBlock
from dyhead_cuda.pyramid import HIGH_OFFSETS, HighOffset
from tests.helpers.compare import leaf, random_like
from tests.helpers.inputs import halving_sizes, random_pyramid
from tests.helpers.modules import randomise
from tests.helpers.published import glip, mmdet

CHANNELS = 16

Make = Callable[[bool], nn.Module]  # without or with recompute


def head(recompute: bool, **options: Any) -> DyHead:
    module = DyHead(CHANNELS, CHANNELS, 2, num_groups=4, recompute=recompute, **options)
    randomise(module)
    return module


def unified(recompute: bool) -> UnifiedDyHead:
    module = UnifiedDyHead(3, CHANNELS, 2, recompute=recompute)
    randomise(module)
    return module


def accelerated(make: Callable[[], nn.Module], recompute: bool) -> nn.Module:
    model = make()
    randomise(model)
    return accelerate(model, recompute=recompute)


def pyramid(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return random_pyramid(2, CHANNELS, halving_sizes(9, 7, 3), dtype)


def random_maps(size: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Three levels [N, L * C, H, W]."""
    return random_pyramid(2, 3 * CHANNELS, [size], dtype)[0]


def stacked(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [random_maps((6, 7), dtype)]


MODULES: dict[str, tuple[Make, Callable[..., list[Tensor]]]] = {
    **{f"DyHead {name}": (partial(head, high_offset=name), pyramid) for name in HIGH_OFFSETS},
    "UnifiedDyHead": (unified, stacked),
    "mmdet": (partial(accelerated, lambda: mmdet.DyHead(CHANNELS, CHANNELS, 2)), pyramid),
    "glip": (partial(accelerated, lambda: glip.DyHead(CHANNELS, 2).dyhead_tower), pyramid),
}
each_module = pytest.mark.parametrize("name", MODULES)
each_kind = pytest.mark.parametrize("name", ["DyHead flat", "UnifiedDyHead", "mmdet"])


def run(module: Callable[..., Any], features: Sequence[Tensor]) -> list[Tensor]:
    """All outputs; the one map of ``stacked`` is F, its channels are levels and channels."""
    if len(features) == 1:
        return [module(features[0].unflatten(1, (3, CHANNELS)))]
    return list(module(list(features)))


def backward(outs: Sequence[Tensor], inputs: Sequence[Tensor], **options: Any) -> list[Tensor]:
    cotangents = [t.to(out) for t, out in zip(random_like(*outs), outs, strict=True)]
    options = {"materialize_grads": True, **options}
    return list(torch.autograd.grad(outs, list(inputs), cotangents, **options))


def results(module: nn.Module, features: Sequence[Tensor]) -> list[Tensor]:
    """Outputs and the gradients of features and parameters."""
    inputs = [leaf(x) for x in features]
    outs = run(module, inputs)
    return [*(x.detach() for x in outs), *backward(outs, [*inputs, *module.parameters()])]


def assert_same_bits(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.dtype == b.dtype
        assert torch.equal(a, b), f"tensor {i} differs by {(a - b).abs().max()}"


def saved_bytes(module: Callable[..., Any], features: Sequence[Tensor]) -> int:
    """Of all memory that the graph of a forward holds on to, without a module's parameters."""
    parameters = module.parameters() if isinstance(module, nn.Module) else ()
    own = {p.untyped_storage().data_ptr() for p in parameters}
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return t  # keeps it, so that no other tensor can get its address

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outs = run(module, features)
    assert outs[0].requires_grad
    return sum(size for pointer, size in storages.items() if pointer not in own)


# --- the same bits --------------------------------------------------------------------------------


@each_module
def test_same_bits(name: str) -> None:
    make, features = MODULES[name]
    expected = results(make(False), features())
    assert all(x.abs().max() > 0 for x in expected[:3])
    assert_same_bits(results(make(True), features()), expected)


@each_kind
def test_same_bits_on_the_reference(name: str) -> None:
    make, features = MODULES[name]
    with backend("reference"):
        assert_same_bits(results(make(True), features()), results(make(False), features()))


@each_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_same_bits_under_autocast(name: str, dtype: torch.dtype) -> None:
    make, features = MODULES[name]

    def train(recompute: bool) -> list[Tensor]:
        module, inputs = make(recompute), [leaf(x) for x in features()]
        first = nn.Conv2d(inputs[0].shape[1], inputs[0].shape[1], 1)
        randomise(first)
        with torch.autocast("cpu", dtype):
            maps = [first(x) for x in inputs]
            assert maps[0].dtype == dtype
            outs = run(module, maps)
        # As everyone does, the backward is outside.
        return [*outs, *backward(outs, [*inputs, *first.parameters(), *module.parameters()])]

    assert_same_bits(train(True), train(False))


def test_the_backward_runs_on_the_backend_of_the_forward() -> None:
    def train(recompute: bool, name: Backend) -> list[Tensor]:
        module, features = head(recompute), [leaf(x) for x in pyramid()]
        with backend(name):
            outs = run(module, features)
        return [*outs, *backward(outs, [*features, *module.parameters()])]

    assert_same_bits(train(True, "reference"), train(False, "reference"))
    with backend("reference"):
        assert_same_bits(train(True, "cpu"), train(False, "cpu"))
    assert not torch.equal(train(False, "cpu")[-1], train(False, "reference")[-1])


def test_second_derivatives_through_the_reference() -> None:
    def second(recompute: bool) -> list[Tensor]:
        module = DyHead(2, 4, 1, num_groups=2, recompute=recompute).double()
        randomise(module)
        features = [leaf(x) for x in random_pyramid(1, 2, halving_sizes(3, 2, 2))]
        with backend("reference"):
            grads = backward(module(features), features, create_graph=True)
            return backward([g.square().sum() for g in grads], [*features, *module.parameters()])

    expected = second(False)
    assert all(g.abs().max() > 0 for g in expected[:2])
    assert_same_bits(second(True), expected)


def test_twice_through_one_graph() -> None:
    module, features = head(True), [leaf(x) for x in pyramid()]
    outs = run(module, features)
    first = backward(outs, features, retain_graph=True)
    assert_same_bits(backward(outs, features), first)


def test_empty_batch() -> None:
    module = head(True)
    outs = module([x[:0] for x in pyramid()])
    grads = backward(outs, list(module.parameters()))
    assert [x.shape[0] for x in outs] == [0, 0, 0]
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, nullcontext])
def test_without_gradients(context: Callable[[], Any]) -> None:
    module, features = head(True).requires_grad_(False), pyramid()
    with context():
        outs = module(features)
    assert not any(x.requires_grad for x in outs)
    assert_same_bits(outs, head(False)(features))


# --- what is kept ---------------------------------------------------------------------------------

SMALL, LARGE = (halving_sizes(*size, 3) for size in ((16, 20), (36, 28)))


def rows(images: int, sizes: Sequence[tuple[int, int]]) -> int:
    return images * sum(h * w for h, w in sizes)


def growth(make: Callable[[], nn.Module], dtype: torch.dtype) -> int:
    """How many bytes more the large pyramid keeps: all that is of the size of an activation."""
    module = make().to(dtype)
    small, large = (
        saved_bytes(module, [leaf(x) for x in random_pyramid(2, CHANNELS, sizes, dtype)])
        for sizes in (SMALL, LARGE)
    )
    return large - small


def grown(count: Callable[[Sequence[tuple[int, int]]], int]) -> int:
    return count(LARGE) - count(SMALL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("high_offset", ["flat", "crop", "mmdet_main"])
def test_a_block_keeps_its_input_predictions_and_branches(
    high_offset: HighOffset, dtype: torch.dtype
) -> None:
    # Of every level there is a branch mid, of all but the finest what low and high make.
    branches = grown(lambda sizes: rows(2, sizes) + 2 * rows(2, sizes[1:]))
    inputs = grown(lambda sizes: rows(2, sizes))
    expected = (inputs + branches) * CHANNELS * dtype.itemsize + inputs * 27 * 4
    assert growth(lambda: head(False, high_offset=high_offset), dtype) == 2 * expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_aligned_block_keeps_the_upsampled_maps_too(dtype: torch.dtype) -> None:
    inputs = grown(lambda sizes: rows(2, sizes))
    upsampled = grown(lambda sizes: rows(2, sizes[:-1]))
    branches = inputs + grown(lambda sizes: rows(2, sizes[1:])) + upsampled
    expected = (inputs + upsampled + branches) * CHANNELS * dtype.itemsize + inputs * 27 * 4
    assert growth(lambda: head(False, high_offset="aligned"), dtype) == 2 * expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_unified_block_keeps_no_map_twice(dtype: torch.dtype) -> None:
    kept = [
        saved_bytes(unified(False).to(dtype), [leaf(random_maps(size, dtype))])
        for size in ((8, 9), (21, 16))
    ]
    # F, the result of the spatial attention, and logits before and after their gate.
    per_pixel = 2 * CHANNELS * dtype.itemsize + 2 * 27 * 4
    assert kept[1] - kept[0] == 2 * per_pixel * 2 * 3 * (21 * 16 - 8 * 9)


def test_a_convolution_keeps_what_it_reads() -> None:
    convolution = ModulatedDeformConv2d(CHANNELS, CHANNELS, 3, padding=1)
    x = leaf(torch.randn(2, CHANNELS, 9, 8).contiguous(memory_format=torch.channels_last))
    offset, mask = leaf(torch.randn(2, 18, 9, 8)), leaf(torch.rand(2, 9, 9, 8))
    assert saved_bytes(lambda maps: [convolution(maps[0], offset, mask)], [x, x]) == (
        (CHANNELS + 27) * 2 * 9 * 8 * 4 + convolution.weight.numel() * 4
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("high_offset", HIGH_OFFSETS)
def test_recompute_keeps_the_inputs_of_blocks(high_offset: HighOffset, dtype: torch.dtype) -> None:
    expected = grown(lambda sizes: rows(2, sizes)) * CHANNELS * dtype.itemsize
    assert growth(lambda: head(True, high_offset=high_offset), dtype) == 2 * expected


@each_module
def test_recompute_keeps_less(name: str) -> None:
    make, features = MODULES[name]
    inputs = [leaf(x) for x in features()]
    size = sum(x.numel() * x.element_size() for x in inputs)
    assert saved_bytes(make(True), inputs) == 2 * size
    assert saved_bytes(make(False), inputs) > 4 * size


def test_it_can_be_switched_on_later() -> None:
    module, features = head(False), [leaf(x) for x in pyramid()]
    expected = saved_bytes(head(True), features)
    assert saved_bytes(module, features) > expected
    for block in module.blocks:
        assert isinstance(block, DyHeadBlock)
        block.recompute = True
    assert saved_bytes(module, features) == expected
    assert "recompute=True" in repr(module)


# --- under other machinery ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["DyHead flat", "UnifiedDyHead"])
def test_compiles_in_one_graph(name: str) -> None:
    make, features = MODULES[name]
    inputs = [leaf(x) for x in features()]
    kept = {}
    for recompute in (False, True):
        module = make(recompute)
        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        every = [*inputs, *module.parameters()]
        outs, expected = run(compiled, inputs), run(module, inputs)
        assert_same_bits(outs, expected)
        assert_same_bits(backward(outs, every), backward(expected, every))
        kept[recompute] = saved_bytes(compiled, inputs)
    # Inputs of both blocks, and a few vectors: not all of the head is recomputed at once.
    size = sum(x.numel() * x.element_size() for x in inputs)
    assert 2 * size <= kept[True] < 2.1 * size < 4 * size < kept[False]


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    features = pyramid()
    programs = [torch.export.export(head(r), (features,), strict=strict) for r in (False, True)]
    expected = head(False)(features)
    for program in programs:
        assert_same_bits(program.module()(features), expected)
    if not strict:
        assert programs[1].graph_module.code == programs[0].graph_module.code


@pytest.mark.parametrize("recompute", [False, True])
def test_checkpoint_around_blocks(recompute: bool) -> None:
    module = head(recompute)
    inputs = [leaf(x) for x in pyramid()]

    def through(*levels: Tensor) -> tuple[Tensor, ...]:
        for block in module.blocks:
            levels = checkpoint(lambda *x, block=block: block(x), *levels, use_reentrant=False)
        return levels

    every = [*inputs, *module.parameters()]
    outs = checkpoint(through, *inputs, use_reentrant=False)
    assert_same_bits([*outs, *backward(outs, every)], results(head(False), pyramid()))


def test_hooks_fire_once_and_see_what_flows() -> None:
    module = head(True)
    calls: list[str] = []
    block = module.blocks[0]
    block.register_forward_pre_hook(lambda *_: calls.append("before"))
    block.register_forward_hook(lambda *_: calls.append("after"))
    between: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, levels: list[Tensor]) -> None:
        between.extend(levels)
        for x in levels:
            x.retain_grad()
            x.register_hook(lambda grad: 2 * grad)

    block.register_forward_hook(keep)
    inputs = [leaf(x) for x in pyramid()]
    outs = module(inputs)
    torch.autograd.backward(outs, [t.to(x) for t, x in zip(random_like(*outs), outs, strict=True)])
    assert calls == ["before", "after"]

    plain, again = head(False), [leaf(x) for x in pyramid()]
    middle = plain.blocks[0](again)
    expected = backward(plain.blocks[1](middle), middle)
    for x, grad in zip(between, expected, strict=True):
        assert x.grad is not None
        assert torch.equal(x.grad, 2 * grad)
    grads = torch.autograd.grad(middle, again, [2 * grad for grad in expected])
    assert_same_bits([x.grad for x in inputs if x.grad is not None], grads)


def test_a_parameter_written_to_before_the_backward_is_an_error() -> None:
    module = head(True)
    outs = module(pyramid())
    with torch.no_grad():
        module.get_parameter("blocks.0.mid.weight").mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        backward(outs, list(module.parameters()))


def test_functional_call_recomputes_with_the_parameters_of_the_call() -> None:
    other = {key: leaf(p + 0.1) for key, p in head(False).named_parameters()}

    def train(recompute: bool) -> list[Tensor]:
        outs = torch.func.functional_call(head(recompute), other, (pyramid(),))
        return [*outs, *backward(outs, list(other.values()))]

    assert_same_bits(train(True), train(False))


@each_kind
def test_copies(name: str) -> None:
    make, features = MODULES[name]
    module, inputs = make(True), [leaf(x) for x in features()]
    kept, expected = saved_bytes(module, inputs), results(module, inputs)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert saved_bytes(other, inputs) == kept
        assert_same_bits(results(other, inputs), expected)
    plain = make(False)
    assert list(plain.state_dict()) == list(module.state_dict())
    plain.load_state_dict(module.state_dict())
    assert_same_bits(results(plain, inputs), expected)


def test_accelerate_passes_it_on() -> None:
    for recompute in (False, True):
        model = accelerated(lambda: mmdet.DyHead(CHANNELS, CHANNELS, 2), recompute)
        blocks = [m for m in model.modules() if isinstance(m, AcceleratedBlock)]
        assert [block.recompute for block in blocks] == [recompute, recompute]
        assert f"recompute={recompute}" in repr(model)
    own = DyHead(CHANNELS, CHANNELS, 1)
    assert isinstance(own.blocks[0], DyHeadBlock)
    assert accelerate(own, recompute=True) is own
    assert not own.blocks[0].recompute
