"""accelerate(model) on modules with the structure of the public code bases."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import dyhead_cuda
from dyhead_cuda import DyHead, accelerate
from dyhead_cuda.compat import structure
from dyhead_cuda.compat.accelerate import (
    AcceleratedBlock,
    AcceleratedDyConv,
    AcceleratedDyHeadBlock,
)
from tests.helpers.published import glip, glip_language, microsoft, mmdet
from tests.helpers.published_models import (
    CHANNELS,
    MODELS,
    Levels,
    assert_close,
    fused,
    glip_model,
    language_model,
    main_model,
    microsoft_model,
    mmdet_glip_model,
    mmdet_model,
    pyramid,
    randomised,
    run,
)

each_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
# The offset gradient of mmdet's main branch goes to the wrong places, ours to the right ones.
TRUE_GRADIENT = {name: make for name, make in MODELS.items() if make is not main_model}
each_true_model = pytest.mark.parametrize("make", TRUE_GRADIENT.values(), ids=TRUE_GRADIENT)


def backward(model: nn.Module, levels: Levels) -> tuple[Levels, dict[str, Tensor]]:
    """Outputs, and the gradients of a seeded loss by parameter name and level."""
    inputs = [x.clone().requires_grad_() for x in levels]
    outs = run(model, inputs)
    generator = torch.Generator().manual_seed(2)
    loss = torch.zeros((), dtype=outs[0].dtype)
    for out in outs:
        weight = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
        loss = loss + (out * weight).sum()
    loss.backward()
    gradients = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    gradients |= {f"in.{i}": x.grad for i, x in enumerate(inputs) if x.grad is not None}
    return [out.detach() for out in outs], gradients


def gradient_tolerance(make: Callable[[], nn.Module]) -> float:
    """torch's backward of Hardsigmoid multiplies by the sixth of float32, in every dtype."""
    return 1e-6 if make is mmdet_glip_model else 1e-8


@each_model
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_same_numbers(make: Callable[[], nn.Module], backend: Any) -> None:
    model, levels = make(), pyramid()
    outs, gradients = backward(model, levels)
    model.zero_grad()
    assert accelerate(model) is model
    assert len(fused(model)) == 2
    with dyhead_cuda.backend(backend):
        fast_outs, fast_gradients = backward(model, levels)
    assert_close(fast_outs, outs)
    assert fast_gradients.keys() == gradients.keys()
    if make not in TRUE_GRADIENT.values():
        return
    for key, gradient in gradients.items():
        rtol = gradient_tolerance(make)
        torch.testing.assert_close(
            fast_gradients[key], gradient, rtol=rtol, atol=rtol / 10, msg=key
        )


@each_model
def test_parameters_are_the_same_objects(make: Callable[[], nn.Module]) -> None:
    model = make()
    frozen = list(model.parameters())[3]
    frozen.requires_grad_(False)
    before, keys = dict(model.named_parameters()), list(model.state_dict())
    after = dict(accelerate(model).named_parameters())
    assert list(after) == list(before)
    assert all(after[key] is before[key] for key in before)
    assert list(model.state_dict()) == keys
    assert not frozen.requires_grad


@each_true_model
def test_an_optimizer_made_before_goes_on(make: Callable[[], nn.Module]) -> None:
    original, levels = make(), pyramid()
    model = copy.deepcopy(original)
    start = copy.deepcopy(original.state_dict())
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-3, momentum=0.9) for m in (original, model)]
    accelerate(model)
    for _ in range(2):
        for m, optimizer in zip((original, model), optimizers, strict=True):
            optimizer.zero_grad()
            backward(m, levels)
            optimizer.step()
    expected = original.state_dict()
    for key, value in model.state_dict().items():
        rtol = gradient_tolerance(make)
        torch.testing.assert_close(value, expected[key], rtol=rtol, atol=rtol / 100, msg=key)
        if "offset" in key:
            assert not torch.equal(value, start[key]), key


@each_model
def test_checkpoints_load_both_ways(make: Callable[[], nn.Module]) -> None:
    levels = pyramid()
    trained, fresh = accelerate(make()), make()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.mul_(1.1)
    fresh.load_state_dict(trained.state_dict())
    assert_close(run(fresh, levels), run(trained, levels))
    other, fast = make(), accelerate(make())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    fast.load_state_dict(other.state_dict())
    assert_close(run(fast, levels), run(other, levels))


@each_model
def test_idempotent(make: Callable[[], nn.Module], caplog: pytest.LogCaptureFixture) -> None:
    model = accelerate(make())
    blocks, state = fused(model), [vars(block).copy() for block in fused(model)]
    caplog.clear()
    with caplog.at_level(logging.INFO, "dyhead_cuda"):
        assert accelerate(model, high_offset="crop") is model
    assert [id(block) for block in fused(model)] == [id(block) for block in blocks]
    assert [vars(block) for block in blocks] == state
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "2 blocks are fused already" in caplog.text


@each_model
def test_pickle_and_deepcopy(make: Callable[[], nn.Module]) -> None:
    model, levels = accelerate(make()), pyramid()
    expected = run(model, levels)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        assert len(fused(twin)) == 2
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.add_(0)
        assert_close(run(twin, levels), expected, 0)
        ours = {id(p) for p in model.parameters()}
        assert not any(id(p) in ours for p in twin.parameters())


@each_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moves_to_other_dtypes(make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    model, levels = accelerate(make()), pyramid()
    expected = run(model, levels)
    model.to(dtype)
    found = run(model, [x.to(dtype) for x in levels])
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == dtype
        limit = 1e-4 if dtype == torch.float32 else 0.1
        assert (x.double() - y).norm() <= limit * y.norm()
    assert model.to("meta") is model
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@each_model
def test_channels_last_is_right(make: Callable[[], nn.Module]) -> None:
    model, levels = accelerate(make()), pyramid()
    last = [x.contiguous(memory_format=torch.channels_last) for x in levels]
    assert not last[0].is_contiguous()
    found, gradients = backward(model, last)
    model.zero_grad()
    expected, expected_gradients = backward(model, levels)
    assert_close(found, expected)
    for key, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[key], gradient, rtol=1e-9, atol=1e-9, msg=key)


def test_containers() -> None:
    levels = pyramid()
    named = OrderedDict((f"p{i}", x) for i, x in enumerate(levels))
    dyhead = accelerate(randomised(microsoft.DyConv(CHANNELS, CHANNELS)))
    out = dyhead(dict(named))
    assert type(out) is dict
    assert list(out) == list(named)
    assert list(dyhead(named)) == list(named)
    assert all(x.is_contiguous() for x in out.values())
    plain = dyhead(levels)
    assert isinstance(plain, list)
    assert_close(plain, list(out.values()), 0)
    assert isinstance(dyhead(tuple(levels)), list)

    language = accelerate(randomised(glip_language.DyConv(CHANNELS, CHANNELS)))
    lang = object()
    out = language({"visual": levels, "lang": lang})
    assert list(out) == ["visual", "lang"]
    assert isinstance(out["visual"], list)
    assert out["lang"] is lang

    block = accelerate(randomised(mmdet.DyHeadBlock(CHANNELS, CHANNELS)))
    assert isinstance(block(levels), list)
    assert isinstance(block(tuple(levels)), list)
    assert isinstance(accelerate(mmdet_model())(tuple(levels)), tuple)
    with pytest.raises(TypeError, match="wrap a single map in a list"):
        dyhead(levels[0])
    with pytest.raises(ValueError, match="rounded up"):
        block([levels[0], levels[2]])


def test_the_model_itself_is_a_block() -> None:
    block, levels = randomised(glip.DyConv(CHANNELS, CHANNELS)), pyramid()
    expected = block(levels)
    fast = accelerate(block)
    assert isinstance(fast, AcceleratedDyConv)
    assert type(block) is glip.DyConv
    assert_close(fast(levels), expected)
    assert accelerate(fast) is fast
    for twin, original in zip(fast.parameters(), block.parameters(), strict=True):
        assert twin is original


def test_a_shared_block_stays_shared() -> None:
    block = randomised(glip.DyConv(CHANNELS, CHANNELS))
    model, levels = nn.Sequential(block, nn.Sequential(block), block), pyramid()
    expected = model(levels)
    accelerate(model)
    assert isinstance(model[0], AcceleratedDyConv)
    assert model[0] is model[2]
    inner = model[1]
    assert isinstance(inner, nn.Sequential)
    assert inner[0] is model[0]
    assert_close(model(levels), expected)


def test_high_offset_is_detected_and_can_be_given() -> None:
    levels = pyramid()
    assert {b.high_offset for b in fused(accelerate(main_model()))} == {"mmdet_main"}
    for make in (microsoft_model, glip_model, language_model, mmdet_model):
        assert {b.high_offset for b in fused(accelerate(make()))} == {"flat"}
    model = accelerate(main_model(), high_offset="flat")
    assert_close(run(model, levels), run(mmdet_model(), levels))
    aligned = accelerate(microsoft_model(), high_offset="aligned")
    assert "high_offset='aligned'" in repr(aligned)
    assert (run(aligned, levels)[0] - run(microsoft_model(), levels)[0]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="high_offset"):
        accelerate(microsoft_model(), high_offset="other")  # type: ignore[arg-type]


def test_a_forward_without_code_counts_as_released() -> None:
    class Callback:
        def __get__(self, instance: Any, owner: Any = None) -> Any:
            return self

        def __call__(self, x: Any) -> Any:
            return x

    block = type("DyHeadBlock", (mmdet.DyHeadBlockStructure,), {"forward": Callback()})
    model = nn.Sequential(block(CHANNELS, CHANNELS))
    assert {b.high_offset for b in fused(accelerate(model, verify=False))} == {"flat"}


def test_training_flag_and_groups_are_kept() -> None:
    model = randomised(glip.DyHead(CHANNELS, 2, groups=8))
    model.get_submodule("dyhead_tower.1").eval()
    for norm in (m for m in model.modules() if isinstance(m, nn.GroupNorm)):
        norm.eps = 1e-2
    levels = pyramid()
    expected = run(model, levels)
    accelerate(model)
    assert [block.training for block in fused(model)] == [True, False]
    assert_close(run(model, levels), expected)
    assert not any(m.training for m in model.eval().modules())


def test_hooks_on_blocks_and_around_them_still_fire() -> None:
    model, levels, calls = glip_model(), pyramid(), []
    tower = model.get_submodule("dyhead_tower")
    block = model.get_submodule("dyhead_tower.0")

    def forward_hook(module: nn.Module, args: Any, output: Any) -> Any:
        calls.append("forward")
        return [x * 2 for x in output]

    handle = block.register_forward_hook(forward_hook)
    block.register_forward_pre_hook(lambda module, args: calls.append("before"))
    tower.register_forward_hook(lambda module, args, output: calls.append("tower"))
    expected = run(model, levels)
    accelerate(model)
    assert len(fused(model)) == 2
    assert_close(run(model, levels), expected)
    assert calls == ["before", "forward", "tower"] * 2
    handle.remove()
    assert (run(model, levels)[0] - expected[0]).abs().max() > 1e-3
    assert calls == ["before", "forward", "tower"] * 2 + ["before", "tower"]


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("bare", [False, True])
def test_data_parallel(bare: bool) -> None:
    block, levels = randomised(glip.DyConv(CHANNELS, CHANNELS)), pyramid()
    expected, gradients = backward(block, levels)
    block.zero_grad()
    model = nn.parallel.DistributedDataParallel(block if bare else nn.Sequential(block))
    assert accelerate(model) is model
    assert len(fused(model)) == 1
    found, fast_gradients = backward(model, levels)
    assert_close(found, expected)
    assert len(fast_gradients) == len(gradients)
    assert_close(list(fast_gradients.values()), list(gradients.values()), 1e-8)


def test_torch_compile_runs_the_fused_block() -> None:
    block, levels = randomised(glip.DyConv(CHANNELS, CHANNELS)), pyramid()[-1:]
    expected = block(levels)
    fast = accelerate(block)
    with dyhead_cuda.backend("reference"):
        fast.compile(backend="eager")
        assert_close(fast(levels), expected)


def test_torch_compile_traces_the_parameter_lookup() -> None:
    block = accelerate(randomised(glip.DyConv(CHANNELS, CHANNELS)))
    assert isinstance(block, AcceleratedBlock)

    def total() -> Tensor:
        parameters = structure.block_parameters(block, block.code_base)
        return parameters.gate_weight.sum() + parameters.low.weight.sum()

    expected = total()
    torch.testing.assert_close(torch.compile(total, backend="eager", fullgraph=True)(), expected)


def test_summary_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "dyhead_cuda"):
        accelerate(mmdet_model())
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "accelerated 2 Dynamic Head blocks" in caplog.text
    assert "dyhead_blocks.0, dyhead_blocks.1" in caplog.text


def test_nothing_to_accelerate(caplog: pytest.LogCaptureFixture) -> None:
    class DyConv(nn.Module):
        """Another package's class of the same name."""

    model = nn.Sequential(nn.Linear(2, 2), DyConv())
    assert accelerate(model) is model
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "found no DyConv" in caplog.text
    assert "of such a name but made of other parts: 1 (DyConv)" in caplog.text
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got dict"):
        accelerate({})  # type: ignore[type-var]


def test_own_blocks_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    head = DyHead(16, 16, 2)
    assert accelerate(head) is head
    assert not fused(head)
    assert not caplog.records


def test_other_input_channels() -> None:
    block, levels = randomised(mmdet.DyHeadBlock(48, CHANNELS)), pyramid(48)
    expected = block(levels)
    fast = accelerate(block)
    assert isinstance(fast, AcceleratedDyHeadBlock)
    assert_close(fast(levels), expected)
