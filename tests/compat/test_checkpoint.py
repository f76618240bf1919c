"""compat.load_checkpoint(path): foreign files are read, and nothing in them is run."""

from __future__ import annotations

import collections
import copyreg
import os
import pickle
import re
import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dyhead_cuda import DyHead, compat
from dyhead_cuda.compat.checkpoint import Unknown
from tests.helpers.published import ultralytics
from tests.helpers.published_models import CHANNELS, assert_same, microsoft_model, mmdet_model


@pytest.fixture
def foreign() -> Iterator[types.ModuleType]:
    """A package that is there when a file is written, and gone when it is read."""
    module = types.ModuleType("foreign_package")

    def mean(values: Any) -> float:
        pytest.fail("a function of the file was called")

    class HistoryBuffer:
        """As mmengine's: arrays, a limit, and functions of the package among its attributes."""

        def __init__(self) -> None:
            self.history, self.limit = np.arange(3.0), 1000
            self.methods = {"mean": mean, "current": mean}

        def __setstate__(self, state: Any) -> None:
            pytest.fail("a method of the file's class was called")

    class ConfigDict(dict):
        """As mmengine's: a dict with another class."""

    class Events(list):
        """A list with another class."""

    for thing in (mean, HistoryBuffer, ConfigDict, Events):
        thing.__module__, thing.__qualname__ = module.__name__, thing.__name__
        setattr(module, thing.__name__, thing)
    sys.modules[module.__name__] = module
    yield module
    sys.modules.pop(module.__name__, None)


def written(path: Path, value: Any, foreign: types.ModuleType, **settings: Any) -> Path:
    torch.save(value, path, **settings)
    sys.modules.pop(foreign.__name__)
    return path


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_of_mmengine(tmp_path: Path, foreign: Any, zipped: bool) -> None:
    state = mmdet_model().float().state_dict()
    config = foreign.ConfigDict(type="ATSS", neck=foreign.ConfigDict(channels=32))
    value = {
        "meta": {"epoch": 12, "cfg": config, "time": np.float64(1.5), "seed": None},
        "state_dict": state,
        "message_hub": {"log_scalars": {"train/loss": foreign.HistoryBuffer()}},
        "events": foreign.Events([1, 2]),
        "optimizer": {"state": collections.defaultdict(dict), "steps": collections.deque([1, 2])},
        "param_schedulers": [{"lr": 0.1, "dtype": torch.float32, "size": torch.Size([2])}],
        "ema_state_dict": {"steps": torch.tensor(3)},
    }
    path = written(tmp_path / "epoch_12.pth", value, foreign, _use_new_zipfile_serialization=zipped)
    with pytest.raises(pickle.UnpicklingError, match=r"[Ww]eights"):
        torch.load(path, weights_only=True)
    found = compat.load_checkpoint(path)
    assert foreign.__name__ not in sys.modules
    assert_same(found["state_dict"], state)
    assert found["meta"] == {
        "epoch": 12,
        "cfg": {"type": "ATSS", "neck": {"channels": 32}},
        "time": 1.5,
        "seed": None,
    }
    buffer = found["message_hub"]["log_scalars"]["train/loss"]
    assert isinstance(buffer, Unknown)
    assert "stand-in for foreign_package.HistoryBuffer" in repr(buffer)
    assert buffer.state["limit"] == 1000
    np.testing.assert_array_equal(buffer.state["history"], np.arange(3.0))
    assert found["events"].items == [1, 2]
    assert found["optimizer"] == {"state": {}, "steps": collections.deque([1, 2])}
    assert found["param_schedulers"] == [{"lr": 0.1, "dtype": torch.float32, "size": (2,)}]
    assert_same(compat.to_mmdet(compat.from_mmdet(found)), state)


@pytest.mark.parametrize("protocol", range(6))
def test_a_file_of_detectron2(tmp_path: Path, protocol: int) -> None:
    state = {key: value.numpy() for key, value in microsoft_model().state_dict().items()}
    value = {"model": state, "__author__": "third party", "matching_heuristics": True}
    path = tmp_path / "model_final.pkl"
    path.write_bytes(pickle.dumps(value, protocol))
    found = compat.load_checkpoint(path)
    assert found["matching_heuristics"] is True
    for key, array in state.items():
        assert found["model"][key].dtype == array.dtype
        np.testing.assert_array_equal(found["model"][key], array)
    assert len(compat.from_microsoft(found).blocks) == 2


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_of_ultralytics_holds_a_module(tmp_path: Path, zipped: bool) -> None:
    model = ultralytics.DetectDyHead((8, 12, 16), CHANNELS, 2)
    model.register_buffer("stride", torch.ones(3))
    model.register_buffer("anchors", torch.ones(3), persistent=False)
    value = {"epoch": -1, "model": model, "ema": None, "train_args": {"imgsz": 640}}
    path = tmp_path / "best.pt"
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    found = compat.load_checkpoint(path)
    assert found["model"].keys() == model.state_dict().keys()
    assert_same({key: found["model"][key] for key in model.state_dict()}, dict(model.state_dict()))
    assert found["train_args"] == {"imgsz": 640}
    assert len(compat.from_ultralytics(found).blocks) == 2
    torch.save(model, path, _use_new_zipfile_serialization=zipped)
    assert compat.load_checkpoint(path).keys() == model.state_dict().keys()


def test_kinds_of_tensors_and_arrays(tmp_path: Path) -> None:
    base = torch.arange(6.0)
    value = {
        "half": torch.ones(2, dtype=torch.float16),
        "bfloat": torch.ones(2, dtype=torch.bfloat16),
        "parameter": nn.Parameter(torch.ones(2)),
        "view": base.view(2, 3).t(),
        "scalar": torch.tensor(2),
        "empty": torch.empty(0, 3),
        "integers": np.arange(3),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "numbers": [1, 2.5, 1j, True, b"bytes", {1, 2}, frozenset([3]), slice(1, 2)],
        "number": np.float32(2.5),
        "kind": np.dtype("<f4"),
        "text": np.array(["a", "bc"]),
        "objects": np.array([1, "two", None], dtype=object),
        "big": np.arange(3, dtype=">f8"),
    }
    torch.save(value, tmp_path / "file.pth")
    found = compat.load_checkpoint(tmp_path / "file.pth")
    for key in ("half", "bfloat", "parameter", "view", "scalar", "empty"):
        assert torch.equal(found[key], value[key])
        assert type(found[key]) is torch.Tensor
    for key in ("integers", "fortran", "text", "objects", "big"):
        assert type(found[key]) is np.ndarray
        np.testing.assert_array_equal(found[key], value[key])
    assert found["numbers"] == value["numbers"]
    assert found["number"] == 2.5
    assert found["kind"] == np.dtype("<f4")


class Subclass(np.ndarray):
    """An array of a class of one's own."""


class Evil:
    """Pickles as a call of ``function`` with ``arguments``, and with ``state`` if that is given."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.call = function, arguments, state

    def __reduce__(self) -> Any:
        return self.call if self.call[2] is not None else self.call[:2]


def _ran() -> None:
    os.environ["DYHEAD_TEST_RAN"] = "1"


ATTACKS: dict[str, Callable[[], Any]] = {
    "a shell": lambda: Evil(os.system, "touch ran"),
    "eval": lambda: Evil(eval, "open('ran', 'w').close()"),
    "exec": lambda: Evil(exec, "open('ran', 'w').close()"),
    "a function here": lambda: Evil(_ran),
    "getattr": lambda: Evil(getattr, Path, "touch"),
    "a torch function": lambda: Evil(torch.load, "/etc/hostname"),
    "a method": lambda: Evil(Path.touch, Path("ran")),
    "an import": lambda: Evil(__import__, "antigravity"),
}


@pytest.mark.parametrize("make", ATTACKS.values(), ids=ATTACKS)
def test_what_a_file_calls_is_not_called(
    make: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DYHEAD_TEST_RAN", raising=False)
    monkeypatch.chdir(tmp_path)
    path, state = tmp_path / "file.pth", compat.to_microsoft(DyHead(16, 16, 1))
    torch.save({"model": state, "meta": make()}, path)
    modules = set(sys.modules)
    found = compat.load_checkpoint(path)
    assert isinstance(found["meta"], Unknown)
    assert_same(found["model"], state)
    assert "DYHEAD_TEST_RAN" not in os.environ
    assert os.listdir(tmp_path) == ["file.pth"]
    assert set(sys.modules) == modules


def test_allowed_functions_cannot_be_changed(tmp_path: Path) -> None:
    """A pickle may set attributes of what it made, a function's defaults for one."""
    path = tmp_path / "file.pkl"
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n"
    path.write_bytes(b"\x80\x02" + rebuild + b"}U\x0c__defaults__NsN\x86b.")
    with pytest.raises(ValueError, match="cannot be read as one"):
        compat.load_checkpoint(path)
    path.write_bytes(b"\x80\x02" + rebuild + b"N}U\x0c__defaults__Ns\x86b.")
    with pytest.raises(ValueError, match="sets an attribute of a function"):
        compat.load_checkpoint(path)
    assert torch._utils._rebuild_tensor_v2.__defaults__ == (None,)


def test_allowed_functions_take_only_what_is_meant(tmp_path: Path) -> None:
    reconstruct: Any = getattr(copyreg, "_reconstructor")  # noqa: B009 (not in the stubs)
    scalar = sys.modules["numpy._core.multiarray"].scalar
    refused = {
        "in an old way": Evil(reconstruct, dict, object, None),
        "encodes text as 'rot13'": Evil(sys.modules["_codecs"].encode, "x", "rot13"),
        "bytes of the type object": Evil(scalar, np.dtype("O"), b"12345678"),
        "array with fields": np.zeros(2, dtype=[("x", "f4")]),
        "may only name": Evil(np.ndarray, (1,)),
        "array of the class": np.ones(1).view(Subclass),
    }
    path = tmp_path / "file.pkl"
    # An array of "objects" whose contents are bytes would be read as addresses.
    harmless = pickle.dumps({"x": np.array([1], dtype=object)}, 2)
    path.write_bytes(re.sub(rb"\]q.K\x01a", b"U\x08addressA", harmless))
    assert path.read_bytes() != harmless
    with pytest.raises(ValueError, match="array of objects without them"):
        compat.load_checkpoint(path)
    for reason, value in refused.items():
        path.write_bytes(pickle.dumps({"x": value}, 2))
        with pytest.raises(ValueError, match=reason):
            compat.load_checkpoint(path)


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        compat.load_checkpoint(tmp_path / "none.pth")
    with pytest.raises(ValueError, match=r"safetensors.torch.load_file"):
        compat.load_checkpoint(tmp_path / "model.safetensors")
    path = tmp_path / "file.pth"
    path.write_bytes(b"not a checkpoint at all")
    with pytest.raises(ValueError, match=r"file.pth cannot be read as one"):
        compat.load_checkpoint(path)
    torch.save([torch.ones(2)], path)
    with pytest.raises(ValueError, match=r"mapping of names to tensors, .*file.pth holds \[tensor"):
        compat.load_checkpoint(path)
    torch.save({"x": torch.ones(2)}, path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="cannot be read as one"):
        compat.load_checkpoint(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/constants.pkl", b"")
        archive.writestr("model/data.pkl", b"")
    with pytest.raises(ValueError, match=r"TorchScript program; save its state_dict\(\)"):
        compat.load_checkpoint(path)
