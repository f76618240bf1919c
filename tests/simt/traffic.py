"""What the kernels of a small fixed problem access, and the upper bounds that CI holds them to.

``python -m tests.simt.traffic`` prints the counts, ``--write`` makes them the new bounds, in
``traffic.json``, and ``--places KERNEL`` shows where in a kernel they come from.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dyhead_cuda import fused
from dyhead_cuda.ops.jobs import GEOMETRY_FIELDS, Size
from tests.helpers.inputs import (
    flat_parameters,
    random_block_parameters,
    random_relu_inputs,
    rebuild_parameters,
)

from . import counting
from .arrays import flat_array, to_array
from .build import Kernels, counted
from .emulated import Emulated

BOUNDS = Path(__file__).with_suffix(".json")
UPDATE = "python -m tests.simt.traffic --write"

# Maps of whole tiles, and of less than one.
SIZES: list[Size] = [(16, 16), (8, 8)]
CHANNELS = 256

Step = Callable[[str], None]

_NAMES = {
    "offset_deform_conv": "convolutions",
    "block_coefficients": "coefficients",
    "fuse_branches": "fuse",
}


class Steps(Emulated):
    """The emulated operators, each of them a step of its own.

    Steps are named ``"convolutions fwd"`` for the convolution that predicts offsets and those that
    read them, ``"convolutions bwd"`` for their backward, and so on for the others.
    """

    def __init__(
        self,
        simt: Any,
        step: Step,
        processors: int,
        shared_bytes: int = 227 * 1024,
        wgmma: bool = False,
        sampled: bool = False,
    ) -> None:
        super().__init__(simt)
        self.step = step
        self.device = simt.deform_conv.DeviceLimits(processors, shared_bytes, wgmma)
        self.sampled = sampled
        self.random = torch.Generator().manual_seed(1)

    def __torch_dispatch__(
        self,
        function: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        before = len(self.calls)
        result = super().__torch_dispatch__(function, types, args, kwargs)
        if len(self.calls) > before:
            operator, _, direction = self.calls[-1].rpartition("_")
            self.step(f"{_NAMES[operator]} {direction}")
            self._replace((result,) if isinstance(result, torch.Tensor) else result)
        return result

    def _given_predictions(self, source: Tensor, tables: Sequence[Any]) -> Any:
        if not self.sampled:
            return None
        images, _, sizes, _, _, geometry, *_ = tables
        of = dict(zip(GEOMETRY_FIELDS, geometry, strict=True))
        rows = images * sum(h * w for h, w in zip(sizes[::2], sizes[1::2], strict=True))
        columns = 3 * of["deform_groups"] * of["kernel_h"] * of["kernel_w"]
        return to_array(torch.randn(rows, columns, generator=self.random))

    def _replace(self, results: Sequence[Tensor]) -> None:
        if self.sampled:
            for tensor in results:
                tensor.normal_(generator=self.random)


def run_block(
    simt: Any,
    step: Step,
    sizes: Sequence[Size] = tuple(SIZES),
    channels: int = CHANNELS,
    images: int = 1,
    processors: int = 132,
    shared_bytes: int = 227 * 1024,
    wgmma: bool = False,
    forward_only: bool = False,
    frozen: bool = False,
    sampled: bool = False,
) -> None:
    """A published block in bfloat16 with float32 parameters, forward and backward.

    Offsets are around a pixel. With few processors the forward takes its large tiles. No gradient
    of ``frozen`` parameters is wanted. Where only some blocks of a launch run, most of its results
    are undefined: then ``sampled`` gives random numbers to the next launch.
    """
    simt.set_seed(0)
    source = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=source).bfloat16()

    like = random_block_parameters(channels, channels)
    parameters = [t.float().requires_grad_(not frozen) for t in flat_parameters(like)]
    features = [normal(images, channels, *size).requires_grad_() for size in sizes]
    with Steps(simt, step, processors, shared_bytes, wgmma, sampled):
        outs = fused.pyramid_blocks(
            features,
            [rebuild_parameters(like, parameters)],
            high_offset="flat",
            upsample="bilinear",
            num_groups=16,
            eps=1e-5,
            recompute=False,
            memory_format=torch.channels_last,
        )
        if not forward_only:
            torch.autograd.backward(outs, [normal(*out.shape) for out in outs])


def run_others(simt: Any, step: Step, pixels: int = 256, channels: int = CHANNELS) -> None:
    """What a block does not launch: packing of levels, and the dynamic ReLU by itself."""
    simt.set_seed(0)
    side = int(pixels**0.5)
    level = simt.pack_levels.Level(0, side, side)
    data = np.zeros(pixels * channels, np.uint16)
    options = {"skew": 0, "max_blocks": 1 << 20}
    for last in (False, True):
        simt.pack_levels.pack(2, 1, channels, [level], [data], [last], **options)
        step("pack channels_last" if last else "pack")
    simt.pack_levels.unpack(2, 1, channels, [level], data, **options)
    step("unpack")
    x, *parameters = random_relu_inputs(
        (1, channels, pixels), torch.bfloat16, hidden=channels // 4, parameter_dtype=torch.float32
    )
    rows = flat_array(x.transpose(1, 2))
    arrays = [to_array(p) for p in parameters]
    shape = ("bfloat16", 1, pixels)
    kept = simt.dynamic_relu.forward(*shape, rows, *arrays, hard_sigmoid=True)
    step("dynamic_relu fwd")
    simt.dynamic_relu.backward(
        *shape,
        rows,
        rows,
        kept["hidden"],
        kept["logits"],
        arrays[0],
        arrays[2],
        hard_sigmoid=True,
    )
    step("dynamic_relu bwd")


def count_steps(
    code: str, kernels: Kernels | None = None, **options: Any
) -> dict[str, counting.Counts]:
    """The steps of code that calls ``traffic.run_block(simt, step, ...)`` or others of here.

    All of that is in bfloat16, so by default no other kernels are built for counting.
    """
    code = f"from tests.simt import traffic\n{code}"
    steps = counting.count_steps(code, kernels or counted(arithmetic="bfloat16"), **options)
    return {name: counts for name, counts in steps.items() if counts.records}


def small_problem() -> dict[str, counting.Counts]:
    """The counts of the fixed problem, by step; those of convolutions also with wgmma.

    With few processors the backward to the input takes its large tiles, as wgmma needs.
    """
    steps = count_steps("traffic.run_block(simt, step)\ntraffic.run_others(simt, step)")
    with_wgmma = count_steps("traffic.run_block(simt, step, wgmma=True, processors=2)")
    for name in ("convolutions fwd", "convolutions bwd"):
        steps[f"{name}, wgmma"] = with_wgmma[name]
    return steps


def totals(records: Sequence[counting.Record]) -> dict[str, int]:
    """What a device charges for these records, by kind; what is zero is left out."""

    def of(number: str, *accesses: str) -> int:
        return sum(getattr(r, number) for r in records if r.access in accesses)

    shared = ("shared load", "shared store", "ldmatrix", "async write", "operand read")
    found = {
        "load_sectors": of("sectors", "global load"),
        "async_sectors": of("sectors", "async read"),
        "store_sectors": of("sectors", "global store"),
        "atomic_sectors": of("sectors", "atomic"),
        "shared_wavefronts": of("wavefronts", *shared),
        "shuffles": of("instructions", "shuffle"),
        "barriers": of("instructions", "barrier"),
        "mma_flop": of("flop", "mma"),
    }
    return {name: number for name, number in found.items() if number}


def by_kernel(steps: dict[str, counting.Counts]) -> dict[str, dict[str, int]]:
    """The totals of each kernel, by ``"step: kernel"``, without template arguments."""
    found: dict[str, list[counting.Record]] = {}
    for step, counts in steps.items():
        for record in counts.records:
            found.setdefault(f"{step}: {record.kernel.partition('<')[0]}", []).append(record)
    return {name: totals(records) for name, records in sorted(found.items())}


def main() -> None:
    """Prints or writes the counts."""
    parser = argparse.ArgumentParser(prog="python -m tests.simt.traffic", description=__doc__)
    parser.add_argument("--write", action="store_true", help="the counts become the bounds")
    parser.add_argument("--places", metavar="KERNEL", help="where a kernel's counts come from")
    arguments = parser.parse_args()
    steps = small_problem()
    if arguments.places:
        for step, counts in steps.items():
            if records := counts.select(kernel=arguments.places):
                print(f"{step}\n{counting.table(records)}\n")
        return
    text = json.dumps(by_kernel(steps), indent=1) + "\n"
    if arguments.write:
        BOUNDS.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
