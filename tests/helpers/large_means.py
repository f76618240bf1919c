"""Convolutions whose outputs have a mean much larger than their deviations from it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.helpers.deform_work import Convolution, Tensors

RATIOS = [1e2, 1e3, 1e4]
CALL = Convolution(images=2, size=(50, 76), moments=True)


def tensors_of(ratio: float) -> Tensors:
    """In float32; the mean is ``ratio`` times the standard deviation."""
    tensors = {name: t.detach() for name, t in CALL.tensors(torch.float32).items()}
    tensors["bias"] = (0.1 * tensors["bias"] + ratio) * CALL.reference(tensors)[0].std().float()
    return tensors


def check_moments(results: Sequence[Tensor], ratio: float) -> None:
    """The moments are those of the output, to what float32 can hold of such a mean."""
    y = CALL.maps(results[0].double(), [CALL.output])[0].flatten(2)  # [N, C, P]
    var, mean = torch.var_mean(y, 2, correction=0)
    half_a_step = 2**-24 * float(mean.abs().max())
    found_mean, found_var, found_up = (t[0].double() for t in results[1:])
    # Values summed as they are gave errors of 4 half steps, and a variance eight times as far off.
    assert (found_mean - mean).abs().max() < 1.5 * half_a_step
    assert (found_up - mean).abs().max() < 1.5 * half_a_step
    assert ((found_var - var) / var).abs().max() < 1e-6 + 6e-8 * ratio
