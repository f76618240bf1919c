"""One of the processes of test_distributed.py: ``python -m tests.helpers.distributed_worker``."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dyhead_cuda import DyHead, DyHeadBlock, UnifiedDyHead, accelerate, library
from dyhead_cuda.compat.accelerate import AcceleratedBlock
from dyhead_cuda.modules import UnifiedDyHeadBlock
from tests.helpers.compare import random_like
from tests.helpers.inputs import halving_sizes, random_pyramid
from tests.helpers.modules import randomise
from tests.helpers.published import microsoft, mmdet

WORLD = 2
IMAGES = 4  # of the whole batch
CHANNELS = 16
STEPS = 2


class Stacked(nn.Module):
    """The paper's head on a pyramid, with a list for a result."""

    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.head = UnifiedDyHead(3, CHANNELS, 2, recompute=recompute)

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        return [self.head(levels)]


class Named(nn.Module):
    """microsoft's tower takes a dict of levels."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = microsoft.DyHead(nn.Identity(), CHANNELS, 2)

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        return list(self.backbone({f"p{i}": x for i, x in enumerate(levels)}).values())


def plain(recompute: bool) -> nn.Module:
    return DyHead(CHANNELS, CHANNELS, 2, num_groups=4, recompute=recompute)


MODELS: dict[str, Callable[[bool], nn.Module]] = {
    "DyHead": plain,
    "UnifiedDyHead": Stacked,
    "mmdet": lambda recompute: accelerate(mmdet.DyHead(CHANNELS, CHANNELS, 2), recompute=recompute),
    "microsoft": lambda recompute: accelerate(Named(), recompute=recompute),
}
CASES = [f"{name}{suffix}" for name in MODELS for suffix in ("", " recompute")]
BLOCKS = (DyHeadBlock, UnifiedDyHeadBlock, AcceleratedBlock)

Wrap = Callable[[nn.Module], nn.Module]


def make_model(case: str) -> nn.Module:
    name, _, suffix = case.partition(" ")
    model = MODELS[name](suffix == "recompute").double()
    randomise(model)
    return model


def batch(levels: int = 3) -> list[Tensor]:
    return random_pyramid(IMAGES, CHANNELS, halving_sizes(9, 7, levels))


def train(model: nn.Module, features: list[Tensor], images: slice) -> dict[str, Tensor]:
    """Gradients of the last of some steps of SGD on these images, and parameters after it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.003, momentum=0.9)
    for _ in range(STEPS):
        optimizer.zero_grad()
        outs = model([x[images] for x in features])
        cotangents = random_like(*(x.new_empty(IMAGES, *x.shape[1:]) for x in outs))
        losses = [(x * t[images].to(x)).sum() for x, t in zip(outs, cotangents, strict=True)]
        (torch.stack(losses).sum() / outs[0].shape[0]).backward()
        optimizer.step()
    result = {}
    for name, parameter in model.named_parameters():
        name = name.removeprefix("module.")  # of DistributedDataParallel
        result[name] = whole(parameter)
        if parameter.grad is not None:
            result[f"{name}.grad"] = whole(parameter.grad)
    return result


def whole(t: Tensor) -> Tensor:
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach()


def sharded(model: nn.Module, **options: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", (WORLD,))
    for module in list(model.modules()):
        if isinstance(module, BLOCKS):
            fully_shard(module, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return model


HALF = MixedPrecisionPolicy(
    param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32
)


def run_cases(strategy: str, rank: int) -> dict[str, dict[str, Tensor] | str]:
    """Results by case; a traceback where one failed."""
    share = IMAGES // WORLD
    images = slice(rank * share, (rank + 1) * share)
    wrap: Wrap = DistributedDataParallel if strategy == "ddp" else sharded

    def run(case: str) -> dict[str, Tensor]:
        return train(wrap(make_model(case)), batch(), images)

    jobs: dict[str, Callable[[], dict[str, Tensor]]] = {case: partial(run, case) for case in CASES}
    if strategy == "ddp":
        unused = partial(DistributedDataParallel, find_unused_parameters=True)
        jobs["one level"] = lambda: train(unused(make_model("DyHead")), batch(1), images)
    else:
        jobs["bfloat16"] = lambda: train(
            sharded(make_model("DyHead").float(), mp_policy=HALF),
            [x.float() for x in batch()],
            images,
        )
    results: dict[str, dict[str, Tensor] | str] = {}
    for case, job in jobs.items():
        try:
            results[case] = job()
        except Exception:
            results[case] = traceback.format_exc()
    return results


def main(strategy: str, rank: int, directory: Path) -> None:
    torch.set_num_threads(1)
    library.require("cpu")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/store",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=100),
    )
    torch.save(run_cases(strategy, rank), directory / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
