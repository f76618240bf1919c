"""torch.jit.script: compiles ModulatedDeformConv2d, and gets one sentence from everything else."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn

from dyhead_cuda import DyHead, DynamicReLU, ModulatedDeformConv2d, UnifiedDyHead, accelerate
from tests.helpers.compare import assert_close, assert_gradients_close, gradients
from tests.helpers.modules import randomise
from tests.helpers.published import mmdet

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3, "padding": 1},
    "all options": {
        "kernel_size": (3, 2),
        "stride": (1, 2),
        "padding": (2, 1),
        "dilation": (2, 1),
        "groups": 2,
        "deform_groups": 4,
        "bias": False,
    },
}


def inputs(conv: ModulatedDeformConv2d, dtype: torch.dtype, height: int, width: int) -> list[Any]:
    x = torch.randn(2, 8, height, width, dtype=dtype)
    plain = nn.Conv2d(8, 1, conv.kernel_size, conv.stride, conv.padding, conv.dilation).to(dtype)
    count = conv.kernel_size[0] * conv.kernel_size[1] * conv.deform_groups
    size = plain(x).shape[2:]
    offset = torch.randn(2, 2 * count, *size, dtype=dtype)
    return [x, offset, torch.rand(2, count, *size, dtype=dtype)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_deformable_convolution(name: str, dtype: torch.dtype) -> None:
    conv = ModulatedDeformConv2d(8, 12, **OPTIONS[name]).to(dtype)
    randomise(conv)
    scripted = torch.jit.script(conv)
    for height, width in ((9, 11), (14, 6)):
        x, offset, mask = inputs(conv, dtype, height, width)
        assert torch.equal(scripted(x, offset, mask), conv(x, offset, mask))
        assert torch.equal(scripted(x, offset), conv(x, offset))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_it_trains_on_the_same_parameters_and_is_saved(dtype: torch.dtype) -> None:
    conv = ModulatedDeformConv2d(8, 12, 3, padding=1).to(dtype)
    scripted = torch.jit.script(conv)
    plain = inputs(conv, dtype, 7, 8)
    for _ in range(3):  # TorchScript optimises for what it saw in the first calls
        scripted(*plain)
    tensors = [t.clone().requires_grad_() for t in plain]
    wanted = [*tensors, *conv.parameters()]
    found = gradients(scripted(*tensors), wanted)
    assert_gradients_close(found, gradients(conv(*tensors), wanted), dtype)
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    assert_close(torch.jit.load(file)(*tensors), conv(*tensors), dtype)


@pytest.mark.parametrize(
    "module",
    [
        DyHead(8, 8, 1, num_groups=4),
        UnifiedDyHead(3, 8, 1),
        DynamicReLU(8),
        nn.Sequential(accelerate(mmdet.DyHead(16, 16, 1, zero_init_offset=False))),
    ],
    ids=["DyHead", "UnifiedDyHead", "DynamicReLU", "accelerated"],
)
def test_others_are_refused_in_one_sentence(module: nn.Module) -> None:
    with pytest.raises(RuntimeError, match=r"^torch.jit.script cannot compile a \w+: use") as error:
        torch.jit.script(module)
    assert "\n" not in str(error.value)


class Doubled(ModulatedDeformConv2d):
    def forward(self, *tensors: Any) -> Any:
        return 2 * super().forward(*tensors)


def convolution_with(attached: str) -> ModulatedDeformConv2d:
    if attached == "subclass":
        return Doubled(8, 8, 3)
    conv = ModulatedDeformConv2d(8, 8, 3)
    if attached == "hook":
        conv.register_forward_hook(lambda module, inputs, out: 2 * out)
    else:
        nn.utils.parametrizations.weight_norm(conv)
    return conv


@pytest.mark.parametrize("attached", ["subclass", "hook", "parametrization"])
def test_nothing_attached_to_a_convolution_is_lost(attached: str) -> None:
    with pytest.raises(RuntimeError, match=r"^torch.jit.script cannot compile a \w+ that"):
        torch.jit.script(convolution_with(attached))
