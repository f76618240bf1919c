"""Runs all operators, forward and backward, on the emulated CUDA kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dyhead_cuda.ops.common import compute_dtype

from .arrays import name_of, to_array, to_tensor


def _name(t: Tensor) -> str:
    return name_of(t.dtype)


def _array(t: Tensor | None) -> Any:
    return None if t is None else to_array(t)


def _wanted(arrays: Iterable[Any], dtypes: Sequence[torch.dtype]) -> tuple[Tensor, ...]:
    """As an operator returns them: empty where they are not wanted, which is None here."""
    return tuple(
        torch.empty(0, dtype=dtype) if array is None else to_tensor(array, dtype)
        for array, dtype in zip(arrays, dtypes, strict=True)
    )


class Emulated(TorchDispatchMode):
    """Calls of ``torch.ops.dyhead`` inside go to the kernels of csrc/cuda, compiled for the host.

    It stands below autograd: the backward operators are emulated like the others, and the autograd
    formulas around them are the package's own.
    """

    def __init__(self, simt: Any) -> None:
        super().__init__()
        self.simt = simt
        self.device = simt.deform_conv.DeviceLimits(4, 227 * 1024)
        self.calls: list[str] = []

    def __torch_dispatch__(
        self,
        function: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if function.namespace != "dyhead" or "pack_levels" in function._opname:
            return function(*args, **(kwargs or {}))
        self.calls.append(function._opname)
        emulated: Callable[..., Any] = getattr(self, f"_{function._opname}")
        return emulated(*args)

    def _deform_conv_fwd(
        self,
        source: Tensor,
        predictions: Tensor,
        weights: list[Tensor],
        bias: list[Tensor] | None,
        gates: Tensor | None,
        *rest: Any,
    ) -> tuple[Tensor, ...]:
        *tables, mask_logits, out_in_compute_dtype, moments, allow_tf32 = rest
        results = self.simt.deform_conv.forward(
            _name(source),
            to_array(source),
            to_array(predictions),
            [to_array(w) for w in weights],
            [to_array(b) for b in bias or ()],
            _name(weights[0]),
            _array(gates),
            tables,
            mask_logits,
            out_in_compute_dtype,
            moments,
            allow_tf32=allow_tf32,
            device=self.device,
        )
        wide = compute_dtype(source.dtype)
        out = to_tensor(results["out"], wide if out_in_compute_dtype else source.dtype)
        return out, *(to_tensor(results[name], wide) for name in ("mean", "var", "up_mean"))

    def _deform_conv_bwd(
        self,
        grad_out: Tensor,
        grad_mean: Tensor | None,
        grad_var: Tensor | None,
        grad_up_mean: Tensor | None,
        source: Tensor,
        predictions: Tensor,
        weights: list[Tensor],
        gates: Tensor | None,
        out: Tensor,
        mean: Tensor,
        *rest: Any,
    ) -> tuple[Tensor, ...]:
        *tables, mask_logits, out_in_compute_dtype, wanted, allow_tf32, deterministic = rest
        moments = None if grad_mean is None else [grad_mean, grad_var, grad_up_mean]
        results = self.simt.deform_conv.backward(
            _name(source),
            to_array(grad_out),
            None if moments is None else [_array(g) for g in moments],
            to_array(source),
            to_array(predictions),
            [to_array(w) for w in weights],
            _name(weights[0]),
            _array(gates),
            to_array(out),
            to_array(mean),
            tables,
            mask_logits,
            out_in_compute_dtype,
            with_bias=bool(wanted[3]),
            allow_tf32=allow_tf32,
            deterministic=deterministic,
            device=self.device,
        )
        if wanted[2]:
            results["weights"] = self.simt.deform_weights.gradient(
                _name(source),
                to_array(source),
                to_array(predictions),
                _array(gates),
                results["rows"],
                len(weights),
                tables,
                mask_logits,
                allow_tf32=allow_tf32,
                device=self.device,
            )
        wide = compute_dtype(source.dtype)
        names = ("source", "predictions", "weights", "bias", "gates")
        dtypes = (source.dtype, wide, wide, wide, wide)
        return tuple(
            to_tensor(results[name], dtype) if want else torch.empty(0, dtype=dtype)
            for name, dtype, want in zip(names, dtypes, wanted, strict=True)
        )

    def _offset_deform_conv_fwd(
        self,
        source: Tensor,
        offset_weight: Tensor,
        offset_bias: Tensor | None,
        weights: list[Tensor],
        bias: list[Tensor] | None,
        *rest: Any,
    ) -> tuple[Tensor, ...]:
        *tables, mask_logits, allow_tf32 = rest
        wide = compute_dtype(source.dtype)
        results = self.simt.offset_deform_conv.forward(
            _name(source),
            to_array(source),
            ([to_array(offset_weight)], _name(offset_weight)),
            [] if offset_bias is None else [to_array(offset_bias)],
            ([to_array(w) for w in weights], _name(weights[0])),
            [to_array(b) for b in bias or ()],
            tables,
            mask_logits,
            allow_tf32=allow_tf32,
            given=self._given_predictions(source, tables),
            device=self.device,
        )
        dtypes = {name: source.dtype if name == "out" else wide for name in results}
        return tuple(to_tensor(array, dtypes[name]) for name, array in results.items())

    def _given_predictions(self, source: Tensor, tables: Sequence[Any]) -> Any:
        """What the jobs of ``offset_deform_conv`` read instead of its predictions, or None."""
        return None

    def _offset_deform_conv_bwd(
        self,
        grad_out: Tensor,
        grad_mean: Tensor | None,
        grad_var: Tensor | None,
        grad_up_mean: Tensor | None,
        source: Tensor,
        offset_weight: Tensor,
        weights: list[Tensor],
        predictions: Tensor,
        out: Tensor,
        mean: Tensor,
        *rest: Any,
    ) -> tuple[Tensor, ...]:
        *tables, mask_logits, wanted, allow_tf32, deterministic = rest
        moments = [grad_mean, grad_var, grad_up_mean]
        results = self.simt.offset_deform_conv.backward(
            _name(source),
            to_array(grad_out),
            None if grad_mean is None else [_array(g) for g in moments],
            to_array(source),
            ([to_array(offset_weight)], _name(offset_weight)),
            ([to_array(w) for w in weights], _name(weights[0])),
            to_array(predictions),
            to_array(out),
            to_array(mean),
            tables,
            mask_logits,
            [bool(want) for want in wanted],
            allow_tf32=allow_tf32,
            deterministic=deterministic,
            device=self.device,
        )
        wide = compute_dtype(source.dtype)
        dtypes = [source.dtype if name == "source" else wide for name in results]
        return tuple(
            to_tensor(array, dtype) if want else torch.empty(0, dtype=dtype)
            for array, dtype, want in zip(results.values(), dtypes, wanted, strict=True)
        )

    def _fuse_call(self, y: Tensor, *rest: Any) -> Any:
        scale, shift, coefficients, images, *tables = rest
        return self.simt.fuse_branches.Call(
            _name(y),
            images,
            y.shape[1],
            *tables,
            to_array(y).ravel(),
            to_array(scale),
            to_array(shift),
            to_array(coefficients),
        )

    def _fuse_branches_fwd(self, y: Tensor, *rest: Any) -> Tensor:
        return to_tensor(self._fuse_call(y, *rest).forward(), y.dtype).view(-1, y.shape[1])

    def _fuse_branches_bwd(self, grad_out: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        *tables, wanted = rest
        results = self._fuse_call(y, *tables).backward(to_array(grad_out).ravel(), wanted)
        dtypes = [y.dtype, *[compute_dtype(y.dtype)] * 3]
        grad_y, *others = _wanted(results.values(), dtypes)
        return (grad_y.view(y.shape) if wanted[0] else grad_y), *others

    def _coefficients(self, function: Callable[..., Any], plain: int, args: Sequence[Any]) -> Any:
        def named(p: Any) -> Any:
            if isinstance(p, list) and isinstance(p[0], Tensor):
                return [named(t) for t in p]
            return (_name(p), to_array(p)) if isinstance(p, Tensor) else p

        return function(*(to_array(t) for t in args[:plain]), *(named(p) for p in args[plain:]))

    def _block_coefficients_fwd(self, *args: Any) -> tuple[Tensor, ...]:
        arrays = self._coefficients(self.simt.block_coefficients.forward, 3, args)
        return tuple(to_tensor(array, args[0].dtype) for array in arrays)

    def _block_coefficients_bwd(self, *args: Any) -> tuple[Tensor, ...]:
        arrays = self._coefficients(self.simt.block_coefficients.backward, 7, args)
        return _wanted(arrays, [args[0].dtype] * len(args[-1]))
