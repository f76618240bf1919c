"""The layer in ten lines: a head on a pyramid, its gradients, and the same from plain PyTorch.

Runs on any machine in seconds: python examples/quickstart.py
"""

from __future__ import annotations

import torch

import dyhead_cuda

# Three levels [N, C, H, W], finest first, each half as large as the one before.
pyramid = [torch.randn(1, 64, 40 >> level, 56 >> level, requires_grad=True) for level in range(3)]
head = dyhead_cuda.DyHead(in_channels=64, out_channels=64, num_blocks=2)

outputs = head(pyramid)  # a list, tuple or dict in, the same out
sum(out.square().mean() for out in outputs).backward()  # as any module
for level, out in zip(pyramid, outputs, strict=True):
    assert level.grad is not None
    print(f"{tuple(level.shape)} -> {tuple(out.shape)}, gradient {level.grad.norm():.2e}")

with torch.no_grad(), dyhead_cuda.backend("reference"):  # also "cpu", "cuda" and "auto"
    expected = head(pyramid)
for out, wanted in zip(outputs, expected, strict=True):
    torch.testing.assert_close(out, wanted, rtol=1e-3, atol=1e-4)
print("the same as in plain PyTorch")
