"""After a change of a kernel: is it still right? Numbers and gradients of a block in float64.

Outputs are compared with the reference in plain PyTorch, gradients with finite differences. The
tests do this for every operator; this is the shortest form, to try things. A whole machine is
checked by: python -m dyhead_cuda check

    python examples/gradcheck.py
"""

from typing import Literal

import torch

import dyhead_cuda

torch.manual_seed(0)
device: Literal["cpu", "cuda"] = "cpu"
block = dyhead_cuda.DyHeadBlock(4, 4, num_groups=2).to(device, torch.float64)
for parameter in block.parameters():  # away from zeros, where gradients would vanish
    torch.nn.init.normal_(parameter, std=0.3)
levels = [
    torch.randn(1, 4, *size, dtype=torch.float64, device=device, requires_grad=True)
    for size in ((5, 6), (3, 3), (2, 2))
]


def outputs(*levels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(block(list(levels)))


with dyhead_cuda.backend(device):  # an error if its library is not there, and says why
    found = outputs(*levels)
    assert torch.autograd.gradcheck(outputs, levels)
with dyhead_cuda.backend("reference"):
    expected = outputs(*levels)
for x, wanted in zip(found, expected, strict=True):
    torch.testing.assert_close(x, wanted, rtol=1e-10, atol=1e-10)
print("outputs and gradients are right")
