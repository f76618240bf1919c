"""What people attach to the modules inside a block acts, as in a model that is not fused."""

from __future__ import annotations

import copy
import logging
import pickle
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_full_backward_hook,
)
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from dyhead_cuda import DyHead, DyHeadBlock, DynamicReLU, UnifiedDyHead, plain
from tests.helpers.compare import assert_close, assert_gradients_close, gradients, leaf
from tests.helpers.modules import randomise
from tests.helpers.spy import calls_of_operators
from tests.helpers.unfused import (
    assert_equal_to,
    each_inner,
    features,
    make_block,
    make_head,
    no_hook,
)

# How often each is called for three levels, of which the first and the last have two branches.
CALLS = {
    **{f"{b}{part}": n for b, n in (("low", 2), ("mid", 3), ("high", 2)) for part in ("", ".norm")},
    "offset_conv": 3,
    "scale_gate": 7,
    "dynamic_relu": 3,
    "dynamic_relu.fc1": 3,
    "dynamic_relu.fc2": 3,
}
# --- hooks ----------------------------------------------------------------------------------------


@each_inner
def test_forward_hooks_fire_and_act(inner: str) -> None:
    block, seen = make_block(), Counter[str]()
    module = block.get_submodule(inner)
    before = block(features())
    module.register_forward_pre_hook(lambda *_: seen.update(["before"]))
    handle = module.register_forward_hook(lambda _module, _inputs, output: 2 * output)
    module.register_forward_hook(lambda *_: seen.update(["after"]))
    doubled = block(features())
    assert seen == {"before": CALLS[inner], "after": CALLS[inner]}
    assert any(not torch.allclose(a, b) for a, b in zip(before, doubled, strict=True))
    handle.remove()
    assert_close(block(features()), before)


@each_inner
def test_backward_hooks_fire(inner: str) -> None:
    block, seen = make_block(), Counter[str]()
    module = block.get_submodule(inner)
    module.register_full_backward_hook(lambda *_: seen.update(["backward"]))
    module.register_full_backward_pre_hook(lambda *_: seen.update(["before"]))
    gradients(block(features()), list(block.parameters()))
    assert seen == {"backward": CALLS[inner], "before": CALLS[inner]}


@pytest.mark.parametrize(
    "register",
    [
        register_module_forward_hook,
        register_module_forward_pre_hook,
        register_module_full_backward_hook,
    ],
)
@pytest.mark.parametrize("make", [make_head, lambda: DynamicReLU(4).double()])
def test_hooks_for_all_modules_fire(register: Callable[..., Any], make: Any) -> None:
    module, seen = make(), []
    inputs = features() if isinstance(module, DyHead) else features()[0]
    plain = module(inputs)
    handle = register(lambda module, *_: seen.append(type(module).__name__))
    try:
        outs = module(inputs)
        gradients(outs, list(module.parameters()))
    finally:
        handle.remove()
    assert_close(outs, plain)
    expected = {"Linear"} if isinstance(module, DynamicReLU) else {"Linear", "GroupNorm", "Conv2d"}
    assert expected <= set(seen)


def test_hooks_survive_copies() -> None:
    block = make_block()
    block.high.norm.register_forward_hook(no_hook)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert "high.norm has hooks" in (other.unfused_reason() or "")


# --- adapters and replaced modules ----------------------------------------------------------------


class LowRank(nn.Module):
    """An adapter around a layer, as those of LoRA."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False).to(base.weight)
        self.up = nn.Linear(rank, base.out_features, bias=False).to(base.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))

    def merged(self) -> Tensor:
        return self.base.weight + self.up.weight @ self.down.weight


@pytest.mark.parametrize("place", ["scale_gate", "dynamic_relu.fc1", "dynamic_relu.fc2"])
def test_adapters_act_and_learn(place: str) -> None:
    block = make_block()
    adapter = LowRank(block.get_submodule(place))  # type: ignore[arg-type]
    parent, _, name = place.rpartition(".")
    setattr(block.get_submodule(parent), name, adapter)
    outs = block(features())
    grads = gradients(outs, [adapter.down.weight, adapter.up.weight])
    assert all(g.abs().max() > 0 for g in grads)

    merged = make_block()
    with torch.no_grad():
        merged.get_parameter(f"{place}.weight").copy_(adapter.merged())
    assert_close(outs, merged(features()))


def test_a_forward_of_an_instance_acts() -> None:
    block = make_block()
    original = block.offset_conv.forward
    block.offset_conv.forward = lambda x: original(x).mul(0)  # type: ignore
    expected = make_block()
    with torch.no_grad():
        for parameter in expected.offset_conv.parameters():
            parameter.zero_()
    assert_close(block(features()), expected(features()))


def test_a_forward_that_was_replaced_in_its_class_acts(monkeypatch: pytest.MonkeyPatch) -> None:
    block, expected = make_block(), make_block()(features())
    calls = []
    original = nn.Linear.forward

    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        calls.append(x.shape)
        return original(self, x)

    monkeypatch.setattr(nn.Linear, "forward", forward)
    assert_close(block(features()), expected)
    assert len(calls) == 7 + 2 * 3


def test_another_class_is_called() -> None:
    class Branch(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: Tensor, offset: Tensor, mask: Tensor, stride: int = 1) -> Tensor:
            return self.base(x, torch.zeros_like(offset), mask, stride)

    block, expected = make_block(), make_block()
    block.mid = Branch(block.mid)  # type: ignore[assignment]
    outs, plain = block(features()), expected(features())
    assert any(not torch.allclose(a, b) for a, b in zip(outs, plain, strict=True))
    assert "mid is a tests.test_attached" in (block.unfused_reason() or "")


def replace_norm(block: DyHeadBlock) -> None:
    block.low.norm = nn.BatchNorm2d(8).double()  # type: ignore[assignment]


def change_eps(block: DyHeadBlock) -> None:
    block.low.norm.eps = 1.0


def change_groups(block: DyHeadBlock) -> None:
    norm = nn.GroupNorm(4, 8).double()
    norm.load_state_dict(block.mid.norm.state_dict())
    block.mid.norm = norm


def without_affine(block: DyHeadBlock) -> None:
    block.mid.norm = nn.GroupNorm(2, 8, affine=False).double()


def dilate(block: DyHeadBlock) -> None:
    block.offset_conv.dilation, block.offset_conv.padding = (2, 2), (2, 2)


def reflect(block: DyHeadBlock) -> None:
    conv = nn.Conv2d(4, 27, 3, padding=1, padding_mode="reflect").double()
    conv.load_state_dict(block.offset_conv.state_dict())
    block.offset_conv = conv


def other_activation(block: DyHeadBlock) -> None:
    block.dynamic_relu.activation = "sigmoid"


def without_bias(block: DyHeadBlock) -> None:
    block.dynamic_relu.fc1 = nn.Linear(8, 2, bias=False).double()


def one_branch_without_bias(block: DyHeadBlock) -> None:
    block.low.bias = None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (replace_norm, "low.norm is a torch.nn.modules.batchnorm.BatchNorm2d, not a GroupNorm"),
        (change_eps, "low.norm has eps=1.0, not 1e-05"),
        (change_groups, "mid.norm has num_groups=4, not 2"),
        (without_affine, "mid.norm has no weight"),
        (dilate, r"offset_conv has padding=\(2, 2\), not \(1, 1\)"),
        (reflect, "offset_conv has padding_mode='reflect', not 'zeros'"),
        (other_activation, "dynamic_relu has activation='sigmoid', not 'hsigmoid'"),
        (without_bias, "dynamic_relu.fc1 has no bias"),
        (one_branch_without_bias, "some of its branches have a bias and some have none"),
    ],
)
def test_settings_of_inner_modules_act(
    change: Callable[[DyHeadBlock], None], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    block, expected = make_block(), make_block()(features())
    change(block)
    with caplog.at_level(logging.WARNING, "dyhead_cuda"):
        outs = block(features())
    assert any(not torch.allclose(a, b) for a, b in zip(outs, expected, strict=True))
    (record,) = caplog.records
    assert re.search(reason, record.getMessage())


# --- weights that are computed --------------------------------------------------------------------


def train(block: nn.Module, steps: int = 2) -> None:
    optimizer = torch.optim.SGD(block.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.stack([x.square().mean() for x in block(features())]).sum().backward()
        optimizer.step()


PRUNED = (("mid", "weight"), ("low.norm", "weight"), ("offset_conv", "weight"))
LAYERS = ("mid", "offset_conv", "scale_gate", "dynamic_relu.fc1")


@pytest.mark.parametrize(("place", "name"), PRUNED)
def test_pruning(place: str, name: str) -> None:
    block = make_block()
    module = block.get_submodule(place)
    prune.random_unstructured(module, name, 0.5)
    mask = dict(module.named_buffers())[f"{name}_mask"]
    train(block)
    assert (getattr(module, name)[mask == 0] == 0).all()
    outs = block(features())
    prune.remove(module, name)
    assert block.unfused_reason() is None
    assert_close(block(features()), outs)


@pytest.mark.parametrize("place", LAYERS)
@pytest.mark.parametrize("old", [weight_norm, spectral_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_the_old_weight_and_spectral_norm_are_live(place: str, old: Callable[..., Any]) -> None:
    block = make_block()
    module = block.get_submodule(place)
    old(module)
    train(block)
    block.eval()
    outs = block(features())
    weight = module.weight.detach().clone()  # type: ignore[operator]
    plain = make_block()
    plain.load_state_dict(
        {k: v for k, v in block.state_dict().items() if k in plain.state_dict()}, strict=False
    )
    with torch.no_grad():
        plain.get_parameter(f"{place}.weight").copy_(weight)
    assert_close(outs, plain(features()))


@pytest.mark.parametrize("place", LAYERS)
@pytest.mark.parametrize("new", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrizations_stay_fused_and_live(place: str, new: Callable[..., Any]) -> None:
    block = make_block()
    module = block.get_submodule(place)
    new(module)
    assert block.unfused_reason() is None
    train(block)
    block.eval()
    outs = block(features())
    handle = module.register_forward_hook(no_hook)  # now it runs module by module
    assert_close(block(features()), outs)
    handle.remove()
    assert calls_of_operators(block, features())["fuse_branches_fwd"] == 1


def test_dynamic_quantization() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.fc = DyHead(4, 8, 2, num_groups=2), nn.Linear(8, 3)

        def forward(self, levels: list[Tensor]) -> Tensor:
            return self.fc(self.head(levels)[0].mean((2, 3)))

    net = Net().eval()
    randomise(net)
    levels = features(torch.float32)
    quantized = torch.ao.quantization.quantize_dynamic(net, {nn.Linear})
    assert "quantized" in type(quantized.head.blocks[0].dynamic_relu.fc1).__module__
    expected = net(levels)
    difference = (quantized(levels) - expected).norm() / expected.norm()
    assert 0 < difference < 0.05


# --- the log --------------------------------------------------------------------------------------


def test_the_log_says_once_which_block_and_why(caplog: pytest.LogCaptureFixture) -> None:
    head = make_head()
    with caplog.at_level(logging.WARNING, "dyhead_cuda"):
        head(features())
        assert not caplog.records
        head.get_submodule("blocks.1.mid").register_forward_hook(no_hook)
        for _ in range(3):
            head(features())
        (record,) = caplog.records
        assert "Block 1 of a DyHead is not fused" in record.getMessage()
        assert "mid has hooks" in record.getMessage()
        change_eps(head.blocks[2])  # type: ignore[arg-type]
        head(features())
        head(features())
        assert ["Block 2" in r.getMessage() for r in caplog.records] == [False, True]


# --- a head hands rows from block to block --------------------------------------------------------


@pytest.mark.parametrize("grad", [True, False])
def test_rows_go_from_block_to_block_without_a_copy(grad: bool) -> None:
    head = make_head()
    with torch.set_grad_enabled(grad):
        calls = calls_of_operators(head, features())
    assert calls["pack_levels"] == calls["unpack_levels"] == 1
    assert calls["fuse_branches_fwd"] == 3


@pytest.mark.parametrize("container", [list, tuple, lambda x: dict(zip("abc", x, strict=True))])
def test_hooks_between_blocks_see_the_levels(container: Callable[..., Any]) -> None:
    head, levels = make_head(), features()
    between = head.blocks[0](levels)
    seen: list[Any] = []
    head.blocks[0].register_forward_hook(lambda _m, _i, output: seen.append(output))
    outs = head(container(levels))
    (output,) = seen
    assert type(output) is type(container(levels))
    values = output.values() if isinstance(output, dict) else output
    assert_close(list(values), between)
    values = outs.values() if isinstance(outs, dict) else outs
    assert_close(list(values), make_head()(levels))


def test_hooks_between_blocks_act_on_values_and_gradients() -> None:
    head = make_head()
    head.blocks[1].register_forward_pre_hook(lambda _m, inputs: ([2 * x for x in inputs[0]],))
    levels = [leaf(x) for x in features()]
    outs = head(levels)
    plain, again = make_head(), [leaf(x) for x in features()]
    middle = [2 * x for x in plain.blocks[0](again)]
    expected = plain.blocks[2](plain.blocks[1](middle))
    assert_close(outs, expected)
    assert_gradients_close(gradients(outs, levels), gradients(expected, again))


def test_blocks_that_are_something_else_are_called() -> None:
    class Doubled(DyHeadBlock):
        def forward(self, levels: Any) -> Any:
            return [2 * x for x in super().forward(levels)]

    head, levels = make_head(), features()
    doubled = Doubled(8, 8, num_groups=2).double()
    doubled.load_state_dict(head.blocks[1].state_dict())
    head.blocks[1] = doubled
    plain = make_head()
    expected = plain.blocks[2]([2 * x for x in plain.blocks[1](plain.blocks[0](levels))])
    assert_close(head(levels), expected)

    replaced = make_head()
    original = replaced.blocks[1].forward
    replaced.blocks[1].forward = lambda x: [2 * y for y in original(x)]
    assert_close(replaced(levels), expected)


def test_blocks_of_other_settings_run_on_their_own() -> None:
    head, levels = make_head(), features()
    head.blocks[1].high_offset = "crop"  # type: ignore[assignment]
    expected: Any = levels
    for block in head.blocks:
        expected = block(expected)
    assert_close(head(levels), expected)
    assert calls_of_operators(head, levels)["pack_levels"] == 3


# --- recompute, the other modules, torch.compile --------------------------------------------------


def test_recompute_changes_no_numbers_and_hooks_fire_once() -> None:
    plain, seen = make_head(), []
    head = make_head(recompute=True)
    for block in head.blocks:
        block.get_submodule("offset_conv").register_forward_hook(lambda *_: seen.append(1))
    assert_equal_to(head, plain)
    assert len(seen) == 3 * 3


@pytest.mark.parametrize("activation", ["hsigmoid", "sigmoid"])
@pytest.mark.parametrize("shape", [(2, 8), (2, 8, 5), (2, 8, 4, 5), (0, 8, 4, 5), (2, 8, 0, 5)])
def test_a_dynamic_relu_on_its_own(activation: Any, shape: tuple[int, ...]) -> None:
    plain = DynamicReLU(8, activation=activation).double()
    randomise(plain)
    relu, seen = copy.deepcopy(plain), []
    relu.fc1.register_forward_hook(lambda *_: seen.append(1))
    x, again = (leaf(torch.randn(shape, dtype=torch.float64)) for _ in range(2))
    again.data.copy_(x.data)
    outs, expected = relu(x), plain(again)
    assert_close(outs, expected)
    assert len(seen) == (x.shape[2:].numel() > 0)
    if x.numel():
        grads = gradients(outs, [x, *relu.parameters()])
        assert_gradients_close(grads, gradients(expected, [again, *plain.parameters()]))


@pytest.mark.parametrize(
    "inner", ["scale", "offset_conv", "dynamic_relu", "dynamic_relu.fc1", "dynamic_relu.fc2"]
)
@pytest.mark.parametrize("targets", ["all", "median"])
def test_a_unified_head(inner: str, targets: Any) -> None:
    plain = UnifiedDyHead(3, 8, 1 if targets == "median" else 2, targets=targets).double()
    randomise(plain)
    head, seen = copy.deepcopy(plain), []
    head.blocks[0].get_submodule(inner).register_forward_hook(lambda *_: seen.append(1))
    f = torch.randn(2, 3, 8, 4, 5, dtype=torch.float64)
    outs, expected = head(f), plain(f)
    assert len(seen) == (3 if inner == "offset_conv" and targets == "all" else 1)
    assert_close(outs, expected)
    assert_gradients_close(
        gradients(outs, list(head.parameters())), gradients(expected, list(plain.parameters()))
    )


def test_torch_compile_follows_hooks() -> None:
    block = make_block()
    block.offset_conv.register_forward_hook(lambda _m, _i, output: 0.5 * output)
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="eager")
    assert_close(compiled(features()), block(features()))


@pytest.fixture(autouse=True)
def no_hooks_are_left() -> Iterator[None]:
    yield
    assert plain.hooks_everywhere() is None
