"""The average of the weights over the steps, which often detects better than the last weights."""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def ramped(decay: float, updates: int) -> float:
    """The decay of an update: small at first, so that short runs forget their first weights.

    Args:
        decay: the highest.
        updates: how many there were before.

    Source: ``tf.train.ExponentialMovingAverage`` with ``num_updates``.
    """
    return min(decay, (1 + updates) / (10 + updates))


def average_of(model: nn.Module, decay: float) -> AveragedModel:
    """A copy of a model whose values become the exponential moving average of the model's.

    ``update_parameters(model)`` after each step does, for t updates before, ``average = d * average
    + (1 - d) * value`` with ``d = min(decay, (1 + t) / (10 + t))``; the first update copies. Frozen
    parameters stay what they are. Statistics of batch normalisation are averaged as the weights
    are: those of the last weights would not fit the averaged ones. What is not a floating-point
    number, such as counters and indices, is copied.

    Args:
        model: on its device, where the copy is made.
        decay: 0 <= decay < 1.

    Returns:
        The average: its ``module`` is the model with averaged values.
    """

    def update(
        averages: tuple[Tensor, ...] | list[Tensor],
        values: tuple[Tensor, ...] | list[Tensor],
        updates: Tensor | int,
    ) -> None:
        if averages[0].is_floating_point():  # all have the same type
            get_ema_multi_avg_fn(ramped(decay, int(updates)))(averages, values, updates)
            return
        for average, value in zip(averages, values, strict=True):
            average.copy_(value)

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)
