"""Finding the blocks of a public code base in a checkpoint, whatever stands around them."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from dyhead_cuda import checks
from dyhead_cuda.compat.names import CODE_BASES, CodeBase

# Under what training code keeps parameters, in the order of preference: those that were trained,
# then their running averages (EMA). mmengine's "state_dict" holds the averages where it has them.
NESTS = (
    "state_dict",
    "model",
    "model_state_dict",
    "params",
    "ema_state_dict",
    "state_dict_ema",
    "model_ema",
    "ema",
)
_log = logging.getLogger("dyhead_cuda")
_INDEXED = re.compile(r"((?:.*\.)?)(\d+)\.")


def _blocks(keys: Iterable[str], code_base: CodeBase) -> list[str]:
    """Prefixes of all blocks, recognised by the names of their deformable branches."""
    keys = list(keys)
    branches = tuple(
        name.theirs for name in code_base.names if name.ours.split(".")[0] in ("low", "mid", "high")
    )
    prefixes = {
        key.removesuffix(name): None
        for key in keys
        for name in branches
        if key == name or key.endswith(f".{name}")
    }
    others = {key[: key.index(name)] for key in keys for name in code_base.foreign if name in key}
    return [prefix for prefix in prefixes if prefix not in others]


def _order(block: str) -> tuple[str, int]:
    match = _INDEXED.fullmatch(block)
    return (match[1], int(match[2])) if match else (block, -1)


def _towers(blocks: Iterable[str]) -> dict[str, list[str]]:
    """The blocks of each tower in order; a block without an index is a tower of its own."""
    towers: dict[str, list[str]] = {}
    for block in sorted(blocks, key=_order):
        towers.setdefault(_order(block)[0], []).append(block)
    return towers


def _as_mapping(value: Any) -> Mapping[str, Any] | None:
    """A nested state dict; Ultralytics' checkpoints hold the module itself."""
    if isinstance(value, nn.Module):
        return value.state_dict()
    return value if isinstance(value, Mapping) else None


def unnest(checkpoint: Any, code_base: CodeBase) -> Mapping[str, Any]:
    """The mapping that holds the parameters: ``checkpoint`` or one nested inside it.

    Where several nested ones hold blocks, the first of :data:`NESTS` is taken, and the log says so.
    """
    if not isinstance(checkpoint, Mapping):
        advice = (
            "pass model.state_dict()"
            if isinstance(checkpoint, nn.Module)
            else "read a file with compat.load_checkpoint(path) and pass what it returns"
        )
        raise TypeError(
            "expected a state dict or a checkpoint that holds one, got "
            f"{type(checkpoint).__name__}; {advice}"
        )
    if not all(isinstance(key, str) for key in checkpoint):  # an optimizer's, for one
        checkpoint = {key: value for key, value in checkpoint.items() if isinstance(key, str)}
    if _blocks(checkpoint, code_base):
        return checkpoint
    nested = {key: _as_mapping(checkpoint.get(key)) for key in NESTS}
    inside = {key: unnest(value, code_base) for key, value in nested.items() if value is not None}
    if not inside:
        return checkpoint
    found = [key for key, value in inside.items() if _blocks(value, code_base)]
    if len(found) > 1:
        others = " and ".join(f'checkpoint["{key}"]' for key in found[1:])
        _log.info('took the parameters under "%s"; pass %s for the others', found[0], others)
    return inside[found[0]] if found else next(iter(inside.values()))


def _described(state_dict: Mapping[str, Any]) -> str:
    """How many keys there are, and the first of them."""
    some = ", ".join(f'"{key}"' for key in list(state_dict)[:3]) or "none"
    return f"{len(state_dict)} keys ({some}{' ...' if len(state_dict) > 3 else ''})"


def _nothing_found(
    checkpoint: Mapping[str, Any], state_dict: Mapping[str, Any], code_base: CodeBase
) -> ValueError:
    """What was found instead of blocks, and what to do about it."""
    wanted = f'"<prefix>{code_base.names[0].theirs}"'
    start = f"expected {code_base.title} parameters such as {wanted}, "
    for other in CODE_BASES:
        elsewhere = unnest(checkpoint, other)
        blocks = _blocks(elsewhere, other)
        if blocks:
            example = f'"{blocks[0]}{other.names[0].theirs}"'
            return ValueError(
                f"{start}found those of {other.title} ({example}); use compat.from_{other.key}"
            )
    if any(key.endswith("dynamic_relu.fc1.weight") for key in state_dict):
        return ValueError(
            f"{start}found those of dyhead_cuda.DyHead; use DyHead(...).load_state_dict"
        )
    mappings = [key for key, value in checkpoint.items() if isinstance(value, Mapping)]
    if state_dict is checkpoint and mappings:
        inner = ", ".join(f'"{key}" with {_described(checkpoint[key])}' for key in mappings)
        return ValueError(
            f"{start}found mappings under {inner}; pass the one that holds the parameters"
        )
    return ValueError(
        f"{start}found {_described(state_dict)}, none of which belongs to a Dynamic Head; pass the "
        "state dict of a model that has one"
    )


def find_blocks(
    checkpoint: Mapping[str, Any],
    state_dict: Mapping[str, Any],
    code_base: CodeBase,
    prefix: str | None,
) -> list[str]:
    """Prefixes of the blocks of the one tower in ``state_dict``, or of the one under ``prefix``.

    Args:
        checkpoint: what the caller was given, for messages.
        state_dict: what :func:`unnest` found in it.
        code_base: whose names to look for.
        prefix: of a tower or of a single block; None where there is one tower.

    Raises:
        TypeError: a prefix that is no string.
        ValueError: no tower, several, or one with a block missing.
    """
    if prefix is not None:
        checks.instance("prefix", prefix, str)
    blocks = _blocks(state_dict, code_base)
    if not blocks:
        raise _nothing_found(checkpoint, state_dict, code_base)
    towers = _towers(blocks)
    names = ", ".join(f'"{tower}"' for tower in towers)
    if prefix is not None:
        prefix = prefix if prefix.endswith(".") or not prefix else f"{prefix}."
        if prefix in blocks:
            return [prefix]
        under = [prefix] if prefix in towers else [t for t in towers if t.startswith(prefix)]
        towers = {tower: towers[tower] for tower in under}
    if not towers:
        raise ValueError(
            f'expected a tower of {code_base.title} under prefix "{prefix}", found {names}; pass '
            "one of these as prefix"
        )
    if len(towers) > 1:
        names = ", ".join(f'"{tower}"' for tower in towers)
        raise ValueError(f"expected one tower, found several: {names}; choose one with prefix=...")
    ((tower, chosen),) = towers.items()
    _check_complete(state_dict, code_base, tower, [_order(block)[1] for block in chosen])
    return chosen


def _check_complete(
    state_dict: Mapping[str, Any], code_base: CodeBase, tower: str, indices: list[int]
) -> None:
    """Raise when a block between the others, or before the first one, is not in the dict."""
    first, last = indices[0], indices[-1]
    if first < 0 or not code_base.adjacent_blocks:
        return
    before = [i for i in range(first) if not any(k.startswith(f"{tower}{i}.") for k in state_dict)]
    missing = before + [i for i in range(first, last) if i not in indices]
    if missing:
        raise ValueError(
            f'expected adjacent {code_base.title} blocks under "{tower}" from index 0 on, found '
            f"{indices} without {missing}; add the keys of the missing blocks, choose a single "
            f'block with prefix="{tower}{first}.", or use compat.from_glip for a tower with fusion '
            "layers between its blocks"
        )
