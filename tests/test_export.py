"""torch.export and AOTInductor: programs of any size, which run with the library alone."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

import dyhead_cuda
from dyhead_cuda import compat, library
from dyhead_cuda.pyramid import HIGH_OFFSETS
from tests.helpers.compare import assert_close
from tests.helpers.inputs import halving_sizes, random_pyramid
from tests.helpers.paths import ROOT
from tests.helpers.published import mmdet

library.require("cpu")

CHANNELS, LEVELS = 16, 3
BATCH, HEIGHT, WIDTH = (Dim(name, min=1, max=64) for name in ("batch", "height", "width"))

Inputs = tuple[Any, ...]


def pyramid(batch: int, height: int, width: int) -> Inputs:
    sizes = halving_sizes(height, width, LEVELS)
    return (random_pyramid(batch, CHANNELS, sizes, torch.float32),)


def stacked(batch: int, height: int, width: int) -> Inputs:
    return (torch.randn(batch, 3, CHANNELS, height, width),)


def convolution(batch: int, height: int, width: int) -> Inputs:
    return tuple(torch.randn(batch, c, height, width) for c in (CHANNELS, 18, 9))


def maps(batch: int, height: int, width: int) -> Inputs:
    return (torch.randn(batch, CHANNELS, height, width),)


def head(**options: Any) -> nn.Module:
    return dyhead_cuda.DyHead(CHANNELS, CHANNELS, 2, num_groups=4, **options)


def conv() -> nn.Module:
    return dyhead_cuda.ModulatedDeformConv2d(CHANNELS, CHANNELS, 3, padding=1)


def accelerated() -> nn.Module:
    model = mmdet.DyHead(CHANNELS, CHANNELS, 1, zero_init_offset=False)
    return compat.accelerate(model)


def halves(parts: int) -> list[Any]:
    """Level l is 2 ** (parts - 1 - l) times as large as the last one."""
    factors = [1 << (parts - 1 - level) for level in range(parts)]
    return [
        {0: BATCH, 2: f * HEIGHT if f > 1 else HEIGHT, 3: f * WIDTH if f > 1 else WIDTH}
        for f in factors
    ]


FAST = {"aot_inductor.compile_wrapper_opt_level": "O0"}  # to compile
OPEN = {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}
# name: the model, its inputs, which of their sizes are open
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int, int], Inputs], Any]] = {
    "DyHead": (head, pyramid, ([OPEN] * LEVELS,)),
    "DyHead, multiples": (head, pyramid, (halves(LEVELS),)),
    **{
        f"DyHead, {rule}": (partial(head, high_offset=rule), pyramid, ([OPEN] * LEVELS,))
        for rule in HIGH_OFFSETS
        if rule != "flat"
    },
    "no bias, nearest": (
        lambda: head(deform_bias=False, upsample="nearest"),
        pyramid,
        ([OPEN] * LEVELS,),
    ),
    "accelerated": (accelerated, pyramid, ([OPEN] * LEVELS,)),
    "UnifiedDyHead": (
        lambda: dyhead_cuda.UnifiedDyHead(3, CHANNELS, 2),
        stacked,
        ({0: BATCH, 3: HEIGHT, 4: WIDTH},),
    ),
    "ModulatedDeformConv2d": (conv, convolution, ({0: BATCH, 2: HEIGHT, 3: WIDTH},) * 3),
    "DynamicReLU": (
        lambda: dyhead_cuda.DynamicReLU(CHANNELS),
        maps,
        ({0: BATCH, 2: HEIGHT, 3: WIDTH},),
    ),
}


def exported(name: str, strict: bool) -> tuple[nn.Module, torch.export.ExportedProgram]:
    make, inputs, sizes = CASES[name]
    torch.manual_seed(0)
    model = make().eval()
    # No side is equal to a batch or a number of channels, which would tie them together.
    program = torch.export.export(model, inputs(2, 20, 28), dynamic_shapes=sizes, strict=strict)
    return model, program


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
@pytest.mark.parametrize("name", CASES)
def test_a_saved_program_takes_any_size(name: str, strict: bool) -> None:
    model, program = exported(name, strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for batch, height, width in ((2, 20, 28), (1, 16, 24), (5, 44, 8)):
        inputs = CASES[name][1](batch, height, width)
        actual, expected = (pytree.tree_leaves(run(*inputs)) for run in (loaded, model))
        assert_close(actual, expected, torch.float32)


def test_a_program_is_few_operators() -> None:
    _, program = exported("DyHead", False)
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    ours = [name for name in names if name.startswith("dyhead.")]
    assert len(ours) == 2 + 2 * 3  # packing and unpacking, and three for each block
    assert len([name for name in names if "sym_size" not in name]) <= 2 + 2 * 16


# Loads the native library alone, as a C++ program would, and runs what was saved.
RUN = """
import sys, torch
assert "dyhead_cuda" not in sys.modules
library, file, kind, values, results = sys.argv[1:]
torch.ops.load_library(library)
if kind == "program":
    model = torch.export.load(file).module()
else:
    model = torch._inductor.aoti_load_package(file)
with torch.no_grad():
    torch.save(model(torch.load(values)), results)
"""


def run_without_the_package(kind: str, file: Path, inputs: list[Tensor]) -> list[Tensor]:
    values, results = file.with_suffix(".inputs"), file.with_suffix(".results")
    torch.save(inputs, values)
    environment = {name: v for name, v in os.environ.items() if name != "PYTHONPATH"}
    arguments = [str(library.path("cpu")), str(file), kind, str(values), str(results)]
    done = subprocess.run(
        [sys.executable, "-P", "-c", RUN, *arguments],
        cwd=file.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return list(torch.load(results))


def test_a_program_runs_with_the_library_alone(tmp_path: Path) -> None:
    model, program = exported("DyHead", False)
    file = tmp_path / "head.pt2"
    torch.export.save(program, file)
    (levels,) = pyramid(3, 32, 20)
    assert_close(run_without_the_package("program", file, levels), model(levels), torch.float32)


def test_a_program_without_the_library_says_what_to_import(tmp_path: Path) -> None:
    _, program = exported("ModulatedDeformConv2d", False)
    torch.export.save(program, tmp_path / "conv.pt2")
    code = "import torch; torch.export.load('conv.pt2')"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path,
        env={name: v for name, v in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0
    # PyTorch's own message: a file of its has no place for a hint of ours.
    assert "import the custom op" in done.stderr
    assert "torch.ops.dyhead" in done.stderr


def test_a_package_runs_with_the_library_alone_and_from_cpp(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = dyhead_cuda.DyHead(CHANNELS, CHANNELS, 1, num_groups=4, deform_bias=False).eval()
    (levels,) = pyramid(2, 20, 28)
    program = torch.export.export(model, (levels,), dynamic_shapes=([OPEN] * LEVELS,))
    file = tmp_path / "head.pt2"
    torch._inductor.aoti_compile_and_package(program, package_path=str(file), inductor_configs=FAST)
    (levels,) = pyramid(3, 32, 20)
    assert_close(run_without_the_package("package", file, levels), model(levels), torch.float32)

    torch_directory = Path(torch.__file__).parent
    binary = tmp_path / "run_head"
    include, lib = torch_directory / "include", torch_directory / "lib"
    subprocess.run(
        [
            "c++", "-std=c++20", str(ROOT / "examples" / "cpp" / "run_head.cpp"),
            "-o", str(binary), f"-I{include}", f"-I{include}/torch/csrc/api/include", f"-L{lib}",
            "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{lib}",
        ],
        check=True,
        timeout=300,
    )  # fmt: skip
    done = subprocess.run(
        [str(binary), str(library.path("cpu")), str(file), str(CHANNELS), str(LEVELS)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"[1, 16, {side}, {side}]" for side in (64, 32, 16)]
