"""Synthetic checkpoints with the published names and shapes, and what such a checkpoint computes.

The evaluation reads nothing but the checkpoint's tensors and is written from the public code bases'
structure, apart from this package.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyhead_cuda.detection.models.recipes import Recipe
from tests.helpers.published import microsoft, mmdet

CHANNELS, CLASSES = 32, 3
State = dict[str, Tensor]


def fill(shapes: dict[str, Any]) -> State:
    """Random values that keep activations, offsets and the results' dependence on the image alive.

    The first norm takes pixels of 0..255 or of unit variance alike; residual branches are small, so
    that a deep network does not grow; offsets are of the order of a pixel.
    """
    state = {}
    for key, shape in shapes.items():
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(7)
        elif key.endswith("relative_position_index"):
            state[key] = relative_position_index(int(shape[0] ** 0.5))
        elif key.endswith("running_var") or (len(shape) == 1 and key.endswith("weight")):
            state[key] = 0.7 + 0.6 * torch.rand(shape)
        elif len(shape) > 1:
            state[key] = torch.randn(shape) * (2 / shape[1:].numel()) ** 0.5
        else:
            state[key] = 0.1 * torch.randn(shape)
        if re.search(r"(stem\.conv1\.norm|backbone\.bn1)\.running_var", key):
            state[key] *= 100**2
        if re.search(r"(conv3\.norm|layer\d\.\d+\.bn[23])\.weight", key):
            state[key] *= 0.4
        if re.search(r"offset\.weight", key):
            state[key] *= 0.1
    return state


def conv(out: int, into: int, size: int) -> dict[str, torch.Size]:
    return {"weight": torch.Size((out, into, size, size)), "bias": torch.Size((out,))}


def under(prefix: str, shapes: dict[str, torch.Size]) -> dict[str, torch.Size]:
    return {f"{prefix}.{key}": shape for key, shape in shapes.items()}


def shapes_of(module: nn.Module) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in module.state_dict().items()}


def predictors(names: tuple[str, str, str], size: int) -> dict[str, torch.Size]:
    shapes: dict[str, torch.Size] = {}
    for name, values in zip(names, (CLASSES, 4, 1), strict=True):
        shapes |= under(name, conv(values, CHANNELS, size))
    return shapes


MMDET_PREDICTORS = ("bbox_head.atss_cls", "bbox_head.atss_reg", "bbox_head.atss_centerness")
MICROSOFT_PREDICTORS = ("head.cls_logits", "head.bbox_pred", "head.centerness")


def mmdet_resnet(network: Callable[[], nn.Module]) -> dict[str, torch.Size]:
    """Its names are torchvision's."""
    return {key: v for key, v in shapes_of(network()).items() if not key.startswith("fc.")}


def mmdet_state(body: dict[str, torch.Size], width: int, size: int = 3) -> State:
    """With a backbone whose last stage has ``width`` channels."""
    shapes = under("backbone", body)
    for i in range(3):
        shapes |= under(f"neck.0.lateral_convs.{i}.conv", conv(CHANNELS, width >> (2 - i), 1))
    for i in range(5):
        shapes |= under(f"neck.0.fpn_convs.{i}.conv", conv(CHANNELS, CHANNELS, 3))
    shapes |= under("neck.1", shapes_of(mmdet.DyHead(CHANNELS, CHANNELS, 2)))
    shapes |= predictors(MMDET_PREDICTORS, size)
    shapes |= {f"bbox_head.scales.{i}.scale": torch.Size(()) for i in range(5)}
    return fill(shapes)


def detectron_resnet(depths: tuple[int, ...] = (3, 4, 6, 3)) -> dict[str, torch.Size]:
    def normed(prefix: str, out: int, into: int, size: int) -> dict[str, torch.Size]:
        norm = ("weight", "bias", "running_mean", "running_var")
        return {
            f"{prefix}.weight": torch.Size((out, into, size, size)),
            **{f"{prefix}.norm.{name}": torch.Size((out,)) for name in norm},
        }

    shapes, into = normed("stem.conv1", 64, 3, 7), 64
    for stage, depth in enumerate(depths):
        inner, out = 64 << stage, 256 << stage
        for i in range(depth):
            block = f"res{stage + 2}.{i}"
            if not i:
                shapes |= normed(f"{block}.shortcut", out, into, 1)
            shapes |= normed(f"{block}.conv1", inner, into, 1)
            shapes |= normed(f"{block}.conv2", inner, inner, 3)
            shapes |= normed(f"{block}.conv3", out, inner, 1)
            into = out
    return shapes


class SwinNames(NamedTuple):
    """What the code bases call the parts of a Swin transformer, and how patches are merged."""

    stages: str
    patch: str
    attention: str
    fc1: str
    fc2: str
    unfolded: bool


DETECTRON = SwinNames("layers", "patch_embed.proj", "attn", "mlp.fc1", "mlp.fc2", False)
MMDET = SwinNames(
    "stages", "patch_embed.projection", "attn.w_msa", "ffn.layers.0.0", "ffn.layers.1", True
)
DEPTHS, WIDTH = (2, 1, 3, 2), 8


def swin(names: SwinNames, window: int) -> dict[str, torch.Size]:
    def layer(prefix: str, *shape: int) -> dict[str, torch.Size]:
        return {f"{prefix}.weight": torch.Size(shape), f"{prefix}.bias": torch.Size(shape[:1])}

    shapes = layer(names.patch, WIDTH, 3, 4, 4) | layer("patch_embed.norm", WIDTH)
    for stage, depth in enumerate(DEPTHS):
        width, heads = WIDTH << stage, 2 << stage
        for i in range(depth):
            block = f"{names.stages}.{stage}.blocks.{i}"
            attention = f"{block}.{names.attention}"
            shapes |= layer(f"{block}.norm1", width) | layer(f"{block}.norm2", width)
            shapes |= layer(f"{attention}.qkv", 3 * width, width)
            shapes |= layer(f"{attention}.proj", width, width)
            table = torch.Size(((2 * window - 1) ** 2, heads))
            shapes[f"{attention}.relative_position_bias_table"] = table
            shapes[f"{attention}.relative_position_index"] = torch.Size((window**2,) * 2)
            shapes |= layer(f"{block}.{names.fc1}", 4 * width, width)
            shapes |= layer(f"{block}.{names.fc2}", width, 4 * width)
        if stage < 3:
            merging = f"{names.stages}.{stage}.downsample"
            shapes |= layer(f"{merging}.norm", 4 * width)
            shapes[f"{merging}.reduction.weight"] = torch.Size((2 * width, 4 * width))
        if stage:
            shapes |= layer(f"norm{stage}", width)
    return shapes


def microsoft_state(body: dict[str, torch.Size], widths: tuple[int, ...]) -> State:
    shapes = under("backbone.backbone.bottom_up", body)
    for level, width in zip((3, 4, 5), widths, strict=True):
        shapes |= under(f"backbone.backbone.fpn_lateral{level}", conv(CHANNELS, width, 1))
        shapes |= under(f"backbone.backbone.fpn_output{level}", conv(CHANNELS, CHANNELS, 3))
    for level in (6, 7):
        shapes |= under(f"backbone.backbone.top_block.p{level}", conv(CHANNELS, CHANNELS, 3))
    shapes |= under("backbone", shapes_of(microsoft.DyHead(nn.Identity(), CHANNELS, 2)))
    shapes |= predictors(MICROSOFT_PREDICTORS, 1)
    shapes |= {f"head.scales.{i}.scale": torch.Size((1,)) for i in range(5)}
    return fill(shapes)


def relative_position_index(window: int) -> Tensor:
    place = torch.arange(window)
    y, x = (t.flatten() for t in torch.meshgrid(place, place, indexing="ij"))
    dy, dx = (t[:, None] - t + window - 1 for t in (y, x))
    return dy * (2 * window - 1) + dx


class Plain:
    """A detector evaluated tensor by tensor in float64."""

    def __init__(self, state: State, body: str, names: SwinNames) -> None:
        self.prefix, self.names = body, names
        self.state = {k: v.double() if v.is_floating_point() else v for k, v in state.items()}

    def conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = self.state[f"{name}.weight"]
        bias = self.state.get(f"{name}.bias")
        return F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2)

    def norm(self, x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (
            self.state[f"{name}.{key}"][:, None, None]
            for key in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def resnet(self, x: Tensor, caffe: bool) -> list[Tensor]:
        """Of torchvision's names (mmdet) or of detectron2's."""
        theirs = f"{self.prefix}.stem.conv1.weight" in self.state
        stem = f"{self.prefix}.stem.conv1" if theirs else f"{self.prefix}.conv1"

        def normed(x: Tensor, conv: str, stride: int = 1) -> Tensor:
            norm = f"{conv}.norm"
            if not theirs:
                left, _, last = conv.rpartition(".")
                norm = f"{left}.bn{last[-1]}" if last[:4] == "conv" else f"{left}.1"
            return self.norm(self.conv(x, conv, stride), norm)

        x = F.max_pool2d(normed(x, stem, 2).relu(), 3, 2, 1)
        levels = []
        for stage in range(4):
            name = f"res{stage + 2}" if theirs else f"layer{stage + 1}"
            index = 0
            while f"{self.prefix}.{name}.{index}.conv1.weight" in self.state:
                block = f"{self.prefix}.{name}.{index}"
                stride = 2 if stage and not index else 1
                skip = f"{block}.shortcut" if theirs else f"{block}.downsample.0"
                bottleneck = f"{block}.conv3.weight" in self.state
                first, second = (stride, 1) if caffe or not bottleneck else (1, stride)
                y = normed(x, f"{block}.conv1", first).relu()
                y = normed(y, f"{block}.conv2", second)
                if bottleneck:
                    y = normed(y.relu(), f"{block}.conv3")
                short = normed(x, skip, stride) if f"{skip}.weight" in self.state else x
                x = (y + short).relu()
                index += 1
            levels.append(x)
        return levels[1:]

    def layer(self, x: Tensor, name: str) -> Tensor:
        name = f"{self.prefix}.{name}"
        weight, bias = self.state[f"{name}.weight"], self.state.get(f"{name}.bias")
        if weight.dim() == 1:
            return F.layer_norm(x, weight.shape, weight, bias)
        return F.linear(x, weight, bias)

    def attention(self, x: Tensor, name: str, shifted: bool) -> Tensor:
        """Of one image [H, W, C], window by window; shifted windows do not wrap around."""
        table = self.state[f"{self.prefix}.{name}.relative_position_bias_table"]
        window = int(len(table) ** 0.5 + 1) // 2
        shift = window // 2 if shifted else 0
        height, width, channels = x.shape
        tall, wide = -height % window, -width % window
        x = F.pad(x, (0, 0, 0, wide, 0, tall))

        def parts(size: int) -> Tensor:
            """Of a rolled axis: whole windows, then the last one's end, then what came round."""
            at = torch.arange(size)
            return (at >= size - window).int() + (at >= size - shift).int()

        region = 3 * parts(x.shape[0])[:, None] + parts(x.shape[1])
        if not shift:
            region = torch.zeros_like(region)
        x = x.roll((-shift, -shift), (0, 1))
        bias = table[relative_position_index(window)].permute(2, 0, 1)
        out = torch.zeros_like(x)
        for i in range(0, x.shape[0], window):
            for j in range(0, x.shape[1], window):
                box = slice(i, i + window), slice(j, j + window)
                tokens = x[box].reshape(-1, channels)
                here = region[box].flatten()
                heads = (
                    self.layer(tokens, f"{name}.qkv").unflatten(-1, (3, len(bias), -1)).unbind(1)
                )
                query, key, value = (t.transpose(0, 1) for t in heads)
                scores = query @ key.transpose(1, 2) * query.shape[-1] ** -0.5 + bias
                scores = scores - 100.0 * (here[:, None] != here)
                mixed = (scores.softmax(-1) @ value).transpose(0, 1).flatten(1)
                out[box] = self.layer(mixed, f"{name}.proj").reshape(window, window, channels)
        return out.roll((shift, shift), (0, 1))[:height, :width]

    def merge(self, x: Tensor, name: str) -> Tensor:
        """Patches of 2 x 2 of one image [H, W, C] into one."""
        if self.names.unfolded:
            rows = F.unfold(x.permute(2, 0, 1)[None], 2, stride=2)[0].T
            y = rows.reshape(x.shape[0] // 2, x.shape[1] // 2, -1)
        else:
            y = torch.cat([x[dy::2, dx::2] for dx in (0, 1) for dy in (0, 1)], -1)
        return self.layer(self.layer(y, f"{name}.norm"), f"{name}.reduction")

    def swin(self, image: Tensor) -> list[Tensor]:
        names = self.names
        patch = f"{self.prefix}.{names.patch}"
        x = F.conv2d(image, self.state[f"{patch}.weight"], self.state[f"{patch}.bias"], stride=4)
        x = self.layer(x[0].permute(1, 2, 0), "patch_embed.norm")
        levels = []
        for stage, depth in enumerate(DEPTHS):
            for i in range(depth):
                block = f"{names.stages}.{stage}.blocks.{i}"
                y = self.layer(x, f"{block}.norm1")
                x = x + self.attention(y, f"{block}.{names.attention}", i % 2 == 1)
                y = self.layer(self.layer(x, f"{block}.norm2"), f"{block}.{names.fc1}")
                x = x + self.layer(F.gelu(y), f"{block}.{names.fc2}")
            if stage:
                levels.append(self.layer(x, f"norm{stage}").permute(2, 0, 1)[None])
            if stage < 3:
                x = self.merge(x, f"{names.stages}.{stage}.downsample")
        return levels

    def pyramid(self, maps: list[Tensor], lateral: str, output: str, first: int) -> list[Tensor]:
        levels: list[Tensor] = []
        above = None
        for i in (2, 1, 0):
            x = self.conv(maps[i], lateral.format(i + first))
            if above is not None:
                x = x + above.repeat_interleave(2, -2).repeat_interleave(2, -1)
            above = x
            levels.insert(0, self.conv(x, output.format(i + first)))
        return levels

    def predict(self, levels: list[Tensor], names: tuple[str, ...], scale: str) -> list[Tensor]:
        """Class logits, box deltas and centerness of all positions in order: [A, K], ..."""
        parts = []
        for i, x in enumerate(levels):
            one = torch.ones(())
            factors = (one, self.state[scale.format(i)], one)
            for name, factor in zip(names, factors, strict=True):
                parts.append((self.conv(x, name) * factor)[0].flatten(1).T)
        return [torch.cat(parts[i::3]) for i in range(3)]


def run_mmdet(state: State, image: Tensor, recipe: Recipe) -> list[Tensor]:
    plain = Plain(state, "backbone", MMDET)
    swin = recipe.family == "swin"
    maps = plain.swin(image) if swin else plain.resnet(image, recipe.stride_in_1x1)
    fpn = "neck.0.fpn_convs.{}.conv"
    levels = plain.pyramid(maps, "neck.0.lateral_convs.{}.conv", fpn, 0)
    for i in (3, 4):
        levels.append(plain.conv(levels[-1], fpn.format(i), 2))
    tower = mmdet.DyHead(CHANNELS, CHANNELS, 2)
    tower.load_state_dict(
        {k.removeprefix("neck.1."): v for k, v in state.items() if k.startswith("neck.1.")}
    )
    return plain.predict(
        list(tower.double()(levels)), MMDET_PREDICTORS, "bbox_head.scales.{}.scale"
    )


def run_microsoft(state: State, image: Tensor, swin: bool) -> list[Tensor]:
    plain = Plain(state, "backbone.backbone.bottom_up", DETECTRON)
    maps = plain.swin(image) if swin else plain.resnet(image, caffe=True)
    fpn = "backbone.backbone.fpn_"
    levels = plain.pyramid(maps, fpn + "lateral{}", fpn + "output{}", 3)
    levels.append(plain.conv(levels[-1], "backbone.backbone.top_block.p6", 2))
    levels.append(plain.conv(levels[-1].relu(), "backbone.backbone.top_block.p7", 2))
    tower = microsoft.DyHead(nn.Identity(), CHANNELS, 2)
    prefix = "backbone.dyhead_tower."
    tower.dyhead_tower.load_state_dict(
        {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    )
    levels = list(tower.double()({str(i): x for i, x in enumerate(levels)}).values())
    return plain.predict(levels, MICROSOFT_PREDICTORS, "head.scales.{}.scale")
