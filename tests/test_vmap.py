"""torch.func.vmap: which dimensions, what is shared, and how often the operators run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from dyhead_cuda import DyHead, DynamicReLU, ModulatedDeformConv2d, backend
from dyhead_cuda.backends import Backend
from dyhead_cuda.ops.folding import _foldings
from tests.helpers.compare import assert_close, assert_gradients_close
from tests.helpers.devices import needs_cpu_library
from tests.helpers.inputs import halving_sizes, random_pyramid
from tests.helpers.modules import randomise
from tests.helpers.spy import calls_of_operators

pytestmark = needs_cpu_library

each_backend = pytest.mark.parametrize("runs", ["cpu", "reference"])
BATCH = 3


def deform_conv() -> tuple[ModulatedDeformConv2d, list[Tensor]]:
    module = ModulatedDeformConv2d(4, 6, 3, 1, 1, deform_groups=2).double()
    randomise(module)
    source = torch.Generator().manual_seed(1)
    shapes = [(BATCH, 2, 4, 5, 6), (BATCH, 2, 36, 5, 6), (BATCH, 2, 18, 5, 6)]
    return module, [torch.randn(s, generator=source, dtype=torch.float64) for s in shapes]


def make_head() -> tuple[DyHead, list[Tensor]]:
    head = DyHead(4, 8, 2, num_groups=2).double()
    randomise(head)
    levels = random_pyramid(BATCH * 2, 4, halving_sizes(7, 6, 3))
    return head, [x.unflatten(0, (BATCH, 2)) for x in levels]


@each_backend
@pytest.mark.parametrize("batched", range(1, 8))
def test_some_arguments_are_shared(batched: int, runs: Backend) -> None:
    """Those without a batch, in all combinations."""
    module, inputs = deform_conv()
    has = [bool(batched >> i & 1) for i in range(3)]
    given = [x if own else x[0] for x, own in zip(inputs, has, strict=True)]
    dims = tuple(0 if own else None for own in has)
    with backend(runs):
        found = vmap(module, dims)(*given)
        for i in range(BATCH):
            one = [x[i] if own else x for x, own in zip(given, has, strict=True)]
            assert_close(found[i], module(*one))
        if runs == "cpu":
            calls = calls_of_operators(vmap(module, dims), *given)
            assert calls["deform_conv_fwd"] == 1


@each_backend
@pytest.mark.parametrize("dims", [(0, 1, 2), (-1, -2, 3), (2, 4, -1)])
@pytest.mark.parametrize("out_dim", [0, 2, -1])
@pytest.mark.parametrize("randomness", ["error", "same", "different"])
def test_dimensions(dims: tuple[int, ...], out_dim: int, randomness: str, runs: Backend) -> None:
    module, inputs = deform_conv()
    given = [x.movedim(0, dim) for x, dim in zip(inputs, dims, strict=True)]
    with backend(runs):
        found = vmap(module, dims, out_dim, randomness=randomness)(*given)
        expected = torch.stack([module(*one) for one in zip(*inputs, strict=True)], out_dim)
    assert_close(found, expected)


@each_backend
def test_in_chunks_and_containers(runs: Backend) -> None:
    head, levels = make_head()
    with backend(runs):
        found = vmap(head, chunk_size=2)({"a": levels[0], "b": levels[1], "c": levels[2]})
        for i in range(BATCH):
            assert_close([x[i] for x in found.values()], head([x[i] for x in levels]))


def test_of_vmap_is_one_call_too() -> None:
    head, levels = make_head()
    pairs = [torch.stack([x, 0.5 * x], 1) for x in levels]  # [B, 2, N, C, H, W]
    found = vmap(vmap(head))(pairs)
    for i in range(BATCH):
        for j in range(2):
            assert_close([x[i, j] for x in found], head([x[i, j] for x in pairs]))
    calls = calls_of_operators(vmap(vmap(head)), pairs)
    assert calls == calls_of_operators(head, [x[0] for x in levels])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_per_sample_gradients_of_weights(layout: torch.memory_format) -> None:
    """What has images is folded; the gradients of weights are computed sample by sample."""
    head, levels = make_head()
    levels = [
        x.flatten(0, 1).contiguous(memory_format=layout).unflatten(0, (BATCH, 2)) for x in levels
    ]
    parameters = {name: p.detach() for name, p in head.named_parameters()}

    def loss(parameters: dict[str, Tensor], levels: list[Tensor]) -> Tensor:
        outs = functional_call(head, parameters, (levels,))
        return torch.stack([(x * x).sum() for x in outs]).sum()

    per_sample = vmap(grad(loss), (None, 0))
    found = per_sample(parameters, levels)
    for i in range(BATCH):
        expected = grad(loss)(parameters, [x[i] for x in levels])
        assert_gradients_close([found[k][i] for k in expected], list(expected.values()))
    alone = calls_of_operators(grad(loss), parameters, [x[0] for x in levels])
    calls = calls_of_operators(per_sample, parameters, levels)
    apart = ("offset_deform_conv_bwd", "block_coefficients_bwd")
    assert {k: n for k, n in calls.items() if k not in apart} == {
        k: n for k, n in alone.items() if k not in apart
    }
    # One call for all samples and one for each; nobody wants the gradient of the features.
    assert calls["block_coefficients_bwd"] == (1 + BATCH) * alone["block_coefficients_bwd"]
    assert calls["offset_deform_conv_bwd"] == (1 + BATCH) * alone["offset_deform_conv_bwd"] - 1


def test_an_ensemble_folds_what_has_no_weights() -> None:
    head, levels = make_head()
    several = {n: torch.stack([p, 0.9 * p]).detach() for n, p in head.named_parameters()}

    def run(parameters: dict[str, Tensor]) -> Any:
        return functional_call(head, parameters, ([x[0] for x in levels],))

    calls = calls_of_operators(vmap(run), several)
    assert calls == {
        "pack_levels": 1,  # of the shared levels
        "offset_deform_conv_fwd": 2 * 2,
        "block_coefficients_fwd": 2 * 2,
        "fuse_branches_fwd": 2,
        "unpack_levels": 1,
    }


def test_an_empty_batch() -> None:
    head, levels = make_head()
    relu = DynamicReLU(4).double()
    assert [x.shape for x in vmap(head)([x[:0] for x in levels])] == [
        (0, 2, 8, *x.shape[3:]) for x in levels
    ]
    assert vmap(relu)(levels[0][:0]).shape == levels[0][:0].shape


def test_an_empty_batch_of_weights_is_refused() -> None:
    relu = DynamicReLU(4).double()
    none = {name: p.detach()[None][:0] for name, p in relu.named_parameters()}
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"at least one element .* got none; skip the call"):
        vmap(lambda parameters: functional_call(relu, parameters, (x,)))(none)


def test_every_operator_says_where_its_images_are() -> None:
    operators = {
        name.removeprefix("dyhead::").partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("dyhead::")
    }
    assert operators == set(_foldings)
    for name, folding in _foldings.items():
        schema = getattr(torch.ops.dyhead, name).default._schema
        assert set(folding.arguments) <= {a.name for a in schema.arguments}
        assert len(folding.results) == len(schema.returns)
