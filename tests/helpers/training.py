"""Training as users do it, on any device: a small model, and the checks of how it trains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyhead_cuda import DyHead, UnifiedDyHead
from tests.helpers.compare import leaf, random_like
from tests.helpers.inputs import halving_sizes, random_pyramid
from tests.helpers.modules import randomise

KINDS = ("DyHead", "DyHead recompute", "UnifiedDyHead", "UnifiedDyHead recompute")
HALF = (torch.float16, torch.bfloat16)
CHANNELS = 32

FROZEN = (
    *("stem", "down", "offset_conv", "low", "mid", "high", "norm", "bias", "scale", "fc1"),
    *("spatial_weight", "blocks.0", "blocks.1"),
)

# Relative L2 error of all gradients together against a float32 run, through four layers and two
# blocks: a few samples change their pixel, and have another slope there.
GRADIENT_TOLERANCE = {torch.float16: 0.03, torch.bfloat16: 0.1}


class Model(nn.Module):
    """Image [N, 3, H, W] to the maps of a head on a pyramid of three convolutions."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.down = nn.Conv2d(CHANNELS, CHANNELS, 3, stride=2, padding=1)
        self.head = head(kind)
        randomise(self)

    def forward(self, image: Tensor) -> list[Tensor]:
        levels = [self.stem(image)]
        while len(levels) < 3:
            levels.append(self.down(levels[-1]))
        out = self.head(levels)
        return [out] if isinstance(out, Tensor) else out


def head(kind: str) -> nn.Module:
    name, recompute = kind.split(" ")[0], kind.endswith("recompute")
    if name == "DyHead":
        return DyHead(CHANNELS, CHANNELS, 2, num_groups=4, recompute=recompute)
    return UnifiedDyHead(3, CHANNELS, 2, recompute=recompute)


def image(device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return random_pyramid(2, 3, [(22, 17)], dtype)[0].to(device)


def loss_of(outs: Sequence[Tensor]) -> Tensor:
    """Distance to fixed random maps, in float32."""
    targets = [t.to(x.device, torch.float32) for t, x in zip(random_like(*outs), outs, strict=True)]
    pairs = zip(outs, targets, strict=True)
    return torch.stack([F.mse_loss(x.float(), target) for x, target in pairs]).sum()


def gradients_of(model: nn.Module) -> list[Tensor]:
    """Of all parameters, each checked to be there, finite, and of its parameter's type."""
    grads = []
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        assert grad is not None, name
        assert grad.dtype == parameter.dtype, name
        assert grad.isfinite().all(), name
        grads.append(grad)
    return grads


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().double().flatten() for t in tensors])


def assert_near(found: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> None:
    """All together within the tolerance, and each in about the direction of its own."""
    a, b = flat(found), flat(expected)
    assert (a - b).norm() <= GRADIENT_TOLERANCE[dtype] * b.norm()
    for i, (x, y) in enumerate(zip(found, expected, strict=True)):
        if y.norm() > 1e-3 * b.norm():
            similarity = F.cosine_similarity(flat([x]), flat([y]), dim=0)
            assert similarity > 0.98, f"gradient {i}: {similarity:.3g}"


def precise_gradients(kind: str, device: str) -> list[Tensor]:
    model = Model(kind).to(device)
    loss_of(model(image(device))).backward()
    return gradients_of(model)


def check_autocast(kind: str, device: str, dtype: torch.dtype) -> None:
    """Float32 master weights get float32 gradients near those of a float32 run."""
    expected = precise_gradients(kind, device)
    model = Model(kind).to(device)
    with torch.autocast(device, dtype):
        outs = model(image(device))
        loss = loss_of(outs)
    assert {x.dtype for x in outs} == {dtype}
    scaler = torch.amp.GradScaler(device, init_scale=2.0**12)  # float16 gradients would vanish
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    assert_near(gradients_of(model), expected, dtype)


def check_backward_inside_autocast(kind: str, device: str, dtype: torch.dtype) -> None:
    """Against the advice of PyTorch's documentation, many call the backward in the region too."""
    model = Model(kind).to(device)
    with torch.autocast(device, dtype):
        (2.0**12 * loss_of(model(image(device)))).backward()
    grads = [grad / 2.0**12 for grad in gradients_of(model)]
    assert_near(grads, precise_gradients(kind, device), dtype)


def check_float32_features_under_autocast(kind: str, device: str, dtype: torch.dtype) -> None:
    """The head computes in its input's type, whatever the region's is."""
    torch.manual_seed(0)
    module = head(kind).to(device)
    features = [leaf(x.to(device)) for x in pyramid(torch.float32)]
    inputs = [*features, *module.parameters()]
    with torch.autocast(device, dtype):
        outs = as_list(module(features))
    found = torch.autograd.grad(loss_of(outs), inputs, materialize_grads=True)
    plain = as_list(module(features))
    expected = torch.autograd.grad(loss_of(plain), inputs, materialize_grads=True)
    assert {x.dtype for x in outs} == {torch.float32}
    for a, b in zip([*outs, *found], [*plain, *expected], strict=True):
        assert torch.equal(a, b)


def check_scaled_step(kind: str, device: str) -> None:
    """One step with a gradient scaler is the step of the unscaled float32 gradients."""
    model = Model(kind).to(device)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**12)
    scaled_step(model, optimizer, scaler, device)
    assert scaler.get_scale() == 2.0**12
    steps = [p - b for p, b in zip(model.parameters(), before, strict=True)]
    expected = [-0.5 * grad for grad in precise_gradients(kind, device)]
    assert_near(steps, expected, torch.float16)


def check_overflow_is_skipped(kind: str, device: str) -> None:
    """Gradients beyond float16 reach the parameters as such, and the scaler sees them."""
    model = Model(kind).to(device)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**40)
    scaled_step(model, optimizer, scaler, device)
    assert scaler.get_scale() == 2.0**39
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    while torch.equal(flat(list(model.parameters())), flat(before)):
        assert scaler.get_scale() > 1, "no scale without overflow"
        scaled_step(model, optimizer, scaler, device)
    assert flat(list(model.parameters())).isfinite().all()


def scaled_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, device: str
) -> None:
    optimizer.zero_grad()
    with torch.autocast(device, torch.float16):
        loss = loss_of(model(image(device)))
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()


def check_half_precision_module(kind: str, device: str) -> None:
    """Parameters, features and gradients in bfloat16, against the same numbers in float32."""
    dtype = torch.bfloat16
    model = Model(kind).to(device, dtype)
    outs = model(image(device, dtype))
    assert {x.dtype for x in outs} == {dtype}
    loss_of(outs).backward()
    found = [grad.float() for grad in gradients_of(model)]
    model.zero_grad()
    loss_of(model.float()(image(device, dtype).float())).backward()
    assert_near(found, gradients_of(model), dtype)


def check_frozen_parts(kind: str, device: str) -> None:
    """What is frozen gets no gradient, and everything else gets the one it always had."""
    expected = precise_gradients(kind, device)
    names = [name for name, _ in Model(kind).named_parameters()]
    for part in FROZEN:
        model = Model(kind).to(device)
        kept = [part not in name for name in names]
        for parameter, keep in zip(model.parameters(), kept, strict=True):
            parameter.requires_grad_(keep)
        loss_of(model(image(device))).backward()
        for name, parameter, keep, grad in zip(
            names, model.parameters(), kept, expected, strict=True
        ):
            assert (parameter.grad is not None) == keep, name
            if parameter.grad is not None:
                torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-6, msg=name)


def as_list(out: Tensor | list[Tensor]) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else out


def pyramid(dtype: torch.dtype) -> list[Tensor]:
    return random_pyramid(2, CHANNELS, halving_sizes(29, 26, 3), dtype)


@contextmanager
def deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def trained_bits(module: nn.Module, device: str, dtype: torch.dtype) -> list[Tensor]:
    """Outputs and all gradients of the head alone."""
    features = [leaf(x.to(device)) for x in pyramid(dtype)]
    outs = as_list(module(features))
    inputs = [*features, *module.parameters()]
    cotangents = [t.to(x) for t, x in zip(random_like(*outs), outs, strict=True)]
    return [*outs, *torch.autograd.grad(outs, inputs, cotangents, materialize_grads=True)]
