"""What is measured: data, ways to compute it, work by formula, and how wrong results are found."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.cases import common, peers, problems
from benchmarks.cases.heads import CASES, problem_of
from benchmarks.cases.precisions import PRECISIONS, products
from benchmarks.cases.problems import BOTH, DIRECTIONS, FORWARD, OURS, Maps, Problem, Setting, Work
from benchmarks.cases.shapes import SHAPE_SETS, SMALL_LEVELS, ShapeSet
from benchmarks.measuring import checking, selection, timing
from benchmarks.measuring.checking import Action, WrongResultError
from dyhead_cuda import backends
from dyhead_cuda.ops.common import tf32_allowed

CPU = torch.device("cpu")
MICRO = ShapeSet("micro", "for this test", ((6, 7), (3, 4), (2, 2)), 2, 16, 4)


@pytest.fixture(autouse=True)
def _one_thread(threads: None) -> None:
    torch.set_num_threads(1)  # what is tiny is slower on more


def setting(case: str, batch: int = 2) -> Setting:
    return Setting(case, MICRO, batch, 2 if case in ("head", "unified") else 1)


def results_of(
    problem: Problem, how: problems.Implementation, direction: str, precision: str
) -> Any:
    action = Action(problem, how, precision, CPU)
    with action.context():
        return action.as_maps(action.prepare(direction)())


@pytest.mark.parametrize("case", CASES)
def test_every_implementation_computes_the_case(case: str) -> None:
    problem = problem_of(setting(case))
    right = checking.expected(problem, CPU, BOTH, last_only=False)
    assert len(right.inputs) == len(problem.images)
    assert all(x.dtype == torch.float64 for x in right.outputs)
    names = [how.name for how in problem.implementations]
    assert names[0] == OURS
    assert len(names) == len(set(names))
    for how in problem.implementations:
        if how.compiled:
            continue
        found = results_of(problem, how, BOTH, "float32")
        if how.bar:
            continue
        error = checking.check(problem, how, "float32", found, right)
        assert (error == 0) == (case == "pack_levels"), how.name  # what only copies is exact
        assert error < 1e-4


@pytest.mark.parametrize("case", ["head", "fuse_branches", "dynamic_relu"])
def test_compiled_peers_compute_the_case(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without the code generator, which takes half a minute.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    problems.compiled.cache_clear()
    problem = problem_of(setting(case, 1))
    how = next(how for how in problem.implementations if how.compiled)
    right = checking.expected(problem, CPU, BOTH, last_only=False)
    checking.check(problem, how, "float32", results_of(problem, how, BOTH, "float32"), right)
    problems.compiled.cache_clear()


@pytest.mark.parametrize("precision", ["float64", "float16", "bfloat16"])
def test_ours_is_right_in_every_precision(precision: str) -> None:
    for case in ("block", "branches", "fuse_branches", "dynamic_relu"):
        problem = problem_of(setting(case))
        right = checking.expected(problem, CPU, BOTH, last_only=False)
        ours = problem.implementations[0]
        checking.check(problem, ours, precision, results_of(problem, ours, BOTH, precision), right)


def test_one_image_of_the_reference_judges_any_batch() -> None:
    three, one = (problem_of(setting("block", batch)) for batch in (3, 1))
    ours = three.implementations[0]
    right = checking.expected(three, CPU, BOTH, last_only=True)
    same = checking.expected(one, CPU, BOTH, last_only=False)
    for a, b in zip([*right.outputs, *right.inputs], [*same.outputs, *same.inputs], strict=True):
        assert torch.equal(a, b)
    found = results_of(three, ours, BOTH, "float32")
    assert len(found.parameters) == len(right.parameters) > 0
    checking.check(three, ours, "float32", found, right)
    swapped = replace(found, outputs=[x.flip(0) for x in found.outputs])
    with pytest.raises(WrongResultError, match="the outputs"):
        checking.check(three, ours, "float32", swapped, right)


def _slightly_larger(run: problems.Run) -> problems.Run:
    return lambda module, inputs: [x * 1.001 for x in run(module, inputs)]


def _another_gradient(run: problems.Run) -> problems.Run:
    return lambda module, inputs: [
        x + 0.1 * (inputs[0].sum() - inputs[0].sum().detach()) for x in run(module, inputs)
    ]


def _not_a_number(run: problems.Run) -> problems.Run:
    return lambda module, inputs: [x * math.nan for x in run(module, inputs)]


def _another_shape(run: problems.Run) -> problems.Run:
    return lambda module, inputs: [x[..., :-1] for x in run(module, inputs)]


@pytest.mark.parametrize(
    ("spoil", "direction", "message"),
    [
        (_slightly_larger, FORWARD, "the outputs of at most 2e-06, got 1.0e-03"),
        (_another_gradient, BOTH, "the inputs' gradients"),
        (_not_a_number, FORWARD, "got nan"),
        (_another_shape, FORWARD, r"expected a result of \[1, 16, 6, 7\]"),
    ],
)
def test_a_wrong_result_is_found(spoil: Any, direction: str, message: str) -> None:
    problem = problem_of(setting("dynamic_relu", 1))
    ours = problem.implementations[0]
    wrong = replace(ours, run=spoil(ours.run))
    right = checking.expected(problem, CPU, direction, last_only=False)
    with pytest.raises(WrongResultError, match=message):
        checking.check(
            problem, wrong, "float32", results_of(problem, wrong, direction, "float32"), right
        )


def test_gradients_may_jump_at_real_sizes_alone() -> None:
    problem = problem_of(setting("block", 1))
    ours = problem.implementations[0]
    right = checking.expected(problem, CPU, BOTH, last_only=False)
    found = results_of(problem, ours, BOTH, "float32")
    moved = replace(found, inputs=[x * 1.01 for x in found.inputs])
    with pytest.raises(WrongResultError, match="the inputs' gradients of at most 1e-04"):
        checking.check(problem, ours, "float32", moved, right)
    checking.check(problem, ours, "float32", moved, right, real=True)
    far = replace(found, inputs=[x * 1.1 for x in found.inputs])
    with pytest.raises(WrongResultError, match="the inputs' gradients of at most 5e-02"):
        checking.check(problem, ours, "float32", far, right, real=True)


def test_wrong_gradients_of_parameters_are_found() -> None:
    problem = problem_of(setting("dynamic_relu", 1))
    ours = problem.implementations[0]

    def run(relu: Any, inputs: Maps) -> Maps:
        bias = relu.fc2.bias
        return [ours.run(relu, inputs)[0] + 0.1 * (bias.sum() - bias.sum().detach())]

    found = results_of(problem, replace(ours, run=run), BOTH, "float32")
    right = checking.expected(problem, CPU, BOTH, last_only=False)
    with pytest.raises(WrongResultError, match="the parameters' gradients"):
        checking.check(problem, ours, "float32", found, right)


def test_ours_runs_on_compiled_kernels_and_the_reference_on_none() -> None:
    problem = problem_of(setting("deform_conv", 1))
    seen = []

    def spy(run: problems.Run) -> problems.Run:
        def spied(module: nn.Module, inputs: Maps) -> Maps:
            seen.append(backends.current())
            return run(module, inputs)

        return spied

    for how in problem.implementations[:3]:
        results_of(problem, replace(how, run=spy(how.run)), FORWARD, "float32")
    assert seen == ["cpu", "reference", "auto"]
    assert backends.current() == "auto"


def test_inputs_are_random_exact_and_repeatable() -> None:
    first, second = (problem_of(setting("block")) for _ in range(2))
    tensors = [*first.images, *first.module.parameters()]
    for a, b in zip(tensors, [*second.images, *second.module.parameters()], strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, a.to(torch.bfloat16).float())
        assert a.numel() == 1 or a.std() > 0.01
    images = first.images[0]
    assert 0.8 < images.std() < 1.2
    assert not torch.equal(images[0], images[1])
    cotangents = checking.cotangents_for(first.images)
    assert not torch.equal(cotangents[0], images)


def test_offsets_avoid_whole_pixels() -> None:
    offset = problem_of(Setting("deform_conv", SHAPE_SETS["tiny"], 1)).images[1]
    assert not (offset == offset.round()).any()


# --- work ---------------------------------------------------------------------------------------


def test_shapes_are_those_of_the_images() -> None:
    glip = SHAPE_SETS["glip"]
    assert glip.levels == ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))
    assert glip.pixels == 22400
    assert SHAPE_SETS["mmdet"].levels[0] == (112, 176)
    assert SHAPE_SETS["swin"].levels[-1] == (10, 16)
    assert SHAPE_SETS["masa"].levels == ((256, 256), (128, 128), (64, 64), (32, 32), (16, 16))
    assert SHAPE_SETS["yolo"].levels == ((80, 80), (40, 40), (20, 20))
    assert SHAPE_SETS["yolo"].blocks == 2


def test_branches_of_three_levels() -> None:
    assert common.branch_sizes(((8, 6), (4, 3), (2, 2))) == [
        *((8, 6), (4, 3)),
        *((4, 3), (4, 3), (2, 2)),
        *((2, 2), (2, 2)),
    ]
    assert common.branch_counts(SMALL_LEVELS) == [2, 3, 2]


def test_work_of_a_deformable_convolution() -> None:
    work = problem_of(setting("deform_conv")).work
    pixels = 2 * 6 * 7
    assert work.flops == 2 * 9 * 16 * 16 * pixels
    assert work.reads == pixels * (16 + 18 + 9) + 16 * 16 * 9 + 16
    assert work.writes == pixels * 16


def test_work_of_a_block_of_the_design() -> None:
    # 39.6 GFLOP of deformable and 2.8 of offset convolutions, 5 x 2 x 256 x 64 x 5 of the ReLU's.
    one = problem_of(Setting("block", SHAPE_SETS["glip"])).work
    deformable = 2 * 9 * 256 * 256 * (22400 + 5600 + 5600)
    offsets = 2 * 9 * 256 * 27 * 22400
    assert one.flops == deformable + offsets + 5 * 2 * (256 * 64 + 64 * 1024)
    parameters = 3 * (256 * 256 * 9 + 3 * 256) + 27 * (256 * 9 + 1) + 257
    parameters += 64 * 257 + 1024 * 65
    assert one.reads == 22400 * 256 + parameters
    assert one.writes == 22400 * 256


def test_work_of_a_head_is_that_of_its_blocks() -> None:
    one, two = problem_of(setting("block")).work, problem_of(setting("head")).work
    assert two == Work(2 * one.flops, 2 * one.reads, 2 * one.writes)


def test_work_of_the_other_operators() -> None:
    pixels = 2 * (6 * 7 + 3 * 4 + 2 * 2)
    branch_pixels = 2 * (42 + 12 + 12 + 12 + 4 + 4 + 4)
    offset = problem_of(setting("offset_conv")).work
    assert offset == Work(2 * 9 * 16 * 27 * pixels, pixels * 16 + 27 * 16 * 9 + 27, pixels * 27)
    assert problem_of(setting("pack_levels")).work == Work(0, 16 * pixels, 16 * pixels)
    branches = problem_of(setting("branches")).work
    assert branches.flops == 2 * 9 * 16 * 16 * branch_pixels
    assert branches.writes == 16 * branch_pixels
    fuse = problem_of(setting("fuse_branches")).work
    assert fuse == Work(0, 16 * (branch_pixels + 2 * (7 + 3 + 3 * 4)), 16 * pixels)
    coefficients = problem_of(setting("block_coefficients")).work
    assert coefficients == Work(
        2 * 3 * 2 * (16 * 4 + 4 * 64),
        3 * 2 * 7 * 16 + 3 * 2 * 16 + 17 + 4 * 17 + 64 * 5,
        2 * 16 * (7 + 3 * 5),
    )
    relu = problem_of(setting("dynamic_relu")).work
    assert relu.flops == 2 * 2 * (16 * 4 + 4 * 64)
    spatial = problem_of(setting("spatial_attention")).work
    assert spatial.flops == 2 * 2 * 9 * 16 * (3 * 16 + 27) * 12
    unified = problem_of(setting("unified")).work
    assert unified.flops == 2 * (2 * 2 * 9 * 16 * 12 * (9 * 16 + 3 * 27) + relu.flops)


def test_bytes_and_products_of_both_directions() -> None:
    work = Work(flops=10, reads=5, writes=3)
    assert (work.flops_of(FORWARD), work.flops_of(BOTH)) == (10, 30)
    # Backward: inputs and parameters, the outputs' gradient; writes the gradients of the former.
    assert (work.bytes_of(FORWARD, 2), work.bytes_of(BOTH, 2)) == (16, 2 * (8 + 5 + 3 + 5))
    assert work + work == Work(20, 10, 6)


# --- plans --------------------------------------------------------------------------------------


def test_a_selection_is_the_product_of_what_was_chosen() -> None:
    chosen = selection.Selection(
        cases=("head", "block"), shapes=("glip", "yolo"), batches=(1, 8), precisions=("tf32",)
    )
    entries = selection.entries(chosen, "cuda")
    assert [(e.setting.case, e.setting.shapes.name, e.setting.blocks) for e in entries[::2]] == [
        ("head", "glip", 6),
        ("head", "yolo", 2),
        ("block", "glip", 1),
        ("block", "yolo", 1),
    ]
    assert {e.precisions for e in entries} == {("tf32",)}
    assert {e.directions for e in entries} == {DIRECTIONS}
    eight = selection.entries(selection.Selection(cases=("head",), blocks=(6, 8)), "cpu")
    assert [e.setting.blocks for e in eight] == [6, 8]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_usual_run_grows_a_block(device: str) -> None:
    entries = selection.entries(selection.Selection(), device)
    grown = {(e.setting.shapes.name, e.setting.batch) for e in entries if not e.real_check}
    assert grown == set(selection.SWEEP)
    assert all(e.setting.case in CASES for e in entries)
    assert entries[0].setting.case == ("head" if device == "cuda" else "block")


def test_quick_is_tiny_and_compiles_nothing() -> None:
    entries = selection.entries(selection.Selection(quick=True), "cpu")
    assert {e.setting.shapes.name for e in entries} == {"tiny"}
    assert all("compile" not in e.families for e in entries)


# --- precisions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
def test_only_tf32_rounds_products(precision: str) -> None:
    def switches() -> list[bool]:
        return [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32]

    before = switches()
    with products(precision):
        assert switches() == [precision == "tf32"] * 2
        assert tf32_allowed() == (precision == "tf32")
    assert switches() == before


def test_a_peer_without_bfloat16_runs_in_its_best_precision() -> None:
    implementations = problem_of(setting("block", 1)).implementations
    by_name = {how.name: how for how in implementations}
    assert by_name["torchvision"].precision_for("bfloat16", CPU) == "float32"
    assert by_name["torchvision"].precision_for("float64", CPU) == "float64"
    assert by_name["reference"].precision_for("bfloat16", CPU) == "float32"
    assert by_name[OURS].precision_for("bfloat16", CPU) == "bfloat16"


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"direction to be one of \('forward', .*got 'backward'"):
        Work(1, 1, 1).flops_of("backward")
    with pytest.raises(ValueError, match="direction to be one of"):
        Work(1, 1, 1).bytes_of("backward", 4)
    problem = problem_of(Setting("dynamic_relu", SHAPE_SETS["tiny"]))
    action = Action(problem, problem.reference, "float32", torch.device("cpu"))
    with pytest.raises(ValueError, match="direction to be one of"):
        action.prepare("backward")
    with pytest.raises(ValueError, match=r"family to be one of .*'mmcv'.*, got 'detectron'"):
        problems.Implementation("detectron", "detectron", lambda module, inputs: inputs)
    features, weight = torch.rand(1, 2, 4, 3, 3), torch.rand(2, 4, 4, 3, 3)
    predictor = torch.rand(27, 4, 3, 3), torch.rand(27)
    operator = peers.deform_convs()["torchvision"]
    with pytest.raises(ValueError, match=r"targets to be one of .*'median'.*, got 'middle'"):
        peers.spatial_attention(features, weight, *predictor, "middle", operator)


def test_an_unknown_way_to_time_is_refused() -> None:
    with pytest.raises(ValueError, match=r"method to be one of .*'graph'.*, got 'hot'"):
        timing.measure(lambda: None, torch.device("cpu"), timing.QUICK, "hot")
