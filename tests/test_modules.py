"""The modules: stacking, containers, copies and types, and what their constructors refuse."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import DeformConv2d

from dyhead_cuda import (
    DyHead,
    DyHeadBlock,
    DynamicReLU,
    ModulatedDeformConv2d,
    UnifiedDyHead,
    backend,
    reference,
)
from dyhead_cuda.pyramid import HIGH_OFFSETS, HighOffset
from tests.helpers.compare import TOLERANCE, assert_close, assert_gradients_close, gradients, leaf
from tests.helpers.inputs import halving_sizes, random_pyramid
from tests.helpers.modules import MODULES, as_list, randomise


def small_head(**options: Any) -> DyHead:
    """Two blocks in float64 whose parameters are all random: no zero offsets, gates or biases."""
    head = DyHead(4, 8, 2, **{"num_groups": 2, **options}).double()
    randomise(head)
    return head


def small_features(levels: int = 3, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return random_pyramid(2, 4, halving_sizes(7, 6, levels), dtype)


def layer_by_layer(head: DyHead, features: list[Tensor]) -> list[Tensor]:
    for block in head.blocks:
        assert isinstance(block, DyHeadBlock)
        features = reference.pyramid_block(
            features,
            block.parameters_tuple(),
            high_offset=block.high_offset,
            num_groups=block.num_groups,
            eps=block.eps,
        )
    return features


# --- the head -------------------------------------------------------------------------------------


@pytest.mark.parametrize("high_offset", HIGH_OFFSETS)
@pytest.mark.parametrize("deform_bias", [True, False])
def test_head_is_its_blocks_in_turn(high_offset: HighOffset, deform_bias: bool) -> None:
    head = small_head(high_offset=high_offset, deform_bias=deform_bias)
    features = [leaf(x) for x in small_features()]
    actual, expected = head(features), layer_by_layer(head, features)
    assert_close(actual, expected)
    inputs = [*features, *head.parameters()]
    assert_gradients_close(gradients(actual, inputs), gradients(expected, inputs))


@pytest.mark.parametrize("levels", [1, 2, 5])
def test_any_number_of_levels(levels: int) -> None:
    head, features = small_head(), small_features(levels)
    assert_close(head(features), layer_by_layer(head, features))


def test_eps_and_groups_are_used() -> None:
    features = small_features()
    plain = small_head()(features)
    for options in ({"eps": 0.1}, {"num_groups": 4}):
        head = small_head(**options)
        out = head(features)
        assert_close(out, layer_by_layer(head, features))
        assert (out[0] - plain[0]).abs().max() > 1e-3


def test_reduction_is_used() -> None:
    assert DyHead(4, 8, 1, num_groups=2, reduction=2).get_parameter(
        "blocks.0.dynamic_relu.fc1.weight"
    ).shape == (4, 8)
    assert DynamicReLU(3, reduction=8).fc1.weight.shape == (1, 3)


def test_empty_batch() -> None:
    head = small_head()
    outs = head([x[:0] for x in small_features()])
    assert [x.shape for x in outs] == [(0, 8, *size) for size in halving_sizes(7, 6, 3)]
    sum(x.sum() for x in outs).backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in head.parameters())


@pytest.mark.parametrize("layout", ["channels_last", "sliced"])
def test_layout_does_not_matter(layout: str) -> None:
    head, features = small_head(), small_features()
    strange = [
        x.contiguous(memory_format=torch.channels_last)
        if layout == "channels_last"
        else torch.cat([x, x + 1e3], 3)[..., : x.shape[3]]
        for x in features
    ]
    assert_close(head(strange), layer_by_layer(head, features))


class Levels(NamedTuple):
    p3: Tensor
    p4: Tensor
    p5: Tensor


CONTAINERS: dict[str, Callable[[list[Tensor]], Any]] = {
    "list": list,
    "tuple": tuple,
    "dict": lambda levels: dict(zip("abc", levels, strict=True)),
    "ordered dict": lambda levels: OrderedDict(zip("cab", levels, strict=True)),
    "default dict": lambda levels: defaultdict(list, zip("abc", levels, strict=True)),
    "named tuple": lambda levels: Levels(*levels),
}


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize("make", [small_head, lambda: small_head().blocks[0]])
def test_the_same_container_comes_back(kind: str, make: Callable[[], nn.Module]) -> None:
    module, levels = make(), small_features()
    features = CONTAINERS[kind](levels)
    out = module(features)
    assert type(out) is type(features)
    values = list(out.values()) if isinstance(features, dict) else list(out)
    if isinstance(features, dict):
        assert list(out) == list(features)
        assert list(features.values()) == levels
    assert_close(values, list(module(levels)))


def test_a_mapping_that_is_no_dict() -> None:
    features = dict(zip("abc", small_features(), strict=True))
    head = small_head()
    out = head(MappingProxyType(features))
    assert list(out) == ["a", "b", "c"]
    assert_close(out["b"], head(features)["b"])


@pytest.mark.parametrize("bad", [torch.zeros(1, 4, 4, 4), "features", None, 3])
def test_what_is_no_container(bad: Any) -> None:
    with pytest.raises(TypeError, match=r"expected a list, tuple or dict of feature maps"):
        small_head()(bad)


def test_second_derivatives_through_the_reference() -> None:
    # One block: a second derivative of two takes seconds.
    head = DyHead(2, 4, 1, num_groups=2).double()
    randomise(head)
    features = [leaf(x) for x in random_pyramid(1, 2, halving_sizes(3, 2, 2))]

    def run(*levels: Tensor) -> tuple[Tensor, ...]:
        with backend("reference"):
            return head(levels)

    assert torch.autograd.gradgradcheck(run, features, fast_mode=True)
    grads = torch.autograd.grad(
        [x.sum() for x in run(*features)], list(head.parameters()), create_graph=True,
        materialize_grads=True,
    )  # fmt: skip
    norm = torch.stack([g.square().sum() for g in grads]).sum()
    second = torch.autograd.grad(norm, features)
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in second)


def test_gradcheck_of_the_head() -> None:
    head = DyHead(2, 4, 1, num_groups=2).double()
    randomise(head)
    features = [leaf(x) for x in random_pyramid(1, 2, halving_sizes(3, 2, 2))]
    assert torch.autograd.gradcheck(lambda *x: head(x), features, fast_mode=True)


@pytest.mark.parametrize("levels", [1, 2])
def test_head_compiles_in_one_graph(levels: int) -> None:
    head = DyHead(4, 8, 1, num_groups=2).double()
    randomise(head)
    features = [leaf(x) for x in small_features(levels)]
    torch._dynamo.reset()
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    actual, expected = compiled(features), head(features)
    assert_close(actual, expected)
    inputs = [*features, *head.parameters()]
    got = torch.autograd.grad([x.square().sum() for x in actual], inputs, materialize_grads=True)
    want = torch.autograd.grad([x.square().sum() for x in expected], inputs, materialize_grads=True)
    assert_gradients_close(got, want)


def test_unified_head_compiles_in_one_graph() -> None:
    head = UnifiedDyHead(levels=2, channels=4, num_blocks=1).double()
    features = torch.randn(1, 2, 4, 3, 5, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    assert_close(compiled(features), head(features))


def test_a_training_step_changes_every_parameter() -> None:
    head = small_head()
    before = [p.detach().clone() for p in head.parameters()]
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    outs = head(small_features())
    torch.stack([x.square().mean() for x in outs]).sum().backward()
    optimizer.step()
    changed = [not torch.equal(a, b) for a, b in zip(before, head.parameters(), strict=True)]
    assert all(changed), [n for n, c in zip(head.state_dict(), changed, strict=True) if not c]


# --- copies, types --------------------------------------------------------------------------------


modules = pytest.mark.parametrize("name", MODULES)


def cast(arguments: Any, dtype: torch.dtype) -> Any:
    if isinstance(arguments, Tensor):
        return arguments.to(dtype)
    return type(arguments)(cast(value, dtype) for value in arguments)


@modules
def test_pickle_deepcopy_and_state_dict(name: str) -> None:
    make, inputs = MODULES[name]
    module, arguments = make(), inputs()
    randomise(module)
    expected = as_list(module(*arguments))
    fresh = make()
    assert not torch.equal(as_list(fresh(*arguments))[0], expected[0])
    fresh.load_state_dict(module.state_dict(), strict=True)
    for other in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module), fresh):
        assert repr(other) == repr(module)
        assert list(other.state_dict()) == list(module.state_dict())
        for a, b in zip(as_list(other(*arguments)), expected, strict=True):
            assert torch.equal(a, b)
        assert not {p.data_ptr() for p in other.parameters()} & {
            p.data_ptr() for p in module.parameters()
        }


@modules
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_moving_between_types(name: str, dtype: torch.dtype) -> None:
    make, inputs = MODULES[name]
    module, arguments = make(), cast(inputs(), dtype)
    randomise(module)
    module.to(dtype)
    out = as_list(module(*arguments))
    assert {t.dtype for t in (*out, *module.parameters())} == {dtype}
    exact = copy.deepcopy(module).double()
    with backend("reference"):
        expected = as_list(exact(*cast(arguments, torch.float64)))
    # Two blocks with a rounding to the small type between them.
    assert_close(out, expected, dtype, factor=5)


@modules
def test_train_and_eval_are_alike(name: str) -> None:
    make, inputs = MODULES[name]
    module, arguments = make(), inputs()
    expected = as_list(module.train()(*arguments))
    for a, b in zip(as_list(module.eval()(*arguments)), expected, strict=True):
        assert torch.equal(a, b)


@modules
def test_frozen_parameters_get_no_gradient(name: str) -> None:
    make, inputs = MODULES[name]
    module = make().requires_grad_(False)
    assert not any(t.requires_grad for t in as_list(module(*inputs())))


@modules
def test_meta_device(name: str) -> None:
    make, inputs = MODULES[name]
    module, arguments = make(), inputs()
    shapes = [t.shape for t in as_list(module(*arguments))]

    def to_meta(value: Any) -> Any:
        return value.to("meta") if isinstance(value, Tensor) else [x.to("meta") for x in value]

    out = as_list(module.to("meta")(*map(to_meta, arguments)))
    assert [t.shape for t in out] == shapes
    assert {t.device.type for t in out} == {"meta"}


def test_repr_tells_the_settings() -> None:
    head = repr(DyHead(4, 8, 2, num_groups=2, high_offset="crop"))
    assert "DyHeadBlock(" in head
    assert "4, 8, high_offset='crop', upsample='bilinear', num_groups=2" in head
    assert "8, activation='hsigmoid'" in head
    convolution = ModulatedDeformConv2d(4, 6, 3, stride=2, padding=1, deform_groups=2, bias=False)
    assert "4, 6, kernel_size=(3, 3), stride=2, padding=1" in repr(convolution)
    assert "deform_groups=2, bias=False" in repr(convolution)
    assert "8, activation='sigmoid'" in repr(UnifiedDyHead(3, 8, 1))


# --- the small modules ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 8), (3, 8, 5), (2, 8, 4, 5), (2, 8, 3, 4, 5)])
def test_dynamic_relu_takes_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    module = DynamicReLU(8).double()
    x = torch.randn(shape, dtype=torch.float64)
    expected = reference.dynamic_relu(
        x, module.fc1.weight, module.fc1.bias, module.fc2.weight, module.fc2.bias
    )
    assert_close(module(x), expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mask", [True, False])
def test_deformable_convolution_equals_torchvisions(bias: bool, mask: bool) -> None:
    settings: dict[str, Any] = {
        "kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2),
        "groups": 2, "bias": bias,
    }  # fmt: skip
    theirs = DeformConv2d(4, 6, **settings).double()
    ours = ModulatedDeformConv2d(4, 6, deform_groups=2, **settings).double()
    assert [(k, v.shape) for k, v in ours.state_dict().items()] == [
        (k, v.shape) for k, v in theirs.state_dict().items()
    ]
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    offset = 2 * torch.randn(2, 2 * 2 * 6, 4, 4, dtype=torch.float64)
    modulation = torch.rand(2, 2 * 6, 4, 4, dtype=torch.float64) if mask else None
    assert_close(ours(x, offset, modulation), theirs(x, offset, modulation))


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DyHead(16, 16, 0), "num_blocks.*got 0"),
        (lambda: DyHead(16, 24, 1), "out_channels divisible by num_groups, got 24 .* 16 groups"),
        (lambda: DyHead(16, 16, 1, num_groups=0), "num_groups.*0"),
        (lambda: DyHead(0, 16, 1), "in_channels.*got 0"),
        (lambda: DyHead(16, 16, 1, reduction=0), "reduction.*got 0"),
        (lambda: DyHead(16, 16, 1, high_offset="natural"), "high_offset to be one of.*'natural'"),  # type: ignore[arg-type]
        (lambda: DyHead(16, 16, 1, init="glip"), "init to be one of.*'glip'"),  # type: ignore[arg-type]
        (lambda: DynamicReLU(0), "channels.*got 0"),
        (lambda: DynamicReLU(8, 0), "reduction.*got 0"),
        (lambda: DynamicReLU(8, activation="relu"), "activation to be one of.*'relu'"),  # type: ignore[arg-type]
        (lambda: ModulatedDeformConv2d(5, 6, 3, groups=2), "in_channels divisible by 2.*got 5"),
        (lambda: ModulatedDeformConv2d(6, 5, 3, groups=2), "out_channels divisible by 2.*got 5"),
        (lambda: ModulatedDeformConv2d(4, 6, 3, deform_groups=3), "by 3 deformable.*got 4"),
        (lambda: ModulatedDeformConv2d(4, 4, 3, groups=0), "groups.*got 0"),
        (lambda: UnifiedDyHead(0, 4, 1), "levels.*got 0"),
        (lambda: UnifiedDyHead(3, 0, 1), "channels.*got 0"),
    ],
)
def test_constructors_refuse(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_head_refuses_features_that_do_not_fit() -> None:
    head, features = small_head(), small_features()
    with pytest.raises(ValueError, match=r"at least one level"):
        head([])
    with pytest.raises(ValueError, match=r"level 0 of shape \[N, 4, H, W\].*got \[2, 5, 7, 6\]"):
        head([torch.randn(2, 5, 7, 6).double(), *features[1:]])
    with pytest.raises(ValueError, match=r"level 1 of size 4x3 .*got 3x3"):
        head([features[0], features[1][:, :, :3], features[2]])
    with pytest.raises(ValueError, match=r"batch 2 on every level.*got 1 on level 2"):
        head([*features[:2], features[2][:1]])
    with pytest.raises(ValueError, match=r"float64.*on every level.*got torch.float32.*level 1"):
        head([features[0], features[1].float(), features[2]])
    with pytest.raises(ValueError, match=r"floating-point"):
        head([x.long() for x in features])
    with pytest.raises(ValueError, match=r"on cpu.*got meta"):
        small_head().to("meta")(features)
