"""Which implementation runs: nesting, exceptions, and errors that say why."""

from __future__ import annotations

import asyncio
import logging
import re
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor

from dyhead_cuda import DynamicReLU, backend, backends, library
from dyhead_cuda.backends import Backend
from tests.helpers.devices import needs_cpu_library
from tests.helpers.paths import ROOT
from tests.helpers.spy import Spy


def on(device: str) -> Tensor:
    """What `select` looks at, for devices that this machine may not have."""
    return cast(Tensor, SimpleNamespace(device=torch.device(device)))


def state(loaded: bool, reason: str = "", fix: str = "") -> library._State:
    return library._State(loaded, reason, fix)


LOADED = {"cpu": state(True), "cuda": state(True)}
MISSING = {
    "cpu": state(False, "it was eaten by the dog", "feed the dog"),
    "cuda": state(False, "torch is a build without CUDA", "install a CUDA build of torch"),
}


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, library._State]]:
    """The libraries' states, to be changed by the test."""
    changed = dict(library._STATES)
    monkeypatch.setattr(library, "_STATES", changed)
    for cached in (backends._warn_once, backends._examine_gpu):
        cached.cache_clear()
    yield changed
    for cached in (backends._warn_once, backends._examine_gpu):
        cached.cache_clear()


def compiled_calls() -> int:
    with Spy() as spy, torch.no_grad():
        DynamicReLU(8)(torch.randn(2, 8, 3, 4))
    return spy.calls


def test_auto_is_the_default() -> None:
    assert backends.current() == "auto"


def test_nesting() -> None:
    with backend("reference"):
        assert backends.current() == "reference"
        with backend("cpu"):
            assert backends.current() == "cpu"
            with backend("auto"):
                assert backends.current() == "auto"
            assert backends.current() == "cpu"
        assert backends.current() == "reference"
    assert backends.current() == "auto"


def test_an_exception_restores_what_was_before() -> None:
    with backend("cpu"):
        with pytest.raises(KeyError), backend("reference"):
            raise KeyError
        assert backends.current() == "cpu"
    assert backends.current() == "auto"


def test_one_block_can_be_entered_again() -> None:
    @backend("reference")
    def which() -> str:
        return backends.current()

    assert [which(), backends.current(), which(), backends.current()] == [
        "reference", "auto", "reference", "auto",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["", "gpu", "CPU", None])
def test_unknown_names(name: str) -> None:
    with (
        pytest.raises(ValueError, match=r"'auto', 'reference', 'cpu', 'cuda'.*got") as error,
        backend(cast(Backend, name)),
    ):
        raise AssertionError("the block of an unknown backend ran")
    assert repr(name) in str(error.value)
    assert backends.current() == "auto"


@needs_cpu_library
def test_what_runs_on_the_cpu() -> None:
    assert compiled_calls() == 1
    with backend("cpu"):
        assert compiled_calls() == 1
    with backend("reference"):
        assert compiled_calls() == 0


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta", "mps"])
def test_the_reference_takes_any_device(device: str, states: dict[str, library._State]) -> None:
    states.update(LOADED)
    with backend("reference"):
        assert backends.select(on(device)) == "reference"


@pytest.mark.parametrize(
    ("device", "chosen"),
    [
        ("cpu", "cpu"),
        ("cuda", "cuda"),
        ("cuda:1", "cuda"),
        ("meta", "reference"),
        ("mps", "reference"),
    ],
)
def test_auto_follows_the_device(
    device: str, chosen: str, states: dict[str, library._State]
) -> None:
    states.update(LOADED)
    assert backends.select(on(device)) == chosen


def test_auto_without_libraries_is_the_reference(
    states: dict[str, library._State], caplog: pytest.LogCaptureFixture
) -> None:
    states.update(MISSING)
    with caplog.at_level(logging.WARNING, "dyhead_cuda"):
        assert backends.select(on("cpu")) == "reference"
        assert caplog.records == []  # the loader has said so once
        assert [backends.select(on("cuda")) for _ in range(3)] == ["reference"] * 3
    assert len(caplog.records) == 1
    assert "without CUDA" in caplog.text
    assert compiled_calls() == 0


@pytest.fixture
def two_gpus(states: dict[str, library._State], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An A100 and a T4, with a library for the first; how often each was asked what it is."""
    asked = [0, 0]

    def capability(index: int) -> tuple[int, int]:
        asked[index] += 1
        return ((8, 0), (7, 5))[index]

    states.update(LOADED)
    record = {"cuda": {"built": True, "archs": ["80"]}}
    monkeypatch.setattr(library, "read_build_record", lambda: record)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    return asked


def test_auto_on_a_gpu_without_code_is_the_reference(
    two_gpus: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "dyhead_cuda"):
        assert [backends.select(on("cuda:0")) for _ in range(3)] == ["cuda"] * 3
        assert caplog.records == []
        assert [backends.select(on("cuda:1")) for _ in range(3)] == ["reference"] * 3
    assert len(caplog.records) == 1
    assert "need compute capability 8.0 or newer, this GPU has 7.5" in caplog.text
    assert two_gpus == [1, 1]


@pytest.mark.usefixtures("two_gpus")
def test_cuda_asked_for_on_a_gpu_without_code_raises() -> None:
    with backend("cuda"):
        assert backends.select(on("cuda:0")) == "cuda"
        with pytest.raises(RuntimeError, match=r'backend "cuda" cannot run here: .* has 7\.5'):
            backends.select(on("cuda:1"))


def test_a_gpu_without_code_in_compiled_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Dynamo must take the answer as a constant: the question itself would break the graph.
    monkeypatch.setattr(backends, "_examine_gpu", lambda index: "too old" if index == 1 else "")

    def chosen(x: Tensor) -> Tensor:
        first, second = backends._why_not_on_gpu(0), backends._why_not_on_gpu(1)
        return x + (1 if first else 2) + (3 if second else 4)

    torch._dynamo.reset()
    compiled = torch.compile(chosen, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(())) == 5


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_a_missing_library_gives_reason_and_fix(
    name: Backend, states: dict[str, library._State]
) -> None:
    states.update(MISSING)
    with backend(name), pytest.raises(RuntimeError) as error:
        backends.select(on(name))
    assert MISSING[name].reason in str(error.value)
    assert MISSING[name].fix in str(error.value)


def test_cuda_asked_for_where_there_is_none(states: dict[str, library._State]) -> None:
    # Advice to move the tensors to a GPU would help nobody here.
    states["cuda"] = MISSING["cuda"]
    with backend("cuda"), pytest.raises(RuntimeError, match=r"a build without CUDA"):
        DynamicReLU(8)(torch.randn(2, 8, 3))


@pytest.mark.parametrize(("name", "device"), [("cpu", "cuda:0"), ("cuda", "cpu"), ("cpu", "meta")])
def test_tensors_of_another_device(
    name: Backend, device: str, states: dict[str, library._State]
) -> None:
    states.update(LOADED)
    message = f'backend "{name}" takes {name} tensors, got one on {device}.*backend\\("auto"\\)'
    with backend(name), pytest.raises(ValueError, match=message):
        backends.select(on(device))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_both_libraries_have_all_operators(device: str) -> None:
    if not library.loaded(device):
        pytest.skip(f"the {device} library is not loaded: {library.reason(device)}")
    names = [
        name
        for path in (ROOT / "csrc" / "host").glob("*.cpp")
        for name in re.findall(r'"(\w+)\(Tensor', path.read_text())
    ]
    assert len(names) == 12
    for name in names:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dyhead::{name}", device.upper()), (
            name
        )


def test_threads_that_overlap_keep_their_own_backends() -> None:
    entered, left = threading.Barrier(2), threading.Barrier(2)
    seen: dict[str, list[str]] = {}

    def first() -> None:
        with backend("reference"):
            entered.wait()  # both are inside
            seen["first"] = [backends.current()]
        left.wait()  # the first has left, the second is inside
        seen["first"].append(backends.current())

    def second() -> None:
        before = backends.current()
        with backend("cpu"):
            entered.wait()
            left.wait()
            seen["second"] = [before, backends.current()]
        seen["second"].append(backends.current())

    with backend("reference"):
        threads = [threading.Thread(target=function) for function in (first, second)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert backends.current() == "reference"
    assert seen == {"first": ["reference", "auto"], "second": ["auto", "cpu", "auto"]}
    assert backends.current() == "auto"


def test_tasks_that_overlap_keep_their_own_backends() -> None:
    async def task(name: Backend, turns: int) -> list[str]:
        found = []
        with backend(name):
            for _ in range(turns):
                await asyncio.sleep(0)
                found.append(backends.current())
        return [*found, backends.current()]

    async def both() -> tuple[list[str], list[str]]:
        with backend("cpu"):
            first, second = await asyncio.gather(task("reference", 2), task("auto", 4))
            return first, second

    assert asyncio.run(both()) == (["reference"] * 2 + ["cpu"], ["auto"] * 4 + ["cpu"])
    assert backends.current() == "auto"


@needs_cpu_library
def test_compiled_code_follows_the_backend() -> None:
    relu, x = DynamicReLU(8), torch.randn(2, 8, 3, 4)
    torch._dynamo.reset()
    compiled = torch.compile(relu, fullgraph=True, backend="eager")
    calls = []
    for name in ("auto", "reference", "cpu", "reference", "auto"):
        with backend(name), Spy() as spy, torch.no_grad():
            compiled(x)
        calls.append(spy.calls)
    assert calls == [1, 0, 1, 0, 1]
