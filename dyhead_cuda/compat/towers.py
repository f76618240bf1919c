"""Finding the blocks of a public code base in a checkpoint, whatever stands around them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from dyhead_cuda.compat.names import GLIP, MICROSOFT, MMDET, CodeBase

NESTS = ("state_dict", "model")
_INDEXED = re.compile(r"((?:.*\.)?)(\d+)\.")


def _blocks(keys: Iterable[str], code_base: CodeBase) -> list[str]:
    """Prefixes of all blocks, recognised by the names of their deformable branches."""
    branches = tuple(
        name.theirs for name in code_base.names if name.ours.split(".")[0] in ("low", "mid", "high")
    )
    prefixes = {
        key.removesuffix(name): None
        for key in keys
        for name in branches
        if key == name or key.endswith(f".{name}")
    }
    return list(prefixes)


def _order(block: str) -> tuple[str, int]:
    match = _INDEXED.fullmatch(block)
    return (match[1], int(match[2])) if match else (block, -1)


def _towers(blocks: Iterable[str]) -> dict[str, list[str]]:
    """The blocks of each tower in order; a block without an index is a tower of its own."""
    towers: dict[str, list[str]] = {}
    for block in sorted(blocks, key=_order):
        towers.setdefault(_order(block)[0], []).append(block)
    return towers


def unnest(checkpoint: Mapping[str, Any], code_base: CodeBase) -> Mapping[str, Any]:
    """The mapping that holds the parameters: ``checkpoint`` or one nested inside it."""
    if not isinstance(checkpoint, Mapping):
        raise TypeError(
            "expected a state dict or a checkpoint that holds one, got "
            f"{type(checkpoint).__name__}; pass model.state_dict() or the loaded checkpoint"
        )
    nested = [checkpoint[key] for key in NESTS if isinstance(checkpoint.get(key), Mapping)]
    if not nested or _blocks(checkpoint, code_base):
        return checkpoint
    found = [unnest(inner, code_base) for inner in nested]
    return next((inner for inner in found if _blocks(inner, code_base)), found[0])


def _nothing_found(state_dict: Mapping[str, Any], code_base: CodeBase) -> ValueError:
    wanted = f'"<prefix>{code_base.names[0].theirs}"'
    start = f"expected {code_base.title} parameters such as {wanted}, "
    for other in (MICROSOFT, GLIP, MMDET):
        blocks = _blocks(state_dict, other)
        if blocks:
            example = f'"{blocks[0]}{other.names[0].theirs}"'
            return ValueError(
                f"{start}found those of {other.title} ({example}); use compat.from_{other.key}"
            )
    if any(key.endswith("dynamic_relu.fc1.weight") for key in state_dict):
        return ValueError(
            f"{start}found those of dyhead_cuda.DyHead; use DyHead(...).load_state_dict"
        )
    some = ", ".join(f'"{key}"' for key in list(state_dict)[:3]) or "none"
    return ValueError(f"{start}found {len(state_dict)} keys ({some} ...); pass a whole checkpoint")


def find_blocks(
    state_dict: Mapping[str, Any], code_base: CodeBase, prefix: str | None
) -> list[str]:
    """Prefixes of the blocks of the one tower in ``state_dict``, or of the one under ``prefix``.

    Raises:
        ValueError: no tower, several, or one with a block missing.
    """
    blocks = _blocks(state_dict, code_base)
    if not blocks:
        raise _nothing_found(state_dict, code_base)
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
            f"{indices} without {missing}; pass the whole checkpoint, choose a single block with "
            f'prefix="{tower}{first}.", or use compat.from_glip for a tower with fusion layers '
            "between its blocks"
        )
