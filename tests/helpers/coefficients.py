"""Inputs of ``block_coefficients`` and what it computes in plain PyTorch, for tests on any device.

A list of its tensors is mean, var, up_mean, the norm weights, the norm biases, then the gate's and
the dynamic ReLU's parameters in the order of the operator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, relu

from dyhead_cuda.ops.block_coefficients import block_coefficients
from dyhead_cuda.reference import hsigmoid
from tests.helpers.compare import assert_close, assert_gradients_close, leaf, random_like

LOW, MID, HIGH = 0, 1, 2


@dataclass(frozen=True)
class Case:
    """Jobs, sizes and options."""

    job_levels: tuple[int, ...] = (0, 0, 1, 1, 1, 2, 2)
    job_branches: tuple[int, ...] = (MID, HIGH, MID, LOW, HIGH, MID, LOW)
    images: int = 2
    channels: int = 8
    num_groups: int = 2
    hidden: int = 2
    norms: int = 3
    eps: float = 1e-3
    seed: int = 0

    def tensors(
        self,
        dtype: torch.dtype = torch.float64,
        parameter_dtypes: Sequence[torch.dtype] = (),
        device: str = "cpu",
    ) -> list[Tensor]:
        """Leaves; parameter i has type ``parameter_dtypes[i % len]``, or ``dtype``.

        Some gates, hidden values and coefficients are beyond the corners of their functions.
        """
        source = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int, scale: float = 1.0, around: float = 0.0) -> Tensor:
            return around + scale * torch.randn(shape, generator=source, dtype=torch.float64)

        c, hidden = self.channels, self.hidden
        shape = (len(self.job_levels), self.images, c)
        mean = normal(*shape)
        moments = [mean, 0.05 + normal(*shape).square(), mean + 0.3 * normal(*shape)]
        parameters = [
            *(normal(c, scale=0.3, around=1) for _ in range(self.norms)),
            *(normal(c, scale=0.5) for _ in range(self.norms)),
            normal(c, scale=1.5 / math.sqrt(c)),
            normal(1, around=1.0),
            normal(hidden, c, scale=1 / math.sqrt(c)),
            normal(hidden, around=0.5),
            normal(4 * c, hidden, scale=1 / math.sqrt(hidden)),
            normal(4 * c, scale=2),
        ]
        kinds = list(parameter_dtypes) or [dtype]
        return [
            *(leaf(t.to(device), dtype) for t in moments),
            *(leaf(t.to(device), kinds[i % len(kinds)]) for i, t in enumerate(parameters)),
        ]

    def arguments(self, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        """The tensors as the operator takes them."""
        weights, biases, rest = 3, 3 + self.norms, 3 + 2 * self.norms
        return (
            *tensors[:weights],
            list(tensors[weights:biases]),
            list(tensors[biases:rest]),
            *tensors[rest:],
        )

    def options(self) -> dict[str, Any]:
        return {
            "job_levels": list(self.job_levels),
            "job_branches": list(self.job_branches),
            "num_groups": self.num_groups,
            "eps": self.eps,
        }


def block_case(levels: int, **options: Any) -> Case:
    """The jobs of the published block."""
    jobs = []
    for level in range(levels):
        jobs.append((level, MID))
        jobs += [(level, LOW)] if level > 0 else []
        jobs += [(level, HIGH)] if level + 1 < levels else []
    return Case(tuple(level for level, _ in jobs), tuple(b for _, b in jobs), **options)


CASES = {
    "three levels": Case(),
    "five levels": block_case(5, channels=32, num_groups=16, hidden=8),
    "one level": block_case(1),
    "one of everything": Case((0,), (0,), 1, 1, 1, 1, 1),
    "a group per channel": block_case(2, channels=7, num_groups=7, hidden=3),
    "one odd group": block_case(2, channels=37, num_groups=1, hidden=9, images=3),
    "odd groups": block_case(3, channels=99, num_groups=3, hidden=70, images=1),
    "more channels than threads": block_case(2, channels=600, num_groups=4, hidden=40, images=1),
    "more hidden than threads": block_case(1, channels=12, num_groups=4, hidden=600),
    "mixed order": Case((2, 0, 1, 0, 2, 2, 0), (3, 0, 4, 4, 1, 3, 0), norms=5),
    "many jobs of a level": Case((0,) * 40, (0, 1, 2, 1) * 10, images=1),
    "many levels": block_case(43, images=1),
    "many images": block_case(2, images=200, channels=3, num_groups=1, hidden=1),
    "a tiny eps": block_case(2, eps=1e-12),
    "a large eps": block_case(2, eps=1.0),
}


def plain(case: Case, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """scale, shift and coefficients with autograd, in the type of the tensors."""
    mean, var, up_mean, norm_weights, norm_biases, *parameters = case.arguments(tensors)
    gate_weight, gate_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias = parameters
    norm_weight = torch.stack([norm_weights[b] for b in case.job_branches]).unsqueeze(1)
    norm_bias = torch.stack([norm_biases[b] for b in case.job_branches]).unsqueeze(1)
    levels = range(max(case.job_levels) + 1)
    members = mean.new_tensor([[float(of == level) for of in case.job_levels] for level in levels])

    grouped = mean.unflatten(2, (case.num_groups, -1))
    group_mean = grouped.mean(3, keepdim=True)
    group_var = var.unflatten(2, (case.num_groups, -1)).mean(3, keepdim=True)
    group_var = group_var + (grouped - group_mean).square().mean(3, keepdim=True)
    rstd = torch.rsqrt(group_var + case.eps)
    width = case.channels // case.num_groups
    rstd, group_mean = (t.expand(-1, -1, -1, width).reshape(mean.shape) for t in (rstd, group_mean))
    scale = norm_weight * rstd
    shift = norm_bias - scale * group_mean

    pooled = scale * up_mean + shift
    gates = hsigmoid(relu(pooled @ gate_weight + gate_bias))  # [J, N]
    share = (gates * (members.t() @ (1 / members.sum(1))).unsqueeze(1)).unsqueeze(2)
    scale, shift = share * scale, share * shift
    means = torch.einsum("lj,jnc->lnc", members, scale * up_mean + shift)
    shift = torch.einsum("lj,jnc->lnc", members, shift)

    t = 2 * hsigmoid(linear(relu(linear(means, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)) - 1
    a1, b1, a2, b2 = t.chunk(4, dim=2)
    return scale, shift, torch.stack([a1 + 1, b1 / 2, a2, b2 / 2], dim=2)


def at_a_corner(tensors: Sequence[Tensor], gate: float, hidden: float) -> None:
    """Put every gate's logit at ``gate``, the hidden layer at ``hidden`` and logits at -3 and 3."""
    *_, gate_weight, gate_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias = tensors
    with torch.no_grad():
        gate_weight.zero_()
        gate_bias.fill_(gate)
        fc1_weight[::2] = 0
        fc1_bias[::2] = hidden
        fc2_weight[::3] = 0
        fc2_bias[::3] = 3
        fc2_bias[::6] = -3


def all_gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Of all inputs for random cotangents; zeros for the normalisations that no job has."""
    cotangents = [t.to(out) for t, out in zip(random_like(*outputs), outputs, strict=True)]
    return list(torch.autograd.grad(outputs, inputs, cotangents, materialize_grads=True))


def check_gradients(
    actual: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype
) -> None:
    """Each by the tolerance of its own type, or of ``dtype`` where that is coarser."""
    for kind in {g.dtype for g in actual}:
        pairs = [(a, b) for a, b in zip(actual, expected, strict=True) if a.dtype == kind]
        tolerance_of = max(kind, dtype, key=lambda t: torch.finfo(t).eps)
        ours, theirs = zip(*pairs, strict=True)
        assert_gradients_close(ours, theirs, tolerance_of, floor=1e-2)


def run(case: Case, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return block_coefficients(*case.arguments(tensors), **case.options())


def check(case: Case, tensors: Sequence[Tensor]) -> None:
    """Results and all gradients against the plain form in float64."""
    dtype = tensors[0].dtype
    exact = [leaf(t, torch.float64) for t in tensors]
    actual, expected = run(case, tensors), plain(case, exact)
    assert [t.dtype for t in actual] == [dtype] * 3
    assert_close(actual, expected, dtype)
    grads = all_gradients(actual, tensors)
    assert [g.dtype for g in grads] == [t.dtype for t in tensors]
    check_gradients(grads, all_gradients(expected, exact), dtype)


def operator_arguments(case: Case, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """Of ``block_coefficients_fwd``."""
    return (*case.arguments(tensors), *case.options().values())


def backward_arguments(case: Case, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """Of ``block_coefficients_bwd``, which is to compute all gradients."""
    plain_tensors = [t.detach() for t in tensors]
    arguments = operator_arguments(case, plain_tensors)
    mean, _, up_mean, weights, biases, gate_weight, _, fc1_weight, _, fc2_weight, _ = arguments[:11]
    *outputs, norms, layers = torch.ops.dyhead.block_coefficients_fwd(*arguments)
    grads = [torch.randn_like(t) for t in outputs]
    kept = (mean, up_mean, norms, layers)
    parameters = (weights, biases, gate_weight, fc1_weight, fc2_weight)
    return (*grads, *kept, *parameters, *arguments[11:14], [1] * 11)
