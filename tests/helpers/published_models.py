"""Random models of the published structures, a pyramid for them, and what they all return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dyhead_cuda.compat.accelerate import AcceleratedBlock
from tests.helpers.published import (
    glip,
    glip_language,
    microsoft,
    mmdet,
    mmdet_glip,
    mmdet_main,
    ultralytics,
)

Levels = list[Tensor]


CHANNELS = 32


SIZES = ((8, 6), (4, 3), (2, 2))


def pyramid(channels: int = CHANNELS, seed: int = 0, dtype: Any = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, channels, *s, generator=generator, dtype=dtype) for s in SIZES]


def randomised(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Seeded values everywhere, also where the initialisation is zero or one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.3
            is_norm_weight = parameter.dim() == 1 and not name.endswith("bias")
            parameter.copy_(scale * noise + is_norm_weight)
    return model.to(dtype)


def microsoft_model() -> nn.Module:
    return randomised(microsoft.DyHead(nn.Identity(), CHANNELS, 2))


def mmdet_model(in_channels: int = CHANNELS) -> nn.Module:
    return randomised(mmdet.DyHead(in_channels, CHANNELS, 2, zero_init_offset=False))


def glip_model() -> nn.Module:
    return randomised(glip.DyHead(CHANNELS, 2))


def language_model() -> nn.Module:
    return randomised(glip_language.VLDyHead(CHANNELS, 2))


def mmdet_glip_model() -> nn.Module:
    return randomised(mmdet_glip.VLFusionModule(CHANNELS, 2))


def ultralytics_model() -> nn.Module:
    """A tower alone; the convolutions before it are not the head's."""
    blocks = (ultralytics.DyHeadBlock(CHANNELS, zero_init_offset=False) for _ in range(2))
    return randomised(nn.ModuleDict({"dyhead": nn.Sequential(*blocks)}))


def main_model() -> nn.Module:
    return randomised(mmdet_main.DyHead(CHANNELS, CHANNELS, 2, zero_init_offset=False))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "microsoft": microsoft_model,
    "glip": glip_model,
    "glip_language": language_model,
    "mmdet_glip": mmdet_glip_model,
    "mmdet": mmdet_model,
    "mmdet_main": main_model,
    "ultralytics": ultralytics_model,
}


def run(model: nn.Module, levels: Levels) -> Levels:
    """All outputs of any of the models, whatever it takes and returns."""
    if isinstance(model, microsoft.DyHead):
        return list(model({f"p{i}": x for i, x in enumerate(levels)}).values())
    if isinstance(model, nn.ModuleDict):
        return list(model["dyhead"](levels))
    if isinstance(model, glip_language.VLDyHead | mmdet_glip.VLFusionModule):
        hidden = torch.linspace(-1, 1, 2 * 4 * 8, dtype=levels[0].dtype).view(2, 4, 8)
        out = model(levels, {"hidden": hidden})
        return [*out["visual"], out["lang"]["hidden"]]
    return list(model(levels))


def fused(model: nn.Module) -> list[AcceleratedBlock]:
    return [module for module in model.modules() if isinstance(module, AcceleratedBlock)]


def assert_close(found: Levels, expected: Levels, tolerance: float = 1e-10) -> None:
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        assert found[key].shape == value.shape, key
        assert torch.equal(found[key], value), key
