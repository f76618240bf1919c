"""Calls of torch.ops.dyhead, good ones judged by plain PyTorch in float64.

With a spoiled table an operator raises, or gives results of the shapes that its fake kernel
promises: it has checked all that could lead it out of its memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dyhead_cuda.ops.jobs import UpsampleMode
from dyhead_cuda.ops.pack_levels import pack_levels, unpack_levels
from tests.fuzz.cases import Call, Source
from tests.helpers import coefficients, deform_work, fuse_cases, offset_work, relu_operators
from tests.helpers.inputs import random_relu_inputs

# What a dispatcher and the checks behind it raise.
RAISED = (RuntimeError, TypeError, ValueError, OverflowError)


def direct(name: str, arguments: Sequence[Any]) -> Call:
    """A call of the operator itself, of which only crashes and shapes are judged."""
    plain = [t.detach() if isinstance(t, Tensor) else t for t in arguments]
    operator = getattr(torch.ops.dyhead, name)
    return Call(f"torch.ops.dyhead.{name}", operator, plain, raised=RAISED, owns=False)


def judged(name: str, run: Callable[..., Any], plain: Callable[..., Any], values: Any) -> Call:
    """A call through the operator's wrapper, with gradients."""
    return Call(name, run, [values], {}, plain, 2, gradients=True, fixed=True, owns=False)


def convolution(source: Source) -> deform_work.Call:
    if source.chance(0.4):
        return deform_work.Work(
            images=source.size(3),
            channels=source.randint(1, 20),
            out_channels=source.randint(1, 20),
            mask_logits=source.chance(0.5),
            with_bias=source.chance(0.5),
            with_gates=source.chance(0.5),
            moments=source.chance(0.5),
            scale=source.randint(1, 3),
            seed=source.getrandbits(30),
        )
    if source.chance(0.1):
        return deform_work.ManyJobs(count=2 * source.randint(1, 30), channels=source.randint(1, 9))
    groups, deform_groups = source.randint(1, 3), source.randint(1, 3)
    return deform_work.Convolution(
        images=source.size(2),
        channels=groups * deform_groups * source.randint(1, 6),
        out_channels=groups * source.randint(1, 9),
        size=(source.randint(7, 13), source.randint(7, 13)),
        kernel=(source.randint(1, 4), source.randint(1, 3)),
        stride=(source.randint(1, 2), source.randint(1, 2)),
        padding=(source.randint(0, 2), source.randint(0, 2)),
        dilation=(source.randint(1, 2), source.randint(1, 2)),
        groups=groups,
        deform_groups=deform_groups,
        offset_scale=source.choice((0.5, 3, 1e6)),
    )


def deform_conv(source: Source) -> Call:
    work, dtype = convolution(source), source.dtype()
    tensors = {name: t.detach() for name, t in work.tensors(dtype).items()}
    kind = source.randrange(3)
    if kind == 0:
        return direct("deform_conv_fwd", work.arguments(tensors))
    if kind == 1:
        arguments = [*work.backward_arguments(tensors)]
        arguments[20] = [source.randint(0, 1) if wanted else 0 for wanted in arguments[20]]
        return direct("deform_conv_bwd", arguments)
    call = judged("ops.deform_conv", work.run, work.reference, tensors)
    call.gradients = dtype.itemsize > 2 and work.images > 0 and not getattr(work, "moments", False)
    return call


def offset_deform_conv(source: Source) -> Call:
    common: dict[str, Any] = {
        "images": source.size(3),
        "out_channels": 2 * source.randint(1, 10),
        "with_bias": source.chance(0.5),
        "seed": source.getrandbits(30),
    }
    work: offset_work.OffsetCall
    if usual := source.chance(0.6):
        channels, scale = source.randint(1, 20), source.randint(1, 3)
        logits = source.chance(0.8)
        work = offset_work.OffsetWork(channels=channels, scale=scale, mask_logits=logits, **common)
    else:
        deform_groups = source.randint(1, 3)
        work = offset_work.OffsetConvolution(
            channels=2 * deform_groups * source.randint(1, 6),
            size=(source.randint(1, 13), source.randint(1, 13)),
            kernel=(source.choice((1, 3, 5)), source.choice((1, 3))),
            dilation=(source.randint(1, 2), source.randint(1, 2)),
            groups=source.randint(1, 2),
            deform_groups=deform_groups,
            **common,
        )
    dtype = source.dtype()
    tensors = {name: t.detach() for name, t in work.tensors(dtype).items()}
    kind = source.randrange(3 if usual else 2)
    if kind == 0:
        return direct("offset_deform_conv_fwd", work.arguments(tensors))
    if kind == 1:
        arguments = [*work.backward_arguments(tensors)]
        arguments[-3] = [source.randint(0, 1) for _ in offset_work.GRADIENTS]
        return direct("offset_deform_conv_bwd", arguments)
    call = judged("ops.offset_deform_conv", work.run, work.reference, tensors)
    call.gradients = dtype.itemsize > 2 and work.images > 0
    return call


def random_fuse(source: Source) -> fuse_cases.Case:
    def size() -> tuple[int, int]:
        return source.randint(1, 12), source.randint(1, 12)

    levels = tuple(
        (size(), tuple(size() for _ in range(source.randint(1, 3))))
        for _ in range(source.randint(1, 4))
    )
    return fuse_cases.Case(
        levels,
        images=source.size(3),
        channels=source.randint(1, 40),
        reversed_maps=source.chance(0.5),
        up_mode=source.choice(list(UpsampleMode)),
        seed=source.getrandbits(30),
    )


def fuse_branches(source: Source) -> Call:
    case, dtype = random_fuse(source), source.dtype()
    tensors = [t.detach() for t in case.tensors(dtype)]
    kind = source.randrange(3)
    if kind == 0:
        return direct("fuse_branches_fwd", [*tensors, *case.tables()])
    if kind == 1:
        out = torch.ops.dyhead.fuse_branches_fwd(*tensors, *case.tables())
        wanted = [source.randint(0, 1) for _ in range(4)]
        grad = torch.randn_like(out)
        return direct("fuse_branches_bwd", [grad, *tensors, *case.tables(), wanted])
    call = judged("ops.fuse_branches", case.run, case.reference, tensors)
    call.gradients = dtype == torch.float64 and case.images > 0
    return call


def block_coefficients(source: Source) -> Call:
    groups = source.randint(1, 4)
    case = coefficients.block_case(
        source.choice((1, 2, 3, 5, 44)),
        images=source.randint(1, 3),
        channels=groups * source.randint(1, 9),
        num_groups=groups,
        hidden=source.randint(1, 9),
        eps=source.choice((1e-5, 1e-2)),
        seed=source.getrandbits(30),
    )
    dtype = source.choice((torch.float32, torch.float64))
    tensors = [t.detach() for t in case.tensors(dtype)]
    kind = source.randrange(3)
    if kind < 2 and len(case.job_levels) <= 128:
        if kind == 0:
            name, arguments = "fwd", coefficients.operator_arguments(case, tensors)
        else:
            name, arguments = "bwd", coefficients.backward_arguments(case, tensors)
        return direct(f"block_coefficients_{name}", arguments)

    def run(tensors: Sequence[Tensor]) -> Any:
        return coefficients.run(case, tensors)

    def plain(tensors: Sequence[Tensor]) -> Any:
        return coefficients.plain(case, tensors)

    call = judged("ops.block_coefficients", run, plain, tensors)
    call.factor, call.gradients = 4, dtype == torch.float64
    return call


def dynamic_relu(source: Source) -> Call:
    shape = source.size(3), source.randint(1, 20), source.randint(1, 30)
    dtype = source.dtype()
    inputs = random_relu_inputs(shape, dtype, seed=source.getrandbits(30))
    if source.chance(0.5):
        return direct("dynamic_relu_fwd", [*relu_operators.forward_arguments(inputs), True])
    wanted = [source.randint(0, 1) for _ in range(3)]
    arguments = [*relu_operators.backward_arguments(inputs), source.chance(0.5), wanted]
    return direct("dynamic_relu_bwd", arguments)


def packing(source: Source) -> Call:
    images, channels = source.size(3), source.randint(1, 40)
    levels = source.pyramid(images, channels, source.dtype(), halved=False)
    kind = source.randrange(4)
    if kind == 0:
        return direct("pack_levels", [[x.contiguous() for x in levels]])
    sizes = [(x.shape[2], x.shape[3]) for x in levels]

    def plain(levels: Sequence[Tensor]) -> Tensor:
        return torch.cat([x.permute(0, 2, 3, 1).reshape(-1, channels) for x in levels])

    if kind == 1:
        table = [side for size in sizes for side in size]
        return direct("unpack_levels", [plain(levels), images, table])
    if kind == 2:
        call = judged("ops.pack_levels", pack_levels, plain, levels)
        call.gradients = images > 0
        return call

    def unpack(rows: Tensor) -> list[Tensor]:
        return unpack_levels(rows, sizes, images)

    def plain_unpack(rows: Tensor) -> list[Tensor]:
        parts = rows.split([images * height * width for height, width in sizes])
        return [
            part.view(images, *size, channels).permute(0, 3, 1, 2)
            for part, size in zip(parts, sizes, strict=True)
        ]

    return judged("ops.unpack_levels", unpack, plain_unpack, plain(levels))


OPERATORS = {
    "deform_conv": deform_conv,
    "offset_deform_conv": offset_deform_conv,
    "fuse_branches": fuse_branches,
    "block_coefficients": block_coefficients,
    "dynamic_relu_operator": dynamic_relu,
    "packing": packing,
}
