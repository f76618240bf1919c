"""Training: optimiser and schedule, run folders, several processes, progress."""

from typing import TYPE_CHECKING

from dyhead_cuda.detection.lazy import attribute_of

if TYPE_CHECKING:
    from dyhead_cuda.detection.training.config import TrainConfig
    from dyhead_cuda.detection.training.errors import RankError, RunError
    from dyhead_cuda.detection.training.runs import RunFolder
    from dyhead_cuda.detection.training.trainer import Interrupted, TrainingError, train

__getattr__ = attribute_of(
    __name__,
    {
        "config": ("TrainConfig",),
        "errors": (
            "RankError",
            "RunError",
        ),
        "runs": ("RunFolder",),
        "trainer": (
            "Interrupted",
            "TrainingError",
            "train",
        ),
    },
)

__all__ = [
    "Interrupted",
    "RankError",
    "RunError",
    "RunFolder",
    "TrainConfig",
    "TrainingError",
    "train",
]
