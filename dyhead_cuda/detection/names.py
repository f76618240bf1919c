"""The names that detectors, data and training choose from.

The command line lists them before it imports anything, so nothing here needs torchvision.
"""

from __future__ import annotations

from typing import Literal, get_args

ONE_STAGE = ("atss", "retinanet", "fcos")
TWO_STAGE = ("faster_rcnn", "faster_rcnn_task")
DETECTORS = ONE_STAGE + TWO_STAGE

Extra = Literal["conv", "conv_relu", "pool"]
BoxHead = Literal["mlp", "task", "linear"]
Postprocess = Literal["mmdet", "microsoft"]

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = get_args(Split)

Background = Literal["paper", "photographs"]  # of composed scenes

ExportFormat = Literal["onnx", "pt2", "aoti"]

Optimizer = Literal["adamw", "sgd"]
Schedule = Literal["cosine", "step"]
Amp = Literal["off", "bf16", "fp16"]

DEVICES = ("auto", "cpu", "cuda")
