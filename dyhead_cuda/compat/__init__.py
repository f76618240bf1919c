"""Checkpoints and models of the public code bases: DynamicHead, GLIP and mmdet."""

from dyhead_cuda.compat.accelerate import accelerate
from dyhead_cuda.compat.state_dicts import (
    from_glip,
    from_microsoft,
    from_mmdet,
    to_glip,
    to_microsoft,
    to_mmdet,
)

__all__ = [
    "accelerate",
    "from_glip",
    "from_microsoft",
    "from_mmdet",
    "to_glip",
    "to_microsoft",
    "to_mmdet",
]
