"""The rule of the fuzz: the right answer or a documented exception, and arguments as they were."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

from dyhead_cuda import backend
from dyhead_cuda.numerics import TOLERANCES, gradient_errors
from tests.fuzz.cases import Call

NEVER = (AttributeError, KeyError, IndexError, NameError, UnboundLocalError, AssertionError)


def problem_of(call: Call) -> str:
    """What is wrong with a call; "" if nothing is."""
    before = [(t, t.detach().clone()) for t in call.tensors() if plain(t)]
    if call.gradients:
        require_gradients(call)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of sparse and nested tensors
        try:
            results = call.function(*call.arguments, **call.options)
        except Exception as error:
            problem = refusal_problem(call, error)
        else:
            problem = result_problem(call, results)
    for t, copied in before:
        if not same(t.detach(), copied):
            return f"an input was changed, of {list(t.shape)}; {problem}"
    return problem


def refusal_problem(call: Call, error: Exception) -> str:
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if not call.spoiled:
        return f"a good call raised {text}"
    if "allocate memory" in text or "Storage size calculation overflowed" in text:
        return ""
    if isinstance(error, NEVER) or not isinstance(error, call.raised):
        return f"raised {text}"
    if not str(error):
        return f"raised {text} without a word"
    return ""


def result_problem(call: Call, results: Any) -> str:
    """What is wrong with results, against the judge or the fake kernel."""
    if call.expected is None:
        return fake_problem(call, results)
    found = tensors_of(results)
    exact_arguments, exact_options = exact((call.arguments, call.options))
    try:
        with backend("reference"):
            wanted = tensors_of(call.expected(*exact_arguments, **exact_options))
    except Exception as error:
        return f"gave a result where the judge raised {type(error).__name__}: {error}"
    if [t.shape for t in found] != [t.shape for t in wanted]:
        return f"shapes {[list(t.shape) for t in found]}, not {[list(t.shape) for t in wanted]}"
    if call.owns and shares_memory(found, call.tensors()):
        return "a result shares its memory with an argument"
    if any(t.device.type == "meta" for t in found):
        return ""
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        allowed = call.factor * tolerance(call, a.dtype)
        problem = value_problem(a, b, allowed, call.floor)
        if problem:
            return f"result {i}: {problem}"
    if call.gradients:
        return gradient_problem(call, found, wanted, (exact_arguments, exact_options))
    return ""


def value_problem(actual: Tensor, expected: Tensor, allowed: float, floor: float) -> str:
    """Finite where the judge is, not finite where it is not, and within the tolerance."""
    a, b = actual.detach().double(), expected.detach().double()
    finite = b.isfinite()
    if not torch.equal(a.isfinite(), finite):
        return f"{int((a.isfinite() != finite).sum())} values are (not) finite, unlike the judge's"
    error, size = float((a - b)[finite].norm()), float(b[finite].norm())
    size = max(size, floor * a.numel() ** 0.5)
    if error > allowed * size + 1e-30:
        return f"relative L2 error {error / max(size, 1e-300):.3g}, allowed {allowed:.3g}"
    return ""


def gradient_problem(
    call: Call, found: Sequence[Tensor], wanted: Sequence[Tensor], exact_values: Any
) -> str:
    """The same for the gradients of everything that has one, by random cotangents."""
    if any(b.requires_grad and not a.requires_grad for a, b in zip(found, wanted, strict=True)):
        return "a result has no gradient where the judge's has"
    pairs = [(a, b) for a, b in zip(found, wanted, strict=True) if b.requires_grad]
    if not pairs:
        return ""
    found, wanted = zip(*pairs, strict=True)
    inputs = [t for t in call.tensors() if t.requires_grad]
    leaves = [t for t in pytree.tree_leaves(exact_values) if isinstance(t, Tensor)]
    exact_inputs = [t for t in leaves if t.requires_grad]
    source = torch.Generator().manual_seed(3)
    cotangents = [torch.randn(t.shape, generator=source, dtype=torch.float64) for t in wanted]
    rounded = [g.to(t.dtype) for g, t in zip(cotangents, found, strict=True)]
    ours = torch.autograd.grad(found, inputs, rounded, materialize_grads=True)
    theirs = torch.autograd.grad(
        wanted, exact_inputs, [g.double() for g in rounded], materialize_grads=True
    )
    if not all(bool(g.isfinite().all()) for g in theirs):
        return ""  # infinity times a weight of 0 is another NaN in each order of sums
    allowed = 2 * call.factor * tolerance(call, found[0].dtype)
    for i, error in enumerate(gradient_errors(ours, theirs, floor=2e-2)):
        if not error <= allowed:
            return f"gradient {i}: relative L2 error {error:.3g}, allowed {allowed:.3g}"
    return ""


def fake_problem(call: Call, results: Any) -> str:
    """Whether the shapes and types are those that a compiler was told."""
    found = tensors_of(results)
    if call.spoiled and any(not plain(t) for t in call.tensors()):
        return ""  # of a tensor of no memory
    if any(isinstance(value, Iterator) for value in call.arguments):
        return ""  # which is used up
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            wanted = tensors_of(call.function(*call.arguments, **call.options))
    except Exception as error:
        if call.spoiled and "Expected a value of type" in str(error):
            return ""  # a tensor for a number, which only a call that is not traced takes
        return f"gave a result where the fake kernel raised {type(error).__name__}: {error}"
    ours = [(list(t.shape), t.dtype) for t in found]
    theirs = [(list(t.shape), t.dtype) for t in wanted]
    return "" if ours == theirs else f"results of {ours}, where the fake kernel has {theirs}"


def tolerance(call: Call, dtype: torch.dtype) -> float:
    """Of the coarsest type that takes part."""
    modules = [value for value in call.arguments if isinstance(value, nn.Module)]
    tensors = [*call.tensors(), *(p for module in modules for p in module.parameters())]
    kinds = [dtype, *(t.dtype for t in tensors if t.is_floating_point())]
    names = [str(kind).removeprefix("torch.") for kind in kinds]
    return max(TOLERANCES[name] for name in names if name in TOLERANCES)


def tensors_of(results: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(results) if isinstance(t, Tensor)]


def plain(t: Tensor) -> bool:
    """Whether a tensor has values that can be compared."""
    strided = t.layout is torch.strided and not t.is_nested and not t.is_quantized
    return strided and t.device.type == "cpu"


def same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all())


def shares_memory(results: Sequence[Tensor], arguments: Sequence[Tensor]) -> bool:
    taken = {t.untyped_storage().data_ptr() for t in arguments if plain(t) and t.numel() > 0}
    own = [t for t in results if plain(t) and t.numel() > 0]
    return any(t.untyped_storage().data_ptr() in taken for t in own)


def require_gradients(call: Call) -> None:
    """Make leaves that ask for gradients of all floating tensors, in place."""

    def asked(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point() and plain(value):
            return value.detach().requires_grad_()
        return value

    call.arguments[:] = pytree.tree_map(asked, call.arguments)
    call.options.update(pytree.tree_map(asked, call.options))


def exact(value: Any) -> Any:
    """The same in float64: what the judge gets."""

    def double(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and plain(leaf):
            return leaf.detach().double().clone().requires_grad_(leaf.requires_grad)
        if isinstance(leaf, nn.Module):
            return copy.deepcopy(leaf).double()
        return leaf

    return pytree.tree_map(double, value)
