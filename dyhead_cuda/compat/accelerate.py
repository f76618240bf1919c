"""Replacing the blocks of the public code bases inside a model by fused ones."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

from torch import Tensor, nn

from dyhead_cuda import checks, functional, plain
from dyhead_cuda.compat import inner, structure
from dyhead_cuda.compat.measure import LIMIT, CannotMeasureError, Variant, measure, variants
from dyhead_cuda.compat.names import GLIP, MMDET, MMDET_GLIP, ULTRALYTICS, CodeBase
from dyhead_cuda.modules import DyHeadBlock
from dyhead_cuda.modules.scripted import NotScriptable
from dyhead_cuda.pyramid import HIGH_OFFSETS, UPSAMPLES, HighOffset, Upsample, repack, unpack
from dyhead_cuda.recompute import recomputed

_log = logging.getLogger("dyhead_cuda")

Model = TypeVar("Model", bound=nn.Module)


class AcceleratedBlock(NotScriptable, nn.Module, ABC):
    """A public block with its own submodules, parameters and hooks, and a fused forward.

    It adopts the attributes of ``block``, so parameters stay the same objects and state-dict keys
    the same names; only what ``forward`` computes with them is this package's. Where an inner
    module was changed since, the forward of the block's own class runs, which calls it.
    """

    code_base: ClassVar[CodeBase]
    high_offset: HighOffset
    upsample: Upsample = "bilinear"  # of blocks that were saved before there was another
    recompute: bool

    def __init__(self, block: nn.Module, variant: Variant, recompute: bool) -> None:
        super().__init__()
        self.__dict__.update(block.__dict__)
        self.high_offset, self.upsample = variant
        self.recompute = recompute
        self._own_class = type(block)
        self._inner = inner.inner_modules(block)

    def forward(self, x: Any) -> Any:
        """What the public block computes, from and to what it takes and returns."""
        reason = inner.why_changed(self, self._inner)
        if reason is None:
            return self._fused(x)
        name = self._own_class.__name__
        plain.say_once(self, f"an accelerated {name}", reason, "runs its own forward, slower")
        own = object.__new__(self._own_class)
        object.__setattr__(own, "__dict__", self.__dict__)  # the same modules and parameters
        return own.forward(x)

    @abstractmethod
    def _fused(self, x: Any) -> Any:
        """The same, from parameters alone."""

    def _run(self, levels: Sequence[Tensor]) -> list[Tensor]:
        norm = structure.norm_of(self, self.code_base)
        run = partial(
            functional.pyramid_block,
            high_offset=self.high_offset,
            upsample=self.upsample,
            num_groups=norm.num_groups,
            eps=norm.eps,
        )
        arguments = levels, structure.block_parameters(self, self.code_base)
        outs = recomputed(run, *arguments) if self.recompute else run(*arguments)
        # As the public blocks return them: one that was left untouched may come next, and those
        # read channels_last features wrongly.
        return [out.contiguous() for out in outs]

    def extra_repr(self) -> str:
        return (
            f"high_offset={self.high_offset!r}, upsample={self.upsample!r}, "
            f"recompute={self.recompute}"
        )


class AcceleratedDyConv(AcceleratedBlock):
    """The block of microsoft/DynamicHead (a dict of levels) and of GLIP (a list).

    In GLIP's language-aware tower the input is {"visual": levels, "lang": anything}; all but
    "visual" is passed on as it is.
    """

    code_base = GLIP

    def _fused(self, x: Any) -> Any:
        if isinstance(x, Mapping) and isinstance(x.get("visual"), list | tuple):
            return {**x, "visual": self._run(x["visual"])}
        levels = self._run(unpack(x))
        return levels if isinstance(x, (list, tuple)) else repack(x, levels)


class AcceleratedMMDetDyConv(AcceleratedDyConv):
    """The block of mmdet's GLIP, which takes and returns what GLIP's language-aware one does."""

    code_base = MMDET_GLIP


class AcceleratedDyHeadBlock(AcceleratedBlock):
    """The block of mmdet: a list or tuple of levels to a list."""

    code_base = MMDET

    def _fused(self, x: Sequence[Tensor]) -> list[Tensor]:
        return self._run(list(x))


class AcceleratedYoloDyHeadBlock(AcceleratedDyHeadBlock):
    """The block of the Ultralytics forks: mmdet's with another dynamic ReLU."""

    code_base = ULTRALYTICS


_KINDS: dict[str, type[AcceleratedBlock]] = {
    kind.code_base.key: kind
    for kind in (
        AcceleratedDyConv,
        AcceleratedMMDetDyConv,
        AcceleratedDyHeadBlock,
        AcceleratedYoloDyHeadBlock,
    )
}


class _Choice(NamedTuple):
    """The variant for a block, and how it was found (the end of a line in the log)."""

    variant: Variant
    found: str
    level: int  # of that line


def _choose(
    block: nn.Module,
    code_base: CodeBase,
    high_offset: HighOffset | None,
    upsample: Upsample | None,
    verify: bool,
) -> _Choice:
    """The variant that computes what ``block`` does; raises structure.UnsupportedError.

    What the caller named is not searched for, and is taken even where the numbers differ.
    """
    read = Variant(structure.published_high_offset(block), structure.published_upsample(block))
    first = Variant(high_offset or read.high_offset, upsample or read.upsample)
    if not verify:
        return _Choice(first, "not verified (verify=False)", logging.INFO)
    try:
        closest = measure(block, code_base, variants(first, high_offset, upsample))
    except CannotMeasureError as error:
        return _Choice(first, f"not verified: {error}", logging.WARNING)
    if closest.agrees:
        # The power of ten only, so that blocks of one kind share a line.
        return _Choice(closest.variant, f"measured: equal to {LIMIT:.0e}", logging.INFO)
    if high_offset or upsample:
        differs = f"as asked for, the block's own forward differs by {closest.error:.1e}"
        return _Choice(closest.variant, differs, logging.WARNING)
    raise structure.UnsupportedError(
        f"its own forward computes something else: measured on random parameters, the closest "
        f"variant ({closest.variant}) is off by {closest.error:.1e} (relative L2); it keeps its "
        f"own forward, or name the variant you want with high_offset=... and upsample=..."
    )


class _Accelerator:
    """One call of :func:`accelerate`: its settings, and what became of each block."""

    def __init__(
        self,
        high_offset: HighOffset | None,
        upsample: Upsample | None,
        recompute: bool,
        verify: bool,
    ) -> None:
        self.named = high_offset, upsample
        self.recompute, self.verify = recompute, verify
        self.outcome: dict[nn.Module, nn.Module] = {}  # a block in several places stays one
        self.replaced: dict[tuple[int, str], list[str]] = {}  # level and text -> paths
        self.left: dict[str, list[str]] = {}  # reason -> paths

    def visit(self, block: nn.Module, path: str, compiled: bool = False) -> nn.Module:
        """What stands for ``block`` from now on: its fused form or itself."""
        if block in self.outcome:
            return self.outcome[block]
        try:
            self.outcome[block] = self._replacement(block, path, compiled)
        except structure.UnsupportedError as error:
            self.outcome[block] = block
            self.left.setdefault(str(error), []).append(f"{path} ({type(block).__name__})")
        return self.outcome[block]

    def _replacement(self, block: nn.Module, path: str, compiled: bool) -> AcceleratedBlock:
        if compiled:
            raise structure.UnsupportedError(
                "it is compiled already (call accelerate before torch.compile)"
            )
        code_base = structure.code_base_of(block)
        assert code_base is not None
        structure.check_supported(block, code_base)
        choice = _choose(block, code_base, *self.named, self.verify)
        text = f"{choice.variant}, {choice.found}"
        self.replaced.setdefault((choice.level, text), []).append(path)
        return _KINDS[code_base.key](block, choice.variant, self.recompute)

    def report(self, model: nn.Module) -> None:
        """Log what was replaced and what was left, one line for each kind."""
        for reason, paths in self.left.items():
            _log.warning("left as it was: %s, because %s", ", ".join(paths), reason)
        for (level, text), paths in self.replaced.items():
            _log.log(
                level,
                "accelerated %d Dynamic Head blocks (%s): %s",
                len(paths),
                text,
                ", ".join(paths),
            )
        if self.left or self.replaced:
            return
        done = sum(isinstance(m, AcceleratedBlock | DyHeadBlock) for m in model.modules())
        others = [
            f"{path or 'the model itself'} ({type(module).__name__})"
            for path, module in model.named_modules()
            if structure.has_known_name(module) and not isinstance(module, DyHeadBlock)
        ]
        _log.log(
            logging.INFO if done else logging.WARNING,
            "found no DyConv of DynamicHead or GLIP and no DyHeadBlock of mmdet or a YOLO fork to "
            "accelerate in %s, %d blocks are fused already%s",
            type(model).__name__,
            done,
            f"; of such a name but made of other parts: {', '.join(others)}" if others else "",
        )


def _is_public_block(module: nn.Module) -> bool:
    ours = isinstance(module, AcceleratedBlock | DyHeadBlock)
    return not ours and structure.code_base_of(module) is not None


def _is_compiled(module: nn.Module) -> bool:
    """Whether ``module`` wraps another one whose calls torch.compile has bound already."""
    return type(module).__name__ == "OptimizedModule"


def accelerate(
    model: Model,
    *,
    high_offset: HighOffset | None = None,
    upsample: Upsample | None = None,
    recompute: bool = False,
    verify: bool = True,
) -> Model:
    """Replace every public Dynamic Head block inside ``model`` by a fused one, in place.

    Blocks are the ``DyConv`` of microsoft/DynamicHead, of GLIP and of mmdet's GLIP, and the
    ``DyHeadBlock`` of mmdet and of forks of Ultralytics' YOLO, recognised by class name and
    attributes; those packages need not be installed. A replacement takes and returns the same
    containers of levels [N, C, H_l, W_l], shares the same Parameter objects (optimizers keep
    working), the block's own hooks and its train/eval state, and has the same state-dict keys
    (checkpoints load both ways). Calling this again changes nothing.

    Each block is measured before it is replaced: a copy of it with random parameters runs once in
    float64 on a tiny random pyramid, by its own forward and by the fused one. The block, its
    buffers, its hooks and all random states are left alone. Where both agree to 1e-9 (relative L2)
    the block is replaced; otherwise the other variants (``high_offset`` times ``upsample``) are
    tried, and the one that agrees is taken. The logger "dyhead_cuda" says which it was. A block
    that no variant computes stays untouched and is named in a warning with the error, as is one
    that is built of other parts: norms other than GroupNorm, no deformable convolution, scale
    attention or dynamic ReLU, other convolution or activation settings, hooks or parametrizations
    inside a block, a subclass with a forward of its own.

    Where a block cannot run here (its operator needs a GPU, for one), it is replaced after what
    its code reads like, and a warning says "not verified" and why.

    Args:
        model: any module; it may be a block itself.
        high_offset: how every block reads the finer level's offsets, see
            :class:`~dyhead_cuda.DyHead`. None: as each block's own forward does. A name is taken
            even where the block computes something else, with a warning that says how far off.
        upsample: how every block resizes the coarser level, "bilinear" or "nearest". None: as each
            block's own forward does.
        recompute: of every block that is replaced, see :class:`~dyhead_cuda.DyHead`.
        verify: False skips the measurement: blocks are replaced after what their code reads like
            ("flat", or "mmdet_main" for mmdet's main branch, and "bilinear").

    Returns:
        ``model``, or its replacement where the model itself is a block.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: an unknown ``high_offset`` or ``upsample``, with the names there are.

    Source: the forwards of microsoft/DynamicHead, ``dyhead/dyhead.py``; GLIP,
    ``rpn/vldyhead.py``; mmdet, ``necks/dyhead.py`` and ``dense_heads/atss_vlfusion_head.py``.

    Example:
        >>> import torch, dyhead_cuda
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1))  # any detector
        >>> dyhead_cuda.accelerate(model) is model
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if high_offset is not None:
        checks.one_of("high_offset", high_offset, HIGH_OFFSETS)
    if upsample is not None:
        checks.one_of("upsample", upsample, UPSAMPLES)
    run = _Accelerator(high_offset, upsample, recompute, verify)
    if _is_public_block(model):
        result = run.visit(model, "the model itself")
        run.report(result)
        return cast(Model, result)
    for prefix, parent in list(model.named_modules()):
        if _is_public_block(parent):
            continue
        for name, child in parent._modules.items():
            if child is not None and _is_public_block(child):
                path = f"{prefix}.{name}" if prefix else name
                parent._modules[name] = run.visit(child, path, _is_compiled(parent))
    run.report(model)
    return model
