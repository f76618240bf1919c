"""Replacing the blocks of the public code bases inside a model by fused ones."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, TypeVar, cast

from torch import Tensor, nn

from dyhead_cuda import checks, functional
from dyhead_cuda.compat import structure
from dyhead_cuda.compat.names import GLIP, MMDET, CodeBase
from dyhead_cuda.modules import DyHeadBlock
from dyhead_cuda.pyramid import HIGH_OFFSETS, HighOffset, repack, unpack
from dyhead_cuda.recompute import recomputed

_log = logging.getLogger("dyhead_cuda")

Model = TypeVar("Model", bound=nn.Module)


class AcceleratedBlock(nn.Module):
    """A public block with its own submodules, parameters and hooks, and a fused forward.

    It adopts the attributes of ``block``, so parameters stay the same objects and state-dict keys
    the same names; only what ``forward`` computes with them is this package's.
    """

    code_base: ClassVar[CodeBase]
    high_offset: HighOffset
    recompute: bool

    def __init__(self, block: nn.Module, high_offset: HighOffset, recompute: bool) -> None:
        super().__init__()
        self.__dict__.update(block.__dict__)
        self.high_offset, self.recompute = high_offset, recompute

    def _run(self, levels: Sequence[Tensor]) -> list[Tensor]:
        norm = structure.norm_of(self, self.code_base)
        run = partial(
            functional.pyramid_block,
            high_offset=self.high_offset,
            num_groups=norm.num_groups,
            eps=norm.eps,
        )
        arguments = levels, structure.block_parameters(self, self.code_base)
        outs = recomputed(run, *arguments) if self.recompute else run(*arguments)
        # As the public blocks return them: one that was left untouched may come next, and those
        # read channels_last features wrongly.
        return [out.contiguous() for out in outs]

    def extra_repr(self) -> str:
        return f"high_offset={self.high_offset!r}, recompute={self.recompute}"


class AcceleratedDyConv(AcceleratedBlock):
    """The block of microsoft/DynamicHead (a dict of levels) and of GLIP (a list).

    In GLIP's language-aware tower the input is {"visual": levels, "lang": anything}; "lang" is
    passed on as it is.
    """

    code_base = GLIP

    def forward(self, x: Any) -> Any:
        if isinstance(x, Mapping) and isinstance(x.get("visual"), list | tuple):
            return {"visual": self._run(x["visual"]), "lang": x["lang"]}
        levels = self._run(unpack(x))
        return levels if isinstance(x, list | tuple) else repack(x, levels)


class AcceleratedDyHeadBlock(AcceleratedBlock):
    """The block of mmdet: a list or tuple of levels to a list."""

    code_base = MMDET

    def forward(self, x: Sequence[Tensor]) -> list[Tensor]:
        return self._run(list(x))


def _replacement(
    block: nn.Module, high_offset: HighOffset | None, recompute: bool
) -> AcceleratedBlock:
    """The fused form of ``block``; raises structure.UnsupportedError."""
    code_base = structure.code_base_of(block)
    assert code_base is not None
    structure.check_supported(block, code_base)
    kind = AcceleratedDyHeadBlock if code_base is MMDET else AcceleratedDyConv
    return kind(block, high_offset or structure.published_high_offset(block), recompute)


def _is_public_block(module: nn.Module) -> bool:
    ours = isinstance(module, AcceleratedBlock | DyHeadBlock)
    return not ours and structure.code_base_of(module) is not None


def _is_compiled(module: nn.Module) -> bool:
    """Whether ``module`` wraps another one whose calls torch.compile has bound already."""
    return type(module).__name__ == "OptimizedModule"


def _report(
    model: nn.Module, replaced: dict[str, AcceleratedBlock], left: dict[str, list[str]]
) -> None:
    for reason, paths in left.items():
        _log.warning("left as it was: %s, because %s", ", ".join(paths), reason)
    if replaced:
        readings = sorted({f'"{block.high_offset}"' for block in replaced.values()})
        _log.info(
            "accelerated %d Dynamic Head blocks (high_offset %s): %s",
            len(replaced),
            " and ".join(readings),
            ", ".join(replaced),
        )
    elif not left:
        done = sum(isinstance(m, AcceleratedBlock | DyHeadBlock) for m in model.modules())
        level = logging.INFO if done else logging.WARNING
        _log.log(
            level,
            "found no DyConv of DynamicHead or GLIP and no DyHeadBlock of mmdet to accelerate in "
            "%s, %d blocks are fused already",
            type(model).__name__,
            done,
        )


def accelerate(
    model: Model, *, high_offset: HighOffset | None = None, recompute: bool = False
) -> Model:
    """Replace every public Dynamic Head block inside ``model`` by a fused one, in place.

    Blocks are microsoft/DynamicHead's and GLIP's ``DyConv`` and mmdet's ``DyHeadBlock``, recognised
    by class name and attributes; those packages need not be installed. A replacement takes and
    returns the same containers, shares the same Parameter objects (optimizers keep working), the
    block's own hooks and its train/eval state, and has the same state-dict keys (checkpoints load
    both ways). Calling this again changes nothing.

    What a fused block does not compute exactly stays untouched and is named, with the reason, in a
    warning of the logger "dyhead_cuda": norms other than GroupNorm, blocks built without deformable
    convolution, scale attention or dynamic ReLU, other convolution or activation settings, hooks or
    parametrizations inside a block, subclasses with a forward of their own. A fork that changed the
    forward but kept class names and attributes cannot be told apart.

    Args:
        model: any module; it may be a block itself.
        high_offset: how every block reads the finer level's offsets, see
            :class:`~dyhead_cuda.DyHead`. None: as each block's own forward does, which is "flat"
            for every release and "mmdet_main" for mmdet's main branch (recognised by the local
            variables ``out_h`` and ``out_w`` of the forward).
        recompute: of every block that is replaced, see :class:`~dyhead_cuda.DyHead`.

    Returns:
        ``model``, or its replacement where the model itself is a block.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: an unknown ``high_offset``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if high_offset is not None:
        checks.one_of("high_offset", high_offset, HIGH_OFFSETS)
    replaced: dict[str, AcceleratedBlock] = {}
    left: dict[str, list[str]] = {}
    outcome: dict[nn.Module, nn.Module] = {}  # a block that stands in several places stays one

    def visit(block: nn.Module, path: str, compiled: bool) -> nn.Module:
        if block not in outcome:
            try:
                if compiled:
                    raise structure.UnsupportedError(
                        "it is compiled already (call accelerate before torch.compile)"
                    )
                outcome[block] = replaced[path] = _replacement(block, high_offset, recompute)
            except structure.UnsupportedError as error:
                outcome[block] = block
                left.setdefault(str(error), []).append(f"{path} ({type(block).__name__})")
        return outcome[block]

    if _is_public_block(model):
        result = visit(model, "the model itself", False)
        _report(result, replaced, left)
        return cast(Model, result)
    for prefix, parent in list(model.named_modules()):
        if _is_public_block(parent):
            continue
        for name, child in parent._modules.items():
            if child is not None and _is_public_block(child):
                path = f"{prefix}.{name}" if prefix else name
                parent._modules[name] = visit(child, path, _is_compiled(parent))
    _report(model, replaced, left)
    return model
