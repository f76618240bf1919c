"""Checkpoints and models of public code: DynamicHead, GLIP, mmdet and forks of Ultralytics' YOLO.

The adapters :mod:`dyhead_cuda.compat.mmdet` and :mod:`dyhead_cuda.compat.detectron2` need those
packages and are imported by name.
"""

from dyhead_cuda.compat.accelerate import accelerate
from dyhead_cuda.compat.checkpoint import load_checkpoint
from dyhead_cuda.compat.state_dicts import (
    from_glip,
    from_microsoft,
    from_mmdet,
    from_mmdet_glip,
    from_ultralytics,
    to_glip,
    to_microsoft,
    to_mmdet,
    to_mmdet_glip,
    to_ultralytics,
)

__all__ = [
    "accelerate",
    "from_glip",
    "from_microsoft",
    "from_mmdet",
    "from_mmdet_glip",
    "from_ultralytics",
    "load_checkpoint",
    "to_glip",
    "to_microsoft",
    "to_mmdet",
    "to_mmdet_glip",
    "to_ultralytics",
]
