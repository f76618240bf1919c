"""The processes of one training: one, or those that torchrun has started."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dyhead_cuda import checks
from dyhead_cuda.detection.names import DEVICES
from dyhead_cuda.detection.training.errors import RankError
from dyhead_cuda.detection.training.rank_watch import RankWatch

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among all: its rank, their number, and the device that this one computes on."""

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """The mean of ``values`` (any shape, on the device) over all processes."""
        if self.count > 1:
            dist.all_reduce(values)
            values = values / self.count
        return values

    def any(self, value: bool) -> bool:
        """Whether ``value`` is true in any process."""
        return float(self.mean(torch.tensor(float(value), device=self.device))) > 0

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank; they are pickled."""
        values = [value]
        if self.count > 1:
            values = [None] * self.count
            dist.all_gather_object(values, value)
        return values

    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Replaces the values of ``tensors`` by those of the first process's."""
        if self.count > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def on_first(self, action: Callable[[], T]) -> T:
        """Runs ``action`` in the first process; all get its result, or raise its exception."""
        if self.count == 1:
            return action()
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = action()
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        result: T = outcome[0]
        return result


def choose_device(name: str) -> torch.device:
    """The device that "auto" (a GPU if torch sees one), "cpu" or "cuda" means in this process.

    Raises:
        ValueError: no such device, or fewer GPUs than processes on this machine.
    """
    checks.one_of("device", name, DEVICES)
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device cuda needs a GPU, but torch {torch.__version__} sees none; use device cpu"
        )
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", 0))
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"expected at most {torch.cuda.device_count()} processes on this machine, one per GPU, "
            f"got local rank {index}; lower --nproc-per-node of torchrun or use device cpu"
        )
    return torch.device("cuda", index)


@contextmanager
def join(device: str) -> Iterator[Processes]:
    """The processes that torchrun's environment names (RANK, WORLD_SIZE, LOCAL_RANK), or one.

    A process group is made (nccl on GPUs, gloo on CPUs), and destroyed at the end, unless there
    is one already. Should one of the processes end, the others do so within seconds.

    Args:
        device: see :func:`choose_device`, which also says what is raised.

    Raises:
        RankError: another process has ended, so that what is done inside cannot go on.
    """
    local = choose_device(device)
    if local.type == "cuda":
        torch.cuda.set_device(local)
    made = int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized()
    if made:
        dist.init_process_group("nccl" if local.type == "cuda" else "gloo")
    if not made:
        if dist.is_initialized():
            yield Processes(dist.get_rank(), dist.get_world_size(), local)
        else:
            yield Processes(0, 1, local)
        return
    watch = None
    try:
        watch = RankWatch(dist.get_rank(), dist.get_world_size())
        with _telling(watch):
            yield Processes(dist.get_rank(), dist.get_world_size(), local)
    finally:
        dist.destroy_process_group()  # watched, as it may wait for what nobody will do
        if watch is not None:
            watch.close()


@contextmanager
def _telling(watch: RankWatch) -> Iterator[None]:
    """Tells the other processes how this one leaves, or of one that has left this one alone."""
    try:
        yield
    except RuntimeError as error:  # what torch raises where a collective operation fails
        lost = watch.lost()
        if lost is None:
            watch.leaving(error)
            raise
        raise RankError(lost) from error
    except BaseException as error:
        watch.leaving(error)
        raise
    watch.leaving(None)
