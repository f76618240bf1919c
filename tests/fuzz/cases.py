"""What the fuzz is made of: random tensors, strange values, and a call with what judges it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass
class Call:
    """One call of a public entry or of an operator.

    Args:
        name: of what is called.
        function: what is called.
        arguments: in their order.
        options: by name.
        expected: what the results must be, from the arguments in float64; None: what the fake
            kernel of the operator promises, finite or not.
        factor: of the tolerance of one operator.
        floor: size of a value below which its error is not relative to it.
        gradients: whether to compare the gradients of all floating tensors, too.
        spoiled: what was made wrong, if anything; then the call may raise.
        raised: the exceptions that what is spoiled may raise.
        fixed: whether nothing is to be spoiled, as the arguments are those of a helper.
        owns: whether results have memory of their own.
    """

    name: str
    function: Callable[..., Any]
    arguments: list[Any]
    options: dict[str, Any] = field(default_factory=dict)
    expected: Callable[..., Any] | None = None
    factor: float = 1
    floor: float = 0
    gradients: bool = False
    spoiled: str = ""
    raised: tuple[type[Exception], ...] = (TypeError, ValueError)
    fixed: bool = False
    owns: bool = True

    def tensors(self) -> list[Tensor]:
        leaves = pytree.tree_leaves((self.arguments, self.options))
        return [t for t in leaves if isinstance(t, Tensor)]

    def __str__(self) -> str:
        shown = [said(value) for value in self.arguments]
        shown += [f"{name}={said(value)}" for name, value in self.options.items()]
        return f"{self.name}({', '.join(shown)})"


def said(value: Any) -> str:
    """A value in a few words."""
    if isinstance(value, Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        shape = "nested" if value.is_nested else list(value.shape)
        place = "" if value.device.type == "cpu" else f" on {value.device}"
        return f"{kind}{shape}{place}"
    if isinstance(value, np.ndarray):
        return f"numpy {value.dtype}{list(value.shape)}"
    if isinstance(value, list | tuple) and any(isinstance(v, Tensor | tuple) for v in value):
        return f"[{', '.join(map(said, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k!r}: {said(v)}' for k, v in value.items())}}}"
    return f"{value!r:.60}"


class Source(random.Random):
    """Random choices, numbers and tensors of one case."""

    def __init__(self, seed: int, index: int) -> None:
        super().__init__(f"{seed}:{index}")
        self.index = index
        self.torch = torch.Generator().manual_seed(self.getrandbits(63))

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def size(self, most: int = 9) -> int:
        """A size; one of ten is 0."""
        return 0 if self.chance(0.1) else self.randint(1, most)

    def dtype(self) -> torch.dtype:
        return self.choice(DTYPES)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float64, scale: float = 1) -> Tensor:
        """Normal values of any strides."""
        values = torch.randn(shape, generator=self.torch, dtype=torch.float64) * scale
        return self.laid_out(values.to(dtype))

    def laid_out(self, t: Tensor) -> Tensor:
        """The same values in memory of other strides, or some of another tensor's memory."""
        kind = self.choice(("plain", "plain", "transposed", "inside", "stepped", "channels last"))
        if kind == "transposed" and t.dim() > 1:
            return t.transpose(0, -1).contiguous().transpose(0, -1)
        if kind == "inside":
            around = t.new_full([side + 2 for side in t.shape], 7)
            around[tuple(slice(1, side + 1) for side in t.shape)] = t
            return around[tuple(slice(1, side + 1) for side in t.shape)]
        if kind == "stepped" and t.dim() > 0:
            twice = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), 7)
            twice[..., ::2] = t
            return twice[..., ::2]
        if kind == "channels last" and t.dim() == 4:
            return t.contiguous(memory_format=torch.channels_last)
        return t

    def pyramid(self, images: int, channels: int, dtype: torch.dtype, halved: bool) -> list[Tensor]:
        """Levels, each half of the finer one, or of any sizes."""
        height, width = self.size(13), self.size(13)
        levels = []
        for _ in range(self.randint(1, 5)):
            levels.append(self.normal(images, channels, height, width, dtype=dtype))
            if halved:
                height, width = (height + 1) // 2, (width + 1) // 2
            else:
                height, width = self.randint(1, 9), self.randint(1, 9)
        return levels


class Duck:
    """Has a shape and a type, and is no tensor."""

    shape = torch.Size([1, 4, 3, 3])
    dtype = torch.float32
    device = torch.device("cpu")


def strange_values(source: Source) -> Iterator[Any]:
    """Values that hardly any argument takes."""
    t = source.normal(2, 4, 3, 3, dtype=torch.float32)
    yield from (None, 0, -1, 3, 2**31, 2**70, 1.5, float("nan"), True, "flat", "", b"x", object())
    yield from ([], [1, "a", None], [None], [[t]], (t, 3), {"p3": t}, {1: t, None: t}, set(), {t})
    yield from (np.zeros((2, 4, 3, 3), np.float32), np.float32(2), np.array(["a", "b"]), Duck())
    yield (x for x in [t])
    yield from (range(3), Fraction(1, 3), torch.float32, torch.channels_last, torch.nn.Linear(2, 2))
    yield from (t, t[0], t[0, 0, 0, 0], t.long(), t.bool(), t.to(torch.complex64), t.to("meta"))
    yield from (t.to_sparse(), t[0, 0].to_sparse_csr(), t.to(torch.float8_e4m3fn), [t, t[0]])
    yield torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)
    yield torch.nested.nested_tensor([t[0], t[0, :2]])
    yield torch.nested.nested_tensor([t[0], t[0, :2]], layout=torch.jagged)


def spoiled_tensor(source: Source, t: Tensor) -> Any:
    """A tensor that differs from ``t`` in one thing."""
    options: Sequence[Callable[[], Any]] = (
        lambda: t.to(source.dtype()),
        lambda: t.to("meta"),
        lambda: t.unsqueeze(0),
        lambda: t[0] if t.dim() > 0 and t.shape[0] > 0 else t,
        lambda: torch.cat([t, t], source.randrange(t.dim())) if t.dim() > 0 else t,
        lambda: t.narrow(d := source.randrange(t.dim()), 0, t.shape[d] // 2) if t.dim() else t,
        lambda: t.transpose(0, -1) if t.dim() > 0 else t,
        lambda: t.to_sparse(),
        lambda: t.to(torch.complex64),
        lambda: t.to(torch.int32),
        lambda: t.detach().numpy() if t.dtype != torch.bfloat16 else t,
        lambda: t.new_zeros([0] * t.dim()),
        lambda: t.new_full(t.shape, source.choice((0.0, 1e4, -3.5))),
        lambda: t[:1].expand(t.shape) if t.dim() > 0 and t.shape[0] > 0 else t,
    )
    return source.choice(options)()


def spoil(call: Call, source: Source) -> None:
    """Make one argument wrong, or one value inside of one."""
    places: list[Any] = [*range(len(call.arguments)), *call.options]
    if len(places) > 1 and isinstance(call.arguments[0], nn.Module):
        places.pop(0)  # its forward is called
    place = source.choice(places)
    holder: Any = call.options if isinstance(place, str) else call.arguments
    old = holder[place]
    if isinstance(old, Tensor) and source.chance(0.6):
        new = spoiled_tensor(source, old)
    elif isinstance(old, list | tuple) and len(old) > 0 and source.chance(0.7):
        new = spoiled_sequence(source, old)
    elif isinstance(old, dict) and old and source.chance(0.7):
        key = source.choice(list(old))
        new = old | {key: source.choice(list(strange_values(source)))}
    else:
        new = source.choice(list(strange_values(source)))
    holder[place] = new
    call.spoiled = f"{place}: {said(new)}"


def spoiled_sequence(source: Source, old: Sequence[Any]) -> Any:
    """One value more, less, in another place or of another kind; or another container."""
    values, index = list(old), source.randrange(len(old))
    kind = source.randrange(6)
    if kind == 0:
        values.pop(index)
    elif kind == 1:
        values.insert(index, values[source.randrange(len(values))])
    elif kind == 2:
        source.shuffle(values)
    elif kind == 3 and isinstance(old[index], Tensor):
        values[index] = spoiled_tensor(source, old[index])
    elif kind == 4:
        return source.choice((iter(values), dict(enumerate(values)), tuple(values)))
    elif isinstance(old[index], int):
        values[index] = source.choice(ODD_NUMBERS)
    else:
        values[index] = source.choice(list(strange_values(source)))
    if hasattr(old, "_make") and len(values) == len(old):
        return old._make(values)
    return values if type(old) is list else tuple(values)


ODD_NUMBERS = (
    *(-(2**63), -(2**31), -1, 0, 1, 2, 3, 5, 12, 24, 26, 2**31 - 10, 2**31 - 1, 2**31),
    *(2**32, 2**32 + 1, 2**61, 2**63 - 1),
)
