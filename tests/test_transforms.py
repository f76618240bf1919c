"""Transforms of torch.func and forward-mode derivatives: right, on whichever path."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from dyhead_cuda import DyHead, backend, backends
from dyhead_cuda.pyramid import HIGH_OFFSETS, HighOffset
from tests.helpers.compare import assert_close, assert_gradients_close, gradients, random_like
from tests.helpers.inputs import halving_sizes, random_pyramid
from tests.helpers.modules import MODULES, as_list, randomise
from tests.helpers.spy import calls_of_operators

each_module = pytest.mark.parametrize("name", MODULES)
Parameters = dict[str, Tensor]


def module_of(name: str) -> tuple[torch.nn.Module, Parameters, tuple[Any, ...]]:
    """A module in float64, its parameters, and inputs for it."""
    module = MODULES[name][0]().double()
    randomise(module)

    def double(x: Any) -> Any:
        return [double(y) for y in x] if isinstance(x, list) else x.double()

    parameters = {key: p.detach() for key, p in module.named_parameters()}
    return module, parameters, tuple(map(double, MODULES[name][1]()))


def weighted(x: Tensor) -> Tensor:
    """``x`` times numbers that differ everywhere; vmap refuses random ones."""
    return x * torch.arange(x.numel(), dtype=x.dtype).add(1).sin().view(x.shape)


def loss_of(outs: Any) -> Tensor:
    """A number with different gradients everywhere."""
    return torch.stack([weighted(x).sum() for x in as_list(outs)]).sum()


def values(parameters: Parameters) -> list[Tensor]:
    return list(parameters.values())


@each_module
def test_grad(name: str) -> None:
    module, parameters, inputs = module_of(name)

    def loss(parameters: Parameters) -> Tensor:
        return loss_of(functional_call(module, parameters, inputs))

    found = grad(loss)(parameters)
    expected = torch.autograd.grad(loss_of(module(*inputs)), list(module.parameters()))
    assert list(found) == list(parameters)
    assert_gradients_close(values(found), expected)
    assert any("bwd" in call for call in calls_of_operators(grad(loss), parameters))


@pytest.mark.parametrize("high_offset", HIGH_OFFSETS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_per_sample_gradients(high_offset: HighOffset, layout: torch.memory_format) -> None:
    head = DyHead(4, 8, 2, num_groups=2, high_offset=high_offset).double()
    randomise(head)
    levels = random_pyramid(3, 4, halving_sizes(7, 6, 3))
    levels = [x.contiguous(memory_format=layout) for x in levels]
    parameters = {key: p.detach() for key, p in head.named_parameters()}

    def loss(parameters: Parameters, *levels: Tensor) -> Tensor:
        return loss_of(functional_call(head, parameters, ([x[None] for x in levels],)))

    found = vmap(grad(loss), (None, *(0,) * len(levels)))(parameters, *levels)
    for i in range(3):
        outs = head([x[i : i + 1] for x in levels])
        expected = torch.autograd.grad(loss_of(outs), list(head.parameters()))
        assert_gradients_close([g[i] for g in values(found)], expected)


@each_module
def test_ensembles(name: str) -> None:
    module, parameters, inputs = module_of(name)
    several = {key: torch.stack([p, 1.1 * p, 0.9 * p]) for key, p in parameters.items()}

    def run(parameters: Parameters) -> list[Tensor]:
        return as_list(functional_call(module, parameters, inputs))

    def loss(several: Parameters) -> Tensor:
        return vmap(lambda parameters: loss_of(run(parameters)))(several).sum()

    found = vmap(run)(several)
    gradient = grad(loss)(several)
    for i in range(3):
        one = {key: p[i] for key, p in several.items()}
        assert_close([x[i] for x in found], run(one))
        expected = grad(lambda parameters: loss_of(run(parameters)))(one)
        assert_gradients_close([g[i] for g in values(gradient)], values(expected))


@pytest.mark.parametrize("name", ["DyHead", "UnifiedDyHead"])
def test_with_recompute(name: str) -> None:
    module, parameters, inputs = module_of(name)

    def loss(parameters: Parameters) -> Tensor:
        return loss_of(functional_call(module, parameters, inputs))

    expected = grad(loss)(parameters)
    for block in module.get_submodule("blocks").children():
        block.recompute = True  # type: ignore[assignment]
    assert_gradients_close(values(grad(loss)(parameters)), values(expected))
    several = {key: torch.stack([p, p]) for key, p in parameters.items()}
    both = vmap(grad(loss))(several)
    assert_gradients_close([g[1] for g in values(both)], values(expected))


@pytest.mark.parametrize("dims", [0, 1, -1])
def test_vmap_over_any_dimension(dims: int) -> None:
    module, _, (x, offset, mask) = module_of("ModulatedDeformConv2d")
    several = torch.stack([x, 2 * x, x - 1], dims)
    found = vmap(lambda x: module(x, offset, mask), dims, 1)(several)
    expected = torch.stack([module(y, offset, mask) for y in several.unbind(dims)], 1)
    assert_close(found, expected)


@each_module
def test_vmap_folds_the_batch(name: str) -> None:
    """Into the images: as many calls of operators as without it."""
    module, _, inputs = module_of(name)

    def batched(x: Any, of: Callable[[Tensor], Tensor]) -> Any:
        return [batched(y, of) for y in x] if isinstance(x, list) else of(x)

    several = batched(list(inputs), lambda x: torch.stack([x, 0.9 * x, x.flip(0)]))

    def loss(*inputs: Any) -> Tensor:
        return loss_of(module(*inputs))

    def run(*inputs: Any) -> list[Tensor]:
        return as_list(module(*inputs))

    found, gradient = vmap(run)(*several), vmap(grad(loss))(*several)
    for i in range(3):
        one = batched(several, partial(torch.select, dim=0, index=i))
        assert_close([x[i] for x in found], run(*one))
        expected = as_list(grad(loss)(*one))
        assert_gradients_close([g[i] for g in as_list(gradient)], expected)
    assert calls_of_operators(vmap(run), *several) == calls_of_operators(run, *inputs)
    folded = calls_of_operators(vmap(grad(loss)), *several)
    assert folded == calls_of_operators(grad(loss), *inputs)


def test_vmap_of_vmap() -> None:
    module, _, (x,) = module_of("DynamicReLU")
    several = torch.stack([torch.stack([x, 2 * x]), torch.stack([x - 1, x * x])])
    found = vmap(vmap(module))(several)
    expected = torch.stack([torch.stack([module(z) for z in y]) for y in several])
    assert_close(found, expected)


@each_module
def test_reverse_jacobians(name: str) -> None:
    module, _, inputs = module_of(name)
    x = inputs[0][-1] if isinstance(inputs[0], list) else inputs[0]

    def run(x: Tensor) -> Tensor:
        first = [*inputs[0][:-1], x] if isinstance(inputs[0], list) else x
        out = as_list(module(first, *inputs[1:]))[-1]
        return weighted(out).flatten(1).sum(1)

    expected = torch.autograd.functional.jacobian(run, x)
    assert_gradients_close([jacrev(run)(x)], [expected])
    pull = vjp(run, x)[1]
    cotangent = torch.tensor([2.0, -1.0], dtype=torch.float64)
    (pulled,) = pull(cotangent)
    assert_gradients_close([pulled], [torch.einsum("n,n...->...", cotangent, expected)])


def jvp_by_dual_level(run: Callable[[Tensor], Tensor], x: Tensor, tangent: Tensor) -> Tensor:
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(run(forward_ad.make_dual(x, tangent))).tangent
    assert found is not None, "the tangent is lost"
    return found


def jvp_by_transform(run: Callable[[Tensor], Tensor], x: Tensor, tangent: Tensor) -> Tensor:
    return jvp(run, (x,), (tangent,))[1]


def jvp_by_jacobian(run: Callable[[Tensor], Tensor], x: Tensor, tangent: Tensor) -> Tensor:
    return (jacfwd(run)(x) * tangent).flatten(1).sum(1)


@each_module
@pytest.mark.parametrize("how", [jvp_by_dual_level, jvp_by_transform, jvp_by_jacobian])
def test_forward_mode_is_right(name: str, how: Callable[..., Tensor]) -> None:
    module, _, inputs = module_of(name)
    x = inputs[0][-1][:, :2, :2] if isinstance(inputs[0], list) else inputs[0][..., :1]
    shift = random_like(x, seed=5)[0]

    def run(part: Tensor) -> Tensor:
        """Of a part of the input, which a Jacobian takes in little time."""
        if isinstance(inputs[0], list):
            last = inputs[0][-1]
            part = torch.nn.functional.pad(part, (0, 0, 0, last.shape[2] - 2, 0, last.shape[1] - 2))
            first: Any = [*inputs[0][:-1], last + part]
        else:
            first = inputs[0] + part
        out = as_list(module(first, *inputs[1:]))[-1]
        return weighted(out).flatten(1).sum(1)

    start = torch.zeros_like(x)
    jacobian = torch.autograd.functional.jacobian(run, start)
    expected = (jacobian * shift).flatten(1).sum(1)
    assert expected.abs().max() > 1e-3
    assert_gradients_close([how(run, start, shift)], [expected])


def test_forward_mode_over_parameters() -> None:
    module, parameters, inputs = module_of("DyHead")
    tangents = dict(zip(parameters, random_like(*parameters.values()), strict=True))

    def loss(parameters: Parameters) -> Tensor:
        return loss_of(functional_call(module, parameters, inputs))

    found = jvp(loss, (parameters,), (tangents,))[1]
    gradient = grad(loss)(parameters)
    expected = torch.stack([(gradient[k] * tangents[k]).sum() for k in parameters]).sum()
    assert_gradients_close([found], [expected])


@pytest.mark.parametrize("twice", [hessian, lambda f: jacrev(jacrev(f)), lambda f: grad(grad(f))])
def test_second_derivatives(twice: Callable[..., Any]) -> None:
    module, _, inputs = module_of("DyHead")

    def loss(factor: Tensor) -> Tensor:
        return loss_of(module([x * factor for x in inputs[0]]))

    one = torch.tensor(1.0, dtype=torch.float64)
    with backend("reference"):
        expected = torch.autograd.functional.hessian(loss, one)
    assert expected.abs() > 1e-3
    assert_gradients_close([twice(loss)(one)], [expected])


@pytest.mark.parametrize("inside", [jvp_by_dual_level, jvp_by_transform])
def test_a_compiled_backend_that_was_asked_for_raises(inside: Callable[..., Tensor]) -> None:
    module, _, (x,) = module_of("DynamicReLU")
    with (
        backend("cpu"),
        pytest.raises(RuntimeError, match=r'forward-mode derivatives.*use backend\("reference"\)'),
    ):
        inside(module, x, x)


def test_the_log_says_that_the_reference_runs(caplog: pytest.LogCaptureFixture) -> None:
    module, _, (x,) = module_of("DynamicReLU")
    backends._say_transforms_are_slow.cache_clear()
    with caplog.at_level(logging.INFO, "dyhead_cuda"):
        jvp(module, (x,), (x,))
        jvp(module, (x,), (x,))
    assert ["forward-mode" in record.getMessage() for record in caplog.records] == [True]


def test_grad_inside_ordinary_autograd_is_not_differentiated_in_silence() -> None:
    module, _, (x,) = module_of("DynamicReLU")
    x.requires_grad_()
    first = grad(lambda x: loss_of(module(x)))(x)
    with pytest.raises(RuntimeError, match=r'not differentiable again.*backend\("reference"\)'):
        gradients(first, [x])
