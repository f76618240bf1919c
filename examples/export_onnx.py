"""Export a head to ONNX and run the file in onnxruntime, for images of any size.

The file has standard operators only: who runs it needs neither this package nor torch. Needs
pip install "dyhead_cuda[export]". A whole detector: python -m dyhead_cuda export --help

    python examples/export_onnx.py
"""

import tempfile
from pathlib import Path

import onnxruntime
import torch

import dyhead_cuda

torch.manual_seed(0)
head = dyhead_cuda.DyHead(in_channels=16, out_channels=16, num_blocks=1).eval()
example = [torch.randn(1, 16, side, side) for side in (16, 8, 4)]
open_sizes = [{0: "n", 2: f"h{i}", 3: f"w{i}"} for i in range(len(example))]

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, "head.onnx")
    torch.onnx.export(
        head, (example,), path, dynamo=True, dynamic_shapes=(open_sizes,), opset_version=21
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

names = [value.name for value in session.get_inputs()]
levels = [torch.randn(2, 16, *size) for size in ((20, 30), (10, 15), (5, 8))]
found = session.run(None, {name: x.numpy() for name, x in zip(names, levels, strict=True)})
with torch.no_grad():
    expected = head(levels)
for x, wanted in zip(found, expected, strict=True):
    torch.testing.assert_close(torch.from_numpy(x), wanted, rtol=1e-3, atol=1e-4)
    print(names[0], "->", list(x.shape), "as in PyTorch")
