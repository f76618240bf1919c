"""Calls of what is no computation: constructors, checkpoints, records, settings."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dyhead_cuda
from dyhead_cuda import compat, modules, reference
from dyhead_cuda.inspect import counters, record
from tests.fuzz.cases import Call, Source

# Those that a file system has are documented, too.
RAISED = (TypeError, ValueError, OSError)
MOST = 2**16  # blocks or channels: nobody waits for 2**70 of them


def refused(name: str, function: Callable[..., Any], arguments: list[Any], **options: Any) -> Call:
    """Judged by itself: whether it raises what it says, and leaves its arguments alone."""
    return Call(name, function, arguments, options, function, raised=RAISED, owns=False)


def constructor(source: Source) -> Call:
    kind: Any = source.choice(
        (
            (modules.DyHead, [4, 4, 1], {"num_groups": 2, "high_offset": "crop", "eps": 1e-5}),
            (modules.DyHeadBlock, [4, 4], {"num_groups": 2, "attentions": ["scale", "task"]}),
            (modules.UnifiedDyHead, [3, 4, 1], {"targets": "all", "resize": "max"}),
            (modules.UnifiedDyHeadBlock, [3, 4, 2], {"targets": "all"}),
            (modules.ModulatedDeformConv2d, [4, 4, (3, 3)], {"stride": 1, "padding": (1, 1)}),
            (modules.ModulatedDeformConv2d, [4, 4, 3], {"groups": 2, "deform_groups": 2}),
            (modules.DynamicReLU, [8, 4, "sigmoid"], {}),
            (modules.DeformBranch, [4, 4, True, 2], {"eps": 1e-5}),
        )
    )
    made, arguments, options = kind

    def make(*arguments: Any, **options: Any) -> list[Any]:
        if any(isinstance(value, int) and value > MOST for value in arguments):
            raise ValueError("expected sizes for which there is time and memory")
        return [list(p.shape) for p in made(*arguments, **options).parameters()]

    return refused(made.__name__, make, list(arguments), **options)


def state_dict(source: Source) -> Call:
    """From a state dict of a code base to a head."""
    name = source.choice(("microsoft", "glip", "mmdet", "mmdet_glip", "ultralytics"))
    torch.manual_seed(0)
    head = modules.DyHead(16, 16, 2, deform_bias=False)
    state: dict[Any, Any] = getattr(compat, f"to_{name}")(head)
    if source.chance(0.3):
        state = {"state_dict": state, 3: None, "epoch": 12}
    read = getattr(compat, f"from_{name}")
    options: dict[str, Any] = {"prefix": None}
    if name == "mmdet":
        options["version"] = "3.3.0"

    def from_state(state: Any, **options: Any) -> Any:
        return list(read(state, **options).state_dict().values())

    call = refused(f"compat.from_{name}", from_state, [state], **options)
    call.owns = True
    return call


def to_state_dict(source: Source) -> Call:
    name = source.choice(("microsoft", "glip", "mmdet", "mmdet_glip", "ultralytics"))
    torch.manual_seed(0)
    head = modules.DyHead(16, 16, 2, deform_bias=False)
    options: dict[str, Any] = {"prefix": "tower."}
    if "glip" in name:
        options["indices"] = [2, 5]
    return refused(f"compat.to_{name}", getattr(compat, f"to_{name}"), [head], **options)


def checkpoint(source: Source) -> Call:
    """A file, whole or damaged, or what is no path."""

    def load(path: Any) -> Any:
        return compat.load_checkpoint(path)

    path = Path(tempfile.mkdtemp(prefix="fuzz"), "checkpoint.pth")
    state = {"model": {"a": torch.ones(3)}, "epoch": 3}
    if source.chance(0.5):
        torch.save(state, path)
    else:
        path.write_bytes(pickle.dumps({"model": {"a": np.ones(3)}}))
    call = refused("compat.load_checkpoint", load, [path])
    if source.chance(0.5):
        content = bytearray(path.read_bytes())
        for _ in range(source.randint(1, 8)):
            content[source.randrange(len(content))] = source.randrange(256)
        path.write_bytes(content[: source.randint(0, len(content))])
        call.spoiled = "a damaged file"
    return call


def recorded(source: Source) -> Call:
    torch.manual_seed(0)
    head = modules.DyHead(4, 4, 1, num_groups=2).double()
    levels = source.pyramid(source.randint(1, 2), 4, torch.float64, halved=True)
    levels = [x for x in levels if x.numel()] or [torch.ones(1, 4, 3, 3, dtype=torch.float64)]
    kind = source.randrange(3)
    if kind == 0:

        def offsets(head: Any, features: Any) -> Any:
            return [level.offset for block in record.record(head, features) for level in block]

        return refused("inspect.record.record", offsets, [head, levels])
    if kind == 1:

        def outputs(block: Any, features: Any) -> Any:
            return record.run_block(block, features).outputs

        return refused("inspect.record.run_block", outputs, [head.blocks[0], levels])
    (block,) = record.record(head, levels)

    def positions(*arguments: Any, **options: Any) -> Any:
        return [s.positions for s in record.samples(*arguments, **options).values()]

    return refused("inspect.record.samples", positions, [block, 0, 0, 0, "flat"])


def setting(source: Source) -> Call:
    """Functions of a few arguments."""

    def entered(name: Any) -> None:
        with dyhead_cuda.backend(name):
            pass

    offset, mask = source.normal(1, 18, 6, 6), source.normal(1, 9, 6, 6)
    branch, weight, bias = source.normal(2, 4, 3, 3), source.normal(4), source.normal(1)
    linear = torch.nn.Sequential(torch.nn.Linear(2, 2))
    calls: tuple[tuple[str, Callable[..., Any], list[Any]], ...] = (
        ("backend", entered, [source.choice(("auto", "reference", "cpu"))]),
        ("accelerate", lambda model: bool(dyhead_cuda.accelerate(model)), [linear]),
        ("reference.hsigmoid", reference.hsigmoid, [branch]),
        ("reference.median_level", reference.median_level, [3]),
        ("reference.branch_gate", reference.branch_gate, [branch, weight, bias]),
        ("reference.high_offset_and_mask", reference.high_offset_and_mask,
         [offset, mask, (3, 3), "flat"]),
        ("counters.ptflops_hooks", lambda b: len(counters.ptflops_hooks(b)), ["aten"]),
    )  # fmt: skip
    name, function, arguments = source.choice(calls)
    return refused(name, function, list(arguments))


OTHERS = {
    "constructor": constructor,
    "state_dict": state_dict,
    "to_state_dict": to_state_dict,
    "checkpoint": checkpoint,
    "recorded": recorded,
    "setting": setting,
}
