"""How the CPU shares out the backward of deformable convolutions, and what it does not touch."""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
import resource
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dyhead_cuda.ops.deform_conv import deform_conv
from dyhead_cuda.ops.jobs import Job, Plan, Size
from tests.helpers.compare import leaf
from tests.helpers.deform_checks import assert_same_bits, check
from tests.helpers.deform_work import WORKS, Call, Convolution, Plain
from tests.helpers.devices import needs_cpu_library

pytestmark = needs_cpu_library

BACKWARD = torch.ops.dyhead.deform_conv_bwd
NAMES = [a.name for a in BACKWARD.default._schema.arguments]
HALF = torch.bfloat16

# Several parts, chunks with an odd number of rows, and slices of all passes that are not full.
DEFORMABLE = Convolution(images=5, channels=102, out_channels=37, size=(27, 31), offset_scale=2)
GROUPS = Convolution(images=2, channels=24, out_channels=36, size=(13, 13), groups=3)
ODD_GROUPS = Convolution(images=2, channels=24, out_channels=15, size=(13, 13), groups=3)
PLAIN = Plain(images=2, channels=102, sizes=((27, 31), (5, 3)))


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("call", [DEFORMABLE, GROUPS, ODD_GROUPS, PLAIN])
def test_equals_the_reference(call: Call, dtype: torch.dtype) -> None:
    check(call, dtype, call.tensors(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("call", [DEFORMABLE, PLAIN])
def test_many_threads_share_slices_and_taps_too(
    call: Call, dtype: torch.dtype, threads: None
) -> None:
    torch.manual_seed(0)
    arguments = call.backward_arguments(call.tensors(dtype))
    found = []
    for count in (1, 3, 64):
        torch.set_num_threads(count)
        found.append(BACKWARD(*arguments))
    for results in found[1:]:
        assert_same_bits(results, found[0])


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_rows_that_are_not_there_add_nothing(dtype: torch.dtype, threads: None) -> None:
    """An odd number of rows after infinite ones of another matrix, in the same buffer."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes: list[Size] = [(12, 12), (5, 5)]
    plan = Plan(1, sizes, [(0, 0)], [Job(size, None, [(i, i)]) for i, size in enumerate(sizes)])
    source = leaf(torch.randn(169, 32), dtype)
    weights = [leaf(torch.randn(32, 32, 3, 3), torch.float32) for _ in sizes]
    out, *_ = deform_conv(source, torch.empty(0, 27), weights, plan)
    grad_out = torch.randn(169, 32).to(dtype)
    expected = torch.autograd.grad(out, [source, weights[1]], grad_out, retain_graph=True)
    grad_out[:144] = torch.inf
    found = torch.autograd.grad(out, [source, weights[1]], grad_out)
    assert torch.equal(found[0][144:], expected[0][144:])
    assert torch.equal(found[1], expected[1])


def forbidden(tensor: Tensor) -> Tensor:
    """A tensor of this shape and type; to read or write it ends the process."""
    memory = mmap.mmap(-1, max(tensor.nbytes, 1))
    found = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel()).view(tensor.shape)
    libc = ctypes.CDLL(None, use_errno=True)
    address, nothing = ctypes.c_void_p(found.data_ptr()), 0
    assert libc.mprotect(address, ctypes.c_size_t(len(memory)), nothing) == 0
    return found


def status_without(arguments: Sequence[Any], wanted: list[int], names: Sequence[str]) -> int:
    """The exit status of a process in which these arguments cannot be read."""
    given = list(arguments)
    given[NAMES.index("wanted")] = wanted
    if (child := os.fork()) == 0:
        torch.set_num_threads(1)  # others did not come along
        for name in names:
            at = NAMES.index(name)
            one = given[at]
            given[at] = [forbidden(t) for t in one] if isinstance(one, list) else forbidden(one)
        faulthandler.disable()  # the process may be meant to be killed
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        BACKWARD(*given)
        os._exit(0)
    return os.waitpid(child, 0)[1]


# By the gradients that are wanted: of source, predictions, weights, bias and gates.
UNREAD = {
    (1, 0, 0, 0, 0): ["source"],
    (0, 0, 1, 0, 0): ["weights"],
    (0, 0, 0, 1, 0): ["source", "predictions", "weights", "gates"],
    (0, 0, 1, 1, 0): ["weights"],
    (0, 0, 0, 0, 0): ["grad_out", "source", "predictions", "weights", "gates"],
}
READ = {(1, 0, 0, 0, 0): "weights", (0, 1, 0, 0, 0): "source", (0, 0, 1, 0, 0): "source"}


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_what_only_unwanted_gradients_need_is_not_read(dtype: torch.dtype) -> None:
    work = WORKS["all"]
    arguments = work.backward_arguments(work.tensors(dtype))
    for wanted, names in UNREAD.items():
        for name in names:
            assert status_without(arguments, list(wanted), [name]) == 0, (wanted, name)
    for wanted, name in READ.items():
        assert status_without(arguments, list(wanted), [name]) != 0, (wanted, name)
