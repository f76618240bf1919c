"""Exporting a module to ONNX, looking at what came out, and running that with onnxruntime."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from typing import Any

import onnx
import onnxruntime
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from dyhead_cuda import backend
from tests.helpers.compare import relative_l2

TOLERANCE = 1e-5  # relative L2 error against the reference in float64
NEWEST = 21  # of the operator sets tested, which has a node for group normalisation


def export(model: nn.Module, arguments: tuple[Any, ...], **options: Any) -> onnx.ModelProto:
    """What torch.onnx.export makes of ``model``, once it was checked to be standard ONNX."""
    options = {"opset_version": NEWEST, **options}
    program = torch.onnx.export(model.eval(), arguments, dynamo=True, verbose=False, **options)
    assert program is not None
    file: onnx.ModelProto = program.model_proto
    onnx.checker.check_model(file, full_check=True)
    assert {opset.domain for opset in file.opset_import} == {""}
    assert {node.domain for node in file.graph.node} == {""}
    assert not file.functions
    return file


def operators(file: onnx.ModelProto) -> Counter[str]:
    """How many nodes there are of each operator."""
    return Counter(node.op_type for node in file.graph.node)


def output_sizes(file: onnx.ModelProto) -> list[list[int | str]]:
    """What the file says of its outputs' shapes: numbers, or names of sizes that are open."""
    return [
        [d.dim_param or d.dim_value for d in output.type.tensor_type.shape.dim]
        for output in file.graph.output
    ]


def sizes_open(levels: int) -> list[dict[int, str]]:
    """``dynamic_shapes`` of levels [N, C, H_l, W_l], all of whose sizes may change but C."""
    return [{0: "n", 2: f"h{level}", 3: f"w{level}"} for level in range(levels)]


class Session:
    """A file in onnxruntime, on one thread."""

    def __init__(self, file: onnx.ModelProto) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            file.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self._inputs = [value.name for value in self._session.get_inputs()]

    def __call__(self, inputs: Any) -> list[Tensor]:
        """The outputs for the leaves of ``inputs``, in order."""
        values = [x.detach().numpy() for x in tree_leaves(inputs)]
        feed = dict(zip(self._inputs, values, strict=True))
        return [torch.from_numpy(out) for out in self._session.run(None, feed)]


def reference(model: nn.Module, arguments: tuple[Any, ...]) -> list[Tensor]:
    """The leaves of what ``model`` returns, on the reference in float64."""
    doubled = tree_map(lambda x: x.double(), arguments)
    with backend("reference"), torch.no_grad():
        return tree_leaves(copy.deepcopy(model).double()(*doubled))


def assert_same(
    session: Session, model: nn.Module, arguments: tuple[Any, ...], tolerance: float = TOLERANCE
) -> None:
    """The file computes what the reference does in float64."""
    found, expected = session(arguments), reference(model, arguments)
    assert [x.shape for x in found] == [x.shape for x in expected]
    for a, b in zip(found, expected, strict=True):
        assert relative_l2(a, b) < tolerance


class Each(nn.Module):
    """Many modules as one, since an export takes seconds whatever it exports."""

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts)

    def forward(self, levels: list[Tensor]) -> dict[str, Any]:
        return {name: part(levels) for name, part in self.parts.items()}


def assert_each_same(session: Session, model: Each, levels: list[Tensor]) -> None:
    """As :func:`assert_same`, and the message says which parts differ."""
    found = iter(session(levels))
    wrong = {}
    for name, part in model.parts.items():
        for expected in reference(part, (levels,)):
            error = relative_l2(next(found), expected)
            if not error < TOLERANCE:
                wrong[name] = error
    assert not wrong
    assert not list(found)
