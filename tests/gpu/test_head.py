"""Blocks and heads on a GPU: against the reference in float64 there, and what they cost."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from dyhead_cuda import DyHead, DyHeadBlock, UnifiedDyHead, accelerate, backend, library
from dyhead_cuda.older_torch import tf32
from dyhead_cuda.ops.common import compute_dtype
from dyhead_cuda.pyramid import HIGH_OFFSETS, HighOffset
from tests.helpers import training
from tests.helpers.blocks import Block, block_gradients, check_block, in_double, make_smooth
from tests.helpers.compare import (
    TOLERANCE,
    assert_close,
    assert_gradients_close,
    gradients,
    leaf,
    random_like,
    relative_l2,
)
from tests.helpers.inputs import halving_sizes, random_pyramid
from tests.helpers.modules import MODULES, as_list, randomise
from tests.helpers.published_models import MODELS, pyramid, run

from .device import (
    allocated,
    captured,
    heavy,
    launched,
    need_memory,
    need_two_devices,
    no_host_synchronisation,
    on_a_busy_stream,
)

pytestmark = pytest.mark.gpu

# cuBLAS reads it when it is first used, and torch demands it of deterministic algorithms.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

DEVICE: Literal["cpu", "cuda"] = "cuda"
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
variants = pytest.mark.parametrize("high_offset", HIGH_OFFSETS)

SIZES = tuple(halving_sizes(100, 168, 5))  # of an image of 800 x 1344
REAL = Block(SIZES, batch=1, in_channels=256, out_channels=256, num_groups=16)
MIDDLE = replace(REAL, sizes=tuple(halving_sizes(50, 84, 3)), batch=2)


@pytest.fixture(autouse=True)
def _library() -> None:
    library.require(DEVICE)


def here(levels: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [x.to(DEVICE, dtype) for x in levels]


def features_of(block: Block, dtype: torch.dtype) -> list[Tensor]:
    return here(random_pyramid(block.batch, block.in_channels, block.sizes), dtype)


def module_of(block: Block, dtype: torch.dtype = torch.float32) -> DyHeadBlock:
    module = DyHeadBlock(block.in_channels, block.out_channels, num_groups=block.num_groups)
    randomise(module)
    return module.to(DEVICE, dtype)


def rows_of(sizes: Sequence[tuple[int, int]], images: int) -> int:
    return images * sum(h * w for h, w in sizes)


def backward(outs: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    cotangents = [t.to(x) for t, x in zip(random_like(*outs), outs, strict=True)]
    return list(torch.autograd.grad(outs, inputs, cotangents, materialize_grads=True))


def assert_same_bits(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(a, b), f"tensor {i}"


# --- against the reference ----------------------------------------------------------------------


@variants
def test_small_block(high_offset: HighOffset) -> None:
    block = Block(in_channels=16, out_channels=24, high_offset=high_offset, device=DEVICE)
    check_block(block)
    check_block(block, torch.bfloat16, smooth=True)


@heavy
@dtypes
def test_block_of_an_image(dtype: torch.dtype) -> None:
    need_memory(60)
    # Of millions of values some always lie at a kink, but for rounding of float64.
    check_block(replace(REAL, device=DEVICE), dtype, smooth=dtype != torch.float64)


@pytest.mark.parametrize("block", [Block(in_channels=16, out_channels=24), MIDDLE], ids=str)
def test_block_in_tf32(block: Block) -> None:
    block = replace(block, device=DEVICE)
    features, parameters = block.tensors(torch.float32)
    make_smooth(parameters)
    exact = in_double(features, parameters)
    expected = block.run("reference", *exact)
    before = block.run(DEVICE, features, parameters)
    with tf32(True):
        actual = block.run(DEVICE, features, parameters)
        grads = block_gradients(actual, features, parameters, torch.float32)
    assert all(relative_l2(a, e) < 1e-3 for a, e in zip(actual, expected, strict=True))
    wanted = block_gradients(expected, *exact, torch.float32)
    largest = max(float(g.norm()) for g in wanted)
    for a, e in zip(grads, wanted, strict=True):
        assert (a - e).norm() < 2e-3 * max(float(e.norm()), 2e-2 * largest)
    assert relative_l2(actual[0], expected[0]) > 20 * relative_l2(before[0], expected[0])
    assert_same_bits(block.run(DEVICE, features, parameters), before)


@dtypes
@pytest.mark.parametrize("name", MODULES)
def test_modules_in_every_type(name: str, dtype: torch.dtype) -> None:
    make, inputs = MODULES[name]
    module, arguments = make(), inputs()
    randomise(module)
    module.to(DEVICE, dtype)

    def moved(value: Any, to: torch.dtype) -> Any:
        return value.to(DEVICE, to) if isinstance(value, Tensor) else here(value, to)

    out = as_list(module(*(moved(value, dtype) for value in arguments)))
    assert {t.dtype for t in out} == {dtype}
    exact = copy.deepcopy(module).double()
    rounded = [moved(moved(value, dtype), torch.float64) for value in arguments]
    with backend("reference"):
        expected = as_list(exact(*rounded))
    # Two blocks with a rounding to the small type between them.
    assert_close(out, expected, dtype, factor=5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "make",
    [
        *(lambda v=v: DyHead(24, 32, 3, num_groups=4, high_offset=v) for v in HIGH_OFFSETS),
        lambda: UnifiedDyHead(3, 24, 2),
    ],
    ids=[*HIGH_OFFSETS, "UnifiedDyHead"],
)
def test_gradients_through_a_head(make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    head = make()
    randomise(head)
    head.to(DEVICE, dtype)
    features = [leaf(x) for x in here(random_pyramid(2, 24, halving_sizes(19, 26, 3)), dtype)]
    outs = training.as_list(head(features))
    grads = backward(outs, [*features, *head.parameters()])
    exact = copy.deepcopy(head).double()
    inputs = [leaf(x, torch.float64) for x in features]
    with backend("reference"):
        expected = training.as_list(exact(inputs))
    wanted = backward(expected, [*inputs, *exact.parameters()])
    assert_close(outs, expected, dtype, factor=5)
    if dtype == torch.float64:  # else a sample may change its pixel between blocks
        assert_gradients_close(grads, wanted, dtype, floor=0.1)


@dtypes
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_accelerated_models(make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    model = accelerate(make()).to(DEVICE, dtype)
    levels = here(pyramid(), dtype)
    found = run(model, levels)
    with backend("reference"):
        expected = run(copy.deepcopy(model).double(), [x.double() for x in levels])
    assert {x.dtype for x in found} == {dtype}
    # Two blocks, and in GLIP's model layers of the type itself.
    assert_close(found, expected, dtype, factor=5)


# --- what it costs ------------------------------------------------------------------------------


@pytest.mark.parametrize("parameter_dtype", [None, torch.float32])
@dtypes
def test_six_launches_for_a_block(dtype: torch.dtype, parameter_dtype: torch.dtype | None) -> None:
    module = module_of(REAL, compute_dtype(dtype) if parameter_dtype else dtype)
    with torch.no_grad():
        levels = module(features_of(REAL, dtype))  # rows already, as between blocks
        names = launched(lambda: module(levels))
    assert len(names) <= 6, names
    assert all("dyhead" in name for name in names), names


@pytest.mark.parametrize("training", [False, True])
def test_the_host_never_waits(training: bool) -> None:
    module = module_of(MIDDLE)
    features = [x.requires_grad_(training) for x in features_of(MIDDLE, torch.bfloat16)]
    module.requires_grad_(training)
    outs = module(features)
    cotangents = [torch.randn_like(x) for x in outs]
    inputs = [*features, *module.parameters()]
    with no_host_synchronisation():
        outs = module(features)
        if training:
            torch.autograd.grad(outs, inputs, cotangents)


def forward_bytes(block: Block, dtype: torch.dtype) -> int:
    """What a block without gradients may hold at once, but for its input rows."""
    rows = rows_of(block.sizes, block.batch)
    # Branch mid of every level, low and high of all but the finest.
    branch_rows = rows + 2 * rows_of(block.sizes[1:], block.batch)
    values = (rows + branch_rows) * block.out_channels * dtype.itemsize
    predictions = rows * 27 * 4
    # Weights in tiles for the kernels, and moments: three values per channel and 64 pixels.
    weights = 3 * 9 * block.in_channels * block.out_channels * dtype.itemsize
    moments = 3 * 4 * block.out_channels * (branch_rows // 64 + 100 * len(block.sizes))
    return values + predictions + 2 * weights + 2 * moments + (4 << 20)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("block", [REAL, replace(REAL, batch=8)], ids=["1 image", "8 images"])
def test_memory_of_a_forward(block: Block, dtype: torch.dtype) -> None:
    module = module_of(block, dtype)
    with torch.no_grad():
        levels = module(features_of(block, dtype))
        module(levels)
        peak, held = allocated(lambda: module(levels))
    outputs = rows_of(block.sizes, block.batch) * block.out_channels * dtype.itemsize
    assert outputs <= held <= outputs + (1 << 20)
    assert peak <= forward_bytes(block, dtype)


def test_memory_of_a_training_step() -> None:
    """The columns of all branches would be nine times as large as what goes into them."""
    block, dtype = replace(REAL, batch=4), torch.bfloat16
    module, features = module_of(block, dtype), features_of(block, dtype)
    inputs = [x.requires_grad_() for x in features]

    def step() -> list[Tensor]:
        outs = module(inputs)
        return list(torch.autograd.grad(outs, [*inputs, *module.parameters()], outs))

    step()
    peak, _ = allocated(step)
    rows = rows_of(block.sizes, block.batch)
    branch_rows = rows + 2 * rows_of(block.sizes[1:], block.batch)
    map_bytes, branch_bytes = (n * 256 * dtype.itemsize for n in (rows, branch_rows))
    # In the backward of the branches: rows, outputs, sums of the rows' gradient in float32 and
    # that gradient, and one more; the branches, their gradient, and that with the moments.
    bound = 6 * map_bytes + 3 * branch_bytes + 4 * branch_rows * 27 * 4 + (64 << 20)
    assert bound < 9 * branch_bytes
    assert peak <= bound


def test_recompute_saves_memory_for_the_same_gradients() -> None:
    block, count, dtype = MIDDLE, 4, torch.bfloat16
    features = features_of(block, dtype)
    held, peaks, found = {}, {}, {}
    for recompute in (False, True):
        head = DyHead(256, 256, count, recompute=recompute)
        randomise(head)
        head.to(DEVICE, dtype)
        inputs = [leaf(x) for x in features]

        def step(head: nn.Module = head, inputs: list[Tensor] = inputs) -> list[Tensor]:
            outs = head(inputs)
            return [*outs, *backward(outs, [*inputs, *head.parameters()])]

        with training.deterministic():
            found[recompute] = [t.detach() for t in step()]
        peaks[recompute], _ = allocated(step)
        _, held[recompute] = allocated(lambda head=head, inputs=inputs: head(inputs))  # type: ignore[misc]
    assert_same_bits(found[True], found[False])
    map_bytes = rows_of(block.sizes, block.batch) * 256 * dtype.itemsize
    # The inputs of blocks, packed once for the first, and the outputs of the last.
    assert held[True] <= (count + 2) * map_bytes + (4 << 20)
    assert held[False] > 2 * held[True]
    branch_rows = rows_of(block.sizes, block.batch) + 2 * rows_of(block.sizes[1:], block.batch)
    between = branch_rows * 256 * dtype.itemsize + rows_of(block.sizes, block.batch) * 27 * 4
    assert peaks[False] - peaks[True] > (count - 2) * between


# --- graphs, streams, devices, compilers --------------------------------------------------------


@dtypes
def test_graph_of_a_forward(dtype: torch.dtype) -> None:
    module, features = module_of(MIDDLE, dtype), features_of(MIDDLE, dtype)
    with torch.no_grad():
        graph, found = captured(lambda: module(features))
        for factor in (1.5, -0.5):
            for x in features:
                x.mul_(factor)
            graph.replay()
            assert_same_bits(found, module(features))


def test_graph_of_a_training_step() -> None:
    module, features = module_of(MIDDLE), features_of(MIDDLE, torch.float32)
    inputs = [x.requires_grad_() for x in features]
    cotangents = [torch.randn_like(x) for x in module(inputs)]
    count = len(cotangents)

    def step() -> list[Tensor]:
        outs = module(inputs)
        grads = torch.autograd.grad(outs, [*inputs, *module.parameters()], cotangents)
        return [*(x.detach() for x in outs), *grads]

    graph, found = captured(step)
    for factor in (1.5, -0.5):
        with torch.no_grad():
            for x in inputs:
                x.mul_(factor)
        graph.replay()
        expected = step()
        assert_same_bits(found[:count], expected[:count])
        assert_gradients_close(found[count:], expected[count:], torch.float32)


def test_runs_on_the_current_stream() -> None:
    module, features = module_of(MIDDLE), features_of(MIDDLE, torch.float32)
    with torch.no_grad():
        expected = module(features)
        late = torch.full_like(features[0], torch.nan)
        found = on_a_busy_stream(late, features[0], lambda: module([late, *features[1:]]))
    assert_same_bits(found, expected)


def test_runs_on_the_device_of_its_tensors() -> None:
    need_two_devices()
    module, features = module_of(MIDDLE), features_of(MIDDLE, torch.float32)
    expected = module(features)
    other = copy.deepcopy(module).to("cuda:1")
    inputs = [leaf(x.to("cuda:1")) for x in features]
    assert torch.cuda.current_device() == 0
    outs = other(inputs)
    backward(outs, [*inputs, *other.parameters()])
    assert torch.cuda.current_device() == 0
    assert_close([x.to(DEVICE) for x in outs], expected, torch.float32)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("recompute", [False, True])
def test_compiles_in_one_graph(recompute: bool, compiler: str) -> None:
    block = DyHeadBlock(24, 32, num_groups=4, recompute=recompute)
    randomise(block)
    block.to(DEVICE)
    features = [leaf(x) for x in here(random_pyramid(2, 24, halving_sizes(19, 26, 3)))]
    inputs = [*features, *block.parameters()]
    torch._dynamo.reset()
    found = torch.compile(block, fullgraph=True, backend=compiler)(features)
    expected = block(features)
    assert_close(found, expected, torch.float32)
    assert_gradients_close(backward(found, inputs), backward(expected, inputs), torch.float32)


def test_cuda_graphs_of_a_compiled_training_step() -> None:
    head = DyHead(64, 64, 2, num_groups=4).to(DEVICE)
    randomise(head)
    features = [x.to(DEVICE) for x in random_pyramid(2, 64, SIZES[2:], torch.float32)]
    expected_levels = [leaf(x) for x in features]
    expected = gradients(head(expected_levels), [*expected_levels, *head.parameters()])
    counters.clear()
    compiled = torch.compile(head, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):  # the first compiles, the next ones warm up and record
        torch.compiler.cudagraph_mark_step_begin()
        levels = [leaf(x) for x in features]
        found = gradients(compiled(levels), [*levels, *head.parameters()])
        assert_gradients_close([g.clone() for g in found], expected, torch.float32)
    assert counters["inductor"]["cudagraph_skips"] == 0


# --- as users run it ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", training.HALF, ids=lambda dtype: str(dtype)[6:])
def test_autocast_changes_no_bit(dtype: torch.dtype) -> None:
    """The head chooses its own precision: that of its features, with parameters of any type."""
    head = DyHead(24, 32, 2, num_groups=4)
    randomise(head)
    head.to(DEVICE)
    features = here(random_pyramid(2, 24, halving_sizes(19, 26, 3)), dtype)
    with torch.no_grad():
        expected = head(features)
        with torch.autocast(DEVICE, dtype):
            found = head(features)
    assert {x.dtype for x in found} == {dtype}
    assert_same_bits(found, expected)


@dtypes
def test_inference_mode(dtype: torch.dtype) -> None:
    head = DyHead(24, 32, 2, num_groups=4)
    randomise(head)
    head.to(DEVICE, dtype).eval()
    features = here(random_pyramid(2, 24, halving_sizes(19, 26, 3)), dtype)
    with torch.no_grad():
        expected = head(features)
    with torch.inference_mode():
        found = head(features)
    assert all(x.is_inference() for x in found)
    assert_same_bits(found, expected)
    assert_same_bits([x.detach() for x in head(features)], expected)


@pytest.mark.parametrize("kind", training.KINDS)
def test_steps_lower_the_loss_as_their_gradients_say(kind: str) -> None:
    model = training.Model(kind).to(DEVICE)
    image = training.image(DEVICE)
    parameters = list(model.parameters())
    loss = training.loss_of(model(image))
    for _ in range(6):
        grads = torch.autograd.grad(loss, parameters)
        square = sum(float(g.square().sum()) for g in grads)
        wanted = 1e-3 * float(loss.detach())
        with torch.no_grad():
            for p, g in zip(parameters, grads, strict=True):
                p.sub_(wanted / square * g)
        after = training.loss_of(model(image))
        assert float((loss - after).detach()) == pytest.approx(wanted, rel=0.1)
        loss = after


def test_parameters_elsewhere_raise() -> None:
    block = Block(device=DEVICE)
    features, _ = block.tensors(torch.float32)
    _, parameters = replace(block, device="cpu").tensors(torch.float32)
    with pytest.raises(ValueError, match="to one device"):
        block.run(DEVICE, features, parameters)
