"""``python -m dyhead_cuda check``: it passes here, and it notices what is wrong."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dyhead_cuda import info, library
from dyhead_cuda.__main__ import main
from dyhead_cuda.commands import check, check_cases
from dyhead_cuda.commands.check_cases import SMALL, Case, Function, Shape
from dyhead_cuda.numerics import TOLERANCES
from tests.helpers.devices import needs_cpu_library


@needs_cpu_library
def test_everything_is_right_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == check.TITLE
    assert lines[-1].startswith("nothing wrong")
    assert all(line.endswith("  right") for line in lines[1:-1])
    checked = {line.split(": opcheck")[0] for line in lines if ": opcheck" in line}
    assert checked == set(info.gather()["operators"])
    heads = ("DyHead, flat", "DyHead, aligned", "UnifiedDyHead")
    for what in (*heads, "dynamic_relu", "deform_conv", "offset_deform_conv"):
        types = [line.split(" cpu ")[1].split()[0] for line in lines if line.startswith(what + " ")]
        assert types == [name for name in TOLERANCES if name != "tf32"], what


def relu_case(
    change: Callable[[Tensor], Tensor] = lambda t: t, shape: Shape = check_cases.USUAL
) -> Case:
    """The dynamic ReLU, whose compiled result is changed."""
    case = next(case for case in check_cases.operators(shape) if case.name == "dynamic_relu")
    right: Function = case.compiled

    def wrong(inputs: Sequence[Tensor]) -> list[Tensor]:
        return [change(t) for t in right(inputs)]

    return replace(case, compiled=wrong, expected=right)


class OneGradientLost(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        grad = grad.clone()
        grad.view(-1)[17] = 0
        return grad


@needs_cpu_library
@pytest.mark.parametrize("precision", ["float64", "float32", "float16", "bfloat16"])
def test_an_error_beyond_the_tolerance_is_noticed(precision: str) -> None:
    def result(factor: float) -> check.Result:
        case = relu_case(lambda t: (t.double() * (1 + factor * TOLERANCES[precision])).to(t.dtype))
        return check.compared_with_reference(case, "cpu", precision)

    assert result(0).right
    assert result(0.5).right
    wrong = result(2.5)
    assert not wrong.right
    assert str(wrong).endswith("WRONG")
    (forward, allowed), (backward, allowed_backward) = wrong.errors
    assert forward > allowed == TOLERANCES[precision]
    assert backward > allowed_backward == 2 * TOLERANCES[precision]


@needs_cpu_library
def test_one_wrong_gradient_is_noticed() -> None:
    result = check.compared_with_reference(relu_case(OneGradientLost.apply), "cpu", "float32")
    (forward, allowed), (backward, allowed_backward) = result.errors
    assert forward <= allowed
    assert backward > allowed_backward
    assert not result.right


class LargerGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return 1.01 * grad


@needs_cpu_library
def test_gradients_that_differences_deny_are_noticed() -> None:
    assert check.with_finite_differences(relu_case(shape=SMALL), "cpu").right
    result = check.with_finite_differences(relu_case(LargerGradient.apply, SMALL), "cpu")
    assert "Jacobian" in result.problem


@needs_cpu_library
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_noticed(value: float) -> None:
    case = relu_case(lambda t: t.index_fill(0, torch.tensor([1]), value))
    assert not check.compared_with_reference(case, "cpu", "float32").right


@needs_cpu_library
def test_another_type_and_an_exception_are_noticed() -> None:
    result = check.compared_with_reference(relu_case(Tensor.double), "cpu", "float32")
    assert "expected results of torch.float32" in str(result)

    def fail(inputs: Sequence[Tensor]) -> list[Tensor]:
        raise RuntimeError("no kernel image\nis available")

    case = replace(relu_case(), compiled=fail)
    told = "RuntimeError: no kernel image is available"
    assert check.compared_with_reference(case, "cpu", "float32").problem == told
    (result,) = check.as_torch_demands([case], "cpu")
    assert result.problem == told


@needs_cpu_library
def test_the_exit_status_says_that_something_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = [
        check.Result("a", "cpu", "float32"),
        check.Result("b", "cpu", "float32", problem="c"),
    ]
    monkeypatch.setattr(check, "results_on", lambda devices: results)
    assert main(["check", "--device", "cpu"]) == 1
    said = capsys.readouterr().out
    assert "WRONG: c" in said
    assert "1 wrong" in said
    assert "python -m dyhead_cuda info --json" in said


def test_without_a_library_there_is_nothing_to_check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = library._State(False, "it was eaten by the dog", "feed the dog")
    monkeypatch.setattr(library, "_STATES", {"cpu": missing, "cuda": missing})
    assert main(["check"]) == 2
    said = capsys.readouterr().out
    assert said.count("not checked, as its library is not loaded: it was eaten by the dog") == 2


def test_a_gpu_without_code_is_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_STATES", {"cuda": library._State(True)})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(library, "read_build_record", lambda: {"cuda": {"archs": ["80"]}})
    assert "this GPU has 7.5" in check.why_not("cuda")
    assert check.run(argparse.Namespace(device="cuda")) == 2


@pytest.mark.gpu
def test_everything_is_right_on_the_gpu() -> None:
    assert main(["check", "--device", "cuda"]) == 0
