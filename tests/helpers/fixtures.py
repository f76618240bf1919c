"""Loads the golden fixtures: inputs, parameters, outputs and gradients of the real public code."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dyhead_cuda import DyHead, compat
from dyhead_cuda.compat.names import MICROSOFT, MMDET, CodeBase
from tests.helpers.paths import GOLDEN
from tests.helpers.published import microsoft, mmdet, mmdet_main

Array = NDArray[np.float64]

EXTRA_DIRECTORY = "DYHEAD_GOLDEN_DIR"


@dataclass(frozen=True)
class Fixture:
    meta: dict[str, Any]
    arrays: dict[str, Array]

    @property
    def levels(self) -> int:
        return len(self.meta["sizes"])

    @property
    def crops(self) -> bool:
        """Whether the code is mmdet's main branch, whose offset gradient is not the true one."""
        return self.meta["implementation"] == "B-crop"

    @property
    def code_base(self) -> CodeBase:
        return MICROSOFT if self.meta["implementation"] == "A" else MMDET

    @property
    def tower(self) -> str:
        return "dyhead_tower." if self.code_base is MICROSOFT else "dyhead_blocks."

    def tensors(self, kind: str, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        arrays = [self.arrays[f"{kind}.{i}"] for i in range(self.levels)]
        return [torch.tensor(array, dtype=dtype, device=device) for array in arrays]

    def state_dict(self, dtype: torch.dtype) -> dict[str, Tensor]:
        return {
            key.removeprefix("param."): torch.tensor(value, dtype=dtype)
            for key, value in self.arrays.items()
            if key.startswith("param.")
        }

    def head(self, dtype: torch.dtype) -> DyHead:
        """The head that compat makes of the fixture's parameters."""
        if self.code_base is MICROSOFT:
            return compat.from_microsoft(self.state_dict(dtype))
        version = "main" if self.crops else self.meta["implementation"].removeprefix("B-")
        return compat.from_mmdet(self.state_dict(dtype), version=version)

    def published(self, dtype: torch.dtype) -> nn.Module:
        """The stand-in of the public code with the fixture's parameters, strictly loaded."""
        sizes = self.meta["in_channels"], self.meta["channels"], self.meta["blocks"]
        model: nn.Module
        if self.code_base is MICROSOFT:
            model = microsoft.DyHead(nn.Identity(), *sizes[1:])
        else:
            model = (mmdet_main if self.crops else mmdet).DyHead(*sizes)
        model.to(dtype).load_state_dict(self.state_dict(dtype))
        return model

    def head_gradients(self, head: DyHead) -> dict[str, Tensor | None]:
        """Gradients of the head's parameters by the public names, in the public shapes."""
        return {
            f"{self.tower}{i}.{name.theirs}": None if grad is None else name.to_theirs(grad)
            for i, block in enumerate(head.blocks)
            for name in self.code_base.names
            for grad in [block.get_parameter(name.ours).grad]
        }

    def run(
        self, model: nn.Module, dtype: torch.dtype, device: str = "cpu"
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs and input gradients of the fixture's loss; fills the parameters' gradients.

        The model must be on ``device`` already.
        """
        inputs = [x.requires_grad_() for x in self.tensors("in", dtype, device)]
        named = {f"p{level}": x for level, x in enumerate(inputs)}
        outs = model(named if self.code_base is MICROSOFT else inputs)
        outs = list(outs.values()) if isinstance(outs, dict) else list(outs)
        cotangents = self.tensors("cot", dtype, device)
        losses = [(o * c).sum() for o, c in zip(outs, cotangents, strict=True)]
        torch.stack(losses).sum().backward()
        grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in inputs]
        return [o.detach() for o in outs], grads


def paths() -> list[Path]:
    """All fixtures: the project's own and those of the directory named by DYHEAD_GOLDEN_DIR."""
    directories = [GOLDEN]
    if os.environ.get(EXTRA_DIRECTORY):
        directories.append(Path(os.environ[EXTRA_DIRECTORY]))
    found = [path for directory in directories for path in sorted(directory.glob("*.npz"))]
    empty = [str(d) for d in directories if not any(path.parent == d for path in found)]
    if empty:
        raise FileNotFoundError(f"expected .npz fixtures in {', '.join(empty)}, found none")
    return found


@cache
def load(path: Path) -> Fixture:
    with np.load(path) as file:
        arrays = {key: file[key].astype(np.float64) for key in file.files if key != "meta"}
        return Fixture(json.loads(str(file["meta"])), arrays)
