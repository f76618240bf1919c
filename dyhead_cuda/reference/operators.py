"""The operators that both forms of the head are made of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dyhead_cuda import checks
from dyhead_cuda.numerics import Activation, hsigmoid, no_autocast, to_compute
from dyhead_cuda.pyramid import OFFSET_CHANNELS


def _bilinear_sample(rows: Tensor, height: int, width: int, y: Tensor, x: Tensor) -> Tensor:
    """Values of ``rows`` [B, H * W, C] at pixel coordinates ``y``, ``x`` [B, P], as [B, P, C].

    A sample is inside when -1 < y < H and -1 < x < W. Outside samples, and corners beyond the
    border, are zero with zero gradient; a sample at NaN or infinity is NaN, with NaN gradients to
    its coordinates. Neither reads anything.
    """
    batch, _, channels = rows.shape
    inside = (y > -1) & (y < height) & (x > -1) & (x < width)
    nowhere = (0 * y + 0 * x).detach()  # NaN where one of them is not finite, else 0
    # Multiplied, not chosen, so that gradients of outside samples are 0 times what arrives, too.
    held = inside | nowhere.isnan()
    y, x = y * held + nowhere, x * held + nowhere
    top, left = y.floor(), x.floor()
    below, right = y - top, x - left
    top, left = (torch.where(inside, corner, 0).long() for corner in (top, left))
    first_row = torch.arange(batch, device=rows.device).unsqueeze(1) * (height * width)
    flat_rows = rows.reshape(batch * height * width, channels)
    out = rows.new_zeros(batch, y.shape[1], channels)
    for dy, weight_y in ((0, 1 - below), (1, below)):
        for dx, weight_x in ((0, 1 - right), (1, right)):
            corner_y, corner_x = top + dy, left + dx
            exists = (corner_y >= 0) & (corner_y < height) & (corner_x >= 0) & (corner_x < width)
            pixel = corner_y.clamp(0, height - 1) * width + corner_x.clamp(0, width - 1)
            corner = flat_rows.index_select(0, (first_row + pixel).flatten()).view_as(out)
            # A corner beyond the border is zero, whatever the pixel that stands in for it is.
            corner = torch.where((inside & exists).unsqueeze(2), corner, 0)
            out = out + (weight_y * weight_x).unsqueeze(2) * corner
    return out


def _tap_grid(geometry: checks.DeformConvGeometry, like: Tensor) -> tuple[Tensor, Tensor]:
    """Where each tap of each output pixel is without offsets: y and x, [taps, pixels] each."""

    def axis(i: int) -> Tensor:
        taps = torch.arange(geometry.kernel[i], device=like.device) * geometry.dilation[i]
        pixels = torch.arange(geometry.output[i], device=like.device) * geometry.stride[i]
        return (taps.unsqueeze(1) + pixels - geometry.padding[i]).to(like.dtype)

    size = (*geometry.kernel, *geometry.output)
    y, x = axis(0)[:, None, :, None], axis(1)[None, :, None, :]
    shape = (size[0] * size[1], size[2] * size[3])
    return y.expand(size).reshape(shape), x.expand(size).reshape(shape)


def modulated_deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    mask: Tensor | None = None,
) -> Tensor:
    """Modulated deformable convolution (DCNv2), as ``torchvision.ops.deform_conv2d``.

    out(p) = sum_k w_k . input(p * stride - padding + k * dilation + offset_k(p)) * mask_k(p).

    Args:
        input: [N, C_in, H, W] of any floating type, as all arguments.
        offset: [N, 2 * D * K, H_out, W_out] in pixels of the input, dy before dx for each of the K
            taps of each of the D deformable groups.
        weight: [C_out, C_in / groups, kh, kw]; the number of groups follows from its shape.
        bias: [C_out] or None.
        stride: an int or (vertical, horizontal), in pixels.
        padding: likewise.
        dilation: likewise.
        mask: [N, D * K, H_out, W_out], the modulation (after its sigmoid), or None for ones.

    Returns:
        [N, C_out, H_out, W_out], channels_last in memory. Samples at or beyond coordinate -1 or the
        far border are zero and have zero offset gradient (as in mmcv and the published code;
        torchvision's gradient is one-sided at exactly -1). Samples at NaN or infinity are NaN.

    Raises:
        TypeError: what should be a tensor is none.
        ValueError: shapes that do not fit, with the expected shape.

    Source: arXiv 1811.11168, equation 1.

    Example:
        >>> import torch
        >>> x, weight = torch.randn(2, 8, 10, 12), torch.randn(16, 8, 3, 3)
        >>> modulated_deform_conv2d(x, torch.randn(2, 18, 10, 12), weight, padding=1).shape
        torch.Size([2, 16, 10, 12])
    """
    geometry = checks.deform_conv_geometry(
        input, offset, weight, bias, stride, padding, dilation, mask
    )
    n, _, height, width = input.shape
    out_channels = weight.shape[0]
    (kernel_h, kernel_w), (out_h, out_w) = geometry.kernel, geometry.output
    taps, pixels = kernel_h * kernel_w, out_h * out_w
    deform_groups, groups = geometry.deform_groups, geometry.groups

    values = to_compute(input)
    with no_autocast(values):
        if height * width == 0:  # zero everywhere, as outside of any map
            values = F.pad(values, (0, int(width == 0), 0, int(height == 0)))
            height, width = values.shape[2:]
        rows = values.flatten(2).transpose(1, 2)  # [N, H * W, C]
        out = rows.new_zeros(n, pixels, groups, out_channels // groups)
        if n > 0 and pixels > 0:
            rows = rows.unflatten(2, (deform_groups, -1)).transpose(1, 2).flatten(0, 1)
            first_y, first_x = _tap_grid(geometry, values)
            shifts = offset.to(values.dtype).reshape(n * deform_groups, taps, 2, pixels)
            y, x = shifts[:, :, 0] + first_y, shifts[:, :, 1] + first_x
            columns = _bilinear_sample(rows, height, width, y.flatten(1), x.flatten(1))
            if mask is not None:
                columns = columns * mask.to(values.dtype).reshape(n * deform_groups, -1, 1)
            # [N * D, taps * pixels, C / D] -> [N, pixels, groups, C / groups * taps]
            columns = columns.view(n, deform_groups, taps, pixels, -1).permute(0, 3, 1, 4, 2)
            columns = columns.reshape(n, pixels, groups, -1)
            kernels = weight.to(values.dtype).reshape(groups, out_channels // groups, -1)
            out = torch.einsum("npgk,gok->npgo", columns, kernels)
        out = out.flatten(2)
        if bias is not None:
            out = out + bias.to(out.dtype)
        return out.transpose(1, 2).unflatten(2, (out_h, out_w)).to(input.dtype)


def dynamic_relu(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    *,
    activation: Activation = "hsigmoid",
) -> Tensor:
    """Task-aware attention: max(a1 . x + b1, a2 . x + b2) per channel (dynamic ReLU).

    t = 2 . s(fc2(relu(fc1(mean(x))))) - 1 in [-1, 1], split in the order a1, b1, a2, b2 of C values
    each; a1 = 1 + t, a2 = t, b1 and b2 = t / 2. The mean is over all positions of an image.

    Args:
        x: [N, C, ...] of any floating type; any number of trailing dimensions, none included.
        fc1_weight: [C // r, C], of any floating type, as all that follow.
        fc1_bias: [C // r].
        fc2_weight: [4 * C, C // r].
        fc2_bias: [4 * C].
        activation: s, "hsigmoid" (relu6(x + 3) / 6: the published code) or "sigmoid" (logistic).

    Returns:
        As ``x``.

    Raises:
        TypeError: what should be a tensor is none.
        ValueError: shapes that do not fit, an unknown activation.

    Source: arXiv 2003.10027; the paper, section 3.2, "task-aware attention".

    Example:
        >>> import torch
        >>> layers = torch.randn(2, 8), torch.zeros(2), torch.randn(32, 2), torch.zeros(32)
        >>> dynamic_relu(torch.randn(1, 8, 5, 5), *layers).shape
        torch.Size([1, 8, 5, 5])
    """
    checks.dynamic_relu(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation)
    value = to_compute(x)
    flat = value.flatten(2) if x.dim() > 2 else value.unsqueeze(2)  # [N, C, P]
    if flat.shape[2] == 0:
        return x.clone()  # no mean to speak of; empty in, empty out
    with no_autocast(x):
        hidden = F.relu(F.linear(flat.mean(2), fc1_weight.to(flat), fc1_bias.to(flat)))
        logits = F.linear(hidden, fc2_weight.to(flat), fc2_bias.to(flat))
    gate = hsigmoid(logits) if activation == "hsigmoid" else logits.sigmoid()
    a1, b1, a2, b2 = (2 * gate - 1).unsqueeze(2).chunk(4, dim=1)
    out = torch.maximum(flat * (a1 + 1) + b1 / 2, flat * a2 + b2 / 2)
    return out.reshape(x.shape).to(x.dtype)


def offset_and_mask(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets [N, 18, H, W] and modulation [N, 9, H, W] (after its sigmoid) predicted from x."""
    if x.numel() == 0:
        predictions = x.new_zeros(x.shape[0], weight.shape[0], *x.shape[2:])
    else:
        predictions = F.conv2d(x, weight, bias, padding=1)
    return predictions[:, :OFFSET_CHANNELS], predictions[:, OFFSET_CHANNELS:].sigmoid()
