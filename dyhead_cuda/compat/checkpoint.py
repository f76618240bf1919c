"""Reading checkpoint files of other packages without running anything that stands in them.

A pickle names classes and functions, and an ordinary reader imports and calls them. Here a name is
looked up in a short list of what tensors and arrays are made of; every other one becomes a class
without behaviour that only keeps what it is given. Nothing is imported.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
import warnings
import zipfile
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

_log = logging.getLogger("dyhead_cuda")
_TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # the first value of a file that torch < 1.6 wrote


class Unknown:
    """Stands for an object whose class is not known here; it keeps what the file gave it.

    Attributes:
        arguments: what it was made with.
        state: its attributes, as a rule a dict, or None.
        items: what was appended to it or set in it: values, or pairs of key and value.
    """

    def __new__(cls, *arguments: Any, **named: Any) -> Unknown:
        made = super().__new__(cls)
        made.arguments, made.state, made.items = (*arguments, *named.items()), None, []
        return made

    def __init__(self, *_: Any, **__: Any) -> None:
        """Set in ``__new__``, which is all that a pickle may call."""

    arguments: tuple[Any, ...]
    state: Any
    items: list[Any]

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, value: Any) -> None:
        self.items.append(value)

    def extend(self, values: Any) -> None:
        self.items.extend(values)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def __call__(self, *arguments: Any) -> Unknown:
        """Where a file calls what an unknown function gave: nothing runs, another one is made."""
        return type(self)(self, *arguments)

    def __repr__(self) -> str:
        return f"<stand-in for {type(self).__module__}.{type(self).__qualname__}>"


class _Call:
    """A function that a pickle may call, and do nothing else with (a function has attributes)."""

    __slots__ = ("function",)
    function: Callable[..., Any]

    def __init__(self, function: Callable[..., Any]) -> None:
        object.__setattr__(self, "function", function)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError("the file sets an attribute of a function")

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    # Hooks and other Python attributes of the tensor come after these, and are left out.
    return torch._utils._rebuild_tensor(storage, offset, size, stride)


def _first(value: Any, *_: Any) -> Any:
    """Of a parameter: its tensor. What comes after are flags and hooks."""
    return value


def _typed_tensor(function: Any, _type: Any, arguments: Any, _state: Any) -> Any:
    if not isinstance(function, _Call):
        raise pickle.UnpicklingError("the file makes a tensor in an unknown way")
    return function(*arguments)


def _refused(*_: Any) -> Any:
    raise pickle.UnpicklingError("the file calls a class that it may only name")


_NDARRAY, _TENSOR = _Call(_refused), _Call(_refused)


class _Kind:
    """A numpy dtype. The real one would take its fields and flags from the file, unchecked."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if any(part is not None for part in state[2:5]):
            raise pickle.UnpicklingError("the file holds an array with fields")
        self.dtype = self.dtype.newbyteorder(state[1])


def _dtype(name: Any, *_: Any) -> _Kind:
    made = np.dtype(name) if isinstance(name, str) else None
    if made is None or made.fields is not None or made.subdtype is not None:
        raise pickle.UnpicklingError(f"the file holds an array of the type {name!r}")
    return _Kind(made)


def _plain(kind: Any) -> np.dtype[Any]:
    """The dtype of numbers or text that are stored as bytes."""
    if not isinstance(kind, _Kind) or kind.dtype.hasobject:
        shown = kind.dtype if isinstance(kind, _Kind) else kind
        raise pickle.UnpicklingError(f"the file holds bytes of the type {shown}")
    return kind.dtype


class _Array(np.ndarray):
    """An array whose contents are checked before numpy takes them."""

    def __setstate__(self, state: Any) -> None:
        version, shape, kind, fortran, data = state
        if isinstance(kind, _Kind) and kind.dtype == object:
            if not isinstance(data, list) or len(data) != math.prod(shape):
                raise pickle.UnpicklingError("the file holds an array of objects without them")
            dtype = kind.dtype
        else:
            dtype, data = _plain(kind), _bytes(data)
        super().__setstate__((version, shape, dtype, fortran, data))


def _array(subtype: Any, *_: Any) -> _Array:
    if subtype is not _NDARRAY:
        raise pickle.UnpicklingError(f"the file holds an array of the class {subtype}")
    return np.empty(0, dtype=np.uint8).view(_Array)


def _bytes(data: Any) -> bytes:
    """Raw values, which Python 2 wrote as text."""
    return data.encode("latin1") if isinstance(data, str) else bytes(data)


def _scalar(kind: Any, data: Any) -> Any:
    return np.frombuffer(_bytes(data), _plain(kind), 1)[0]


def _buffer(data: Any, kind: Any, shape: Any, order: Any = "C") -> Any:
    return np.frombuffer(data, _plain(kind)).reshape(shape, order=order).copy()


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """How pickles of protocol 2 write bytes."""
    if encoding.replace("-", "").lower() != "latin1":
        raise pickle.UnpicklingError(f"the file encodes text as {encoding!r}")
    return text.encode("latin1")


def _object(cls: Any, *_: Any) -> Any:
    """How old protocols make an object: without calling its class."""
    if not (isinstance(cls, type) and issubclass(cls, Unknown)):
        raise pickle.UnpicklingError(f"the file makes an object of {cls!r} in an old way")
    return cls()


def _allowed() -> dict[tuple[str, str], Any]:
    """Everything that has its meaning in a file, by module and name."""
    known: dict[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): OrderedDict,
        ("collections", "Counter"): _Call(Counter),
        ("collections", "defaultdict"): _Call(lambda *_: {}),
        ("collections", "deque"): deque,
        ("torch", "Size"): torch.Size,
        ("torch", "device"): torch.device,
        ("torch", "Tensor"): _TENSOR,
        ("torch", "UntypedStorage"): torch.UntypedStorage,
        ("torch.storage", "UntypedStorage"): torch.UntypedStorage,
        ("torch._utils", "_rebuild_tensor"): _Call(_tensor),
        ("torch._utils", "_rebuild_tensor_v2"): _Call(_tensor),
        ("torch._utils", "_rebuild_parameter"): _Call(_first),
        ("torch._utils", "_rebuild_parameter_with_state"): _Call(_first),
        ("torch._tensor", "_rebuild_from_type_v2"): _Call(_typed_tensor),
        ("numpy", "ndarray"): _NDARRAY,
        ("numpy", "dtype"): _Call(_dtype),
        ("_codecs", "encode"): _Call(_encode),
    }
    for name in dir(torch):
        if isinstance(getattr(torch, name), torch.dtype):
            known["torch", name] = getattr(torch, name)
    for module in ("numpy.core", "numpy._core"):  # numpy < 2, and since
        known[f"{module}.multiarray", "_reconstruct"] = _Call(_array)
        known[f"{module}.multiarray", "scalar"] = _Call(_scalar)
        known[f"{module}.numeric", "_frombuffer"] = _Call(_buffer)
    for module in ("copyreg", "copy_reg"):  # Python 3, and 2
        known[module, "_reconstructor"] = _Call(_object)
    for module in ("builtins", "__builtin__"):
        for kind in (set, frozenset, bytearray, complex, slice, int, float, bool, str, list, dict):
            known[module, kind.__name__] = kind
    return known


class _Unpickler(pickle.Unpickler):
    """Looks names up in the list above; what is not there becomes a kind of :class:`Unknown`."""

    allowed = _allowed()

    def __init__(self, file: IO[bytes], **settings: Any) -> None:
        super().__init__(file, **settings)
        self.unknown: dict[tuple[str, str], type[Unknown]] = {}

    def find_class(self, module: str, name: str) -> Any:
        key = module, name
        if key in self.allowed:
            return self.allowed[key]
        if key not in self.unknown:
            _log.debug("a stand-in is made for %s.%s", module, name)
            self.unknown[key] = type(name, (Unknown,), {"__module__": module})
        return self.unknown[key]


class _Pickle:
    """What ``torch.load`` uses of a pickle module."""

    __name__ = __name__
    Unpickler = _Unpickler

    @staticmethod
    def load(file: IO[bytes], **settings: Any) -> Any:
        return _Unpickler(file, **settings).load()


def _load_torch(file: IO[bytes]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # classes of saved modules, whose source is not at hand
        return torch.load(file, map_location="cpu", pickle_module=_Pickle, weights_only=False)


def _load(file: IO[bytes]) -> Any:
    """The object in ``file``, whichever way it was written."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if any(name.rpartition("/")[2] == "constants.pkl" for name in archive.namelist()):
                raise ValueError("it is a TorchScript program; save its state_dict() with torch")
        file.seek(0)
        return _load_torch(file)
    file.seek(0)
    first = _Unpickler(file, encoding="latin1").load()
    if first != _TORCH_MAGIC:
        return first
    file.seek(0)
    return _load_torch(file)


def _parameters(module: Unknown, prefix: str = "") -> dict[str, Any]:
    """The state dict of a module that was saved as an object."""
    result = {}
    left_out = module.state.get("_non_persistent_buffers_set", ())
    for kind in ("_parameters", "_buffers"):
        for name, value in module.state.get(kind, {}).items():
            if isinstance(value, Tensor) and name not in left_out:
                result[f"{prefix}{name}"] = value
    for name, child in module.state["_modules"].items():
        if _is_module(child):
            result.update(_parameters(child, f"{prefix}{name}."))
    return result


def _is_module(value: Any) -> bool:
    state = value.state if isinstance(value, Unknown) else None
    return isinstance(state, dict) and {"_parameters", "_modules"} <= state.keys()


def _readable(value: Any) -> Any:
    """``value`` with state dicts for modules and plain arrays, at any depth of mappings."""
    if _is_module(value):
        return _parameters(value)
    if isinstance(value, Unknown) and value.items and all(_is_pair(pair) for pair in value.items):
        value = dict(value.items)  # a mapping of an unknown class
    if isinstance(value, dict):
        return {key: _readable(inner) for key, inner in value.items()}
    if isinstance(value, _Array):
        return value.view(np.ndarray)
    return value.dtype if isinstance(value, _Kind) else value


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str)


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint file of another package without running anything that stands in it.

    Files of mmengine, mmdet, detectron2, GLIP and Ultralytics hold objects of those packages beside
    the parameters, which ``torch.load`` refuses by default (``weights_only=True``) and otherwise
    imports and runs. Here tensors, arrays, numbers, strings and containers are read; an object of
    any other class becomes an :class:`~dyhead_cuda.compat.checkpoint.Unknown` that keeps its
    attributes, and is never called. The packages need not be installed.

    Args:
        path: a file that ``torch.save`` wrote (any version), or a pickle such as detectron2's
            ``.pkl`` with numpy arrays.

    Returns:
        What the file holds, for ``from_*``: a dict, with tensors on the CPU. Where a whole module
        was saved, its state dict stands in its place.

    Raises:
        TypeError: no path.
        OSError: a file that is not there (FileNotFoundError) or cannot be opened.
        ValueError: a file of another kind, a damaged one, one with a TorchScript program, or one
            that does not hold a mapping, with what to do.

    Example:
        >>> import os, tempfile, torch
        >>> from dyhead_cuda import DyHead, compat
        >>> path = os.path.join(tempfile.mkdtemp(), "epoch_12.pth")
        >>> head = DyHead(16, 16, 2, deform_bias=False)
        >>> torch.save({"meta": {"epoch": 12}, "state_dict": compat.to_mmdet(head)}, path)
        >>> checkpoint = compat.load_checkpoint(path)
        >>> checkpoint["meta"]["epoch"], len(compat.from_mmdet(checkpoint).blocks)
        (12, 2)
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"expected the path of a file, got {type(path).__name__}")
    shown = str(os.fspath(path))
    if shown.endswith(".safetensors"):
        raise ValueError(
            f"expected a file of torch.save or of pickle, got {shown}; read it with "
            "safetensors.torch.load_file, which runs nothing either"
        )
    with open(path, "rb") as file:
        try:
            value = _readable(_load(file))
        except Exception as error:
            raise ValueError(
                f"expected a file of torch.save or of pickle, {shown} cannot be read as one: "
                f"{error or type(error).__name__}"
            ) from error
    if not isinstance(value, Mapping):
        raise ValueError(
            f"expected a checkpoint with a mapping of names to tensors, {shown} holds {value!r:.80}"
        )
    return dict(value)
