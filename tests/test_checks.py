"""Every refusal of arguments says what was expected and what came."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dyhead_cuda import checks, functional, reference
from dyhead_cuda.pyramid import BlockParameters, BranchParameters, halved, repack, unpack
from tests.helpers.inputs import halving_sizes, random_block_parameters, random_pyramid

both = pytest.mark.parametrize("module", [reference, functional])


def shapes(**sizes: tuple[int, ...]) -> dict[str, Any]:
    return {name: torch.randn(size) for name, size in sizes.items()}


CONVOLUTION: dict[str, tuple[int, ...]] = {
    "input": (2, 4, 5, 6),
    "offset": (2, 36, 5, 6),
    "weight": (8, 2, 3, 3),
    "bias": (8,),
    "mask": (2, 18, 5, 6),
}


@both
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"input": (4, 5, 6)}, r"input \[N, C_in, H, W\], got \[4, 5, 6\]"),
        ({"input": (3, 4, 5, 6)}, r"offset \[3, 36, 5, 6\].*got \[2, 36, 5, 6\]"),
        ({"input": (2, 5, 5, 6)}, r"divides the input's 5 channels, got \[8, 2, 3, 3\]"),
        ({"input": (2, 0, 5, 6)}, r"got C_out 8"),
        ({"weight": (8, 2, 3)}, r"weight \[C_out, C_in / groups, kh, kw\], got \[8, 2, 3\]"),
        ({"weight": (7, 2, 3, 3)}, r"C_out divisible by the 2 groups.*got C_out 7"),
        ({"weight": (8, 0, 3, 3)}, r"got \[8, 0, 3, 3\]"),
        ({"weight": (8, 2, 0, 3)}, r"kernel.*got weight \[8, 2, 0, 3\]"),
        ({"weight": (8, 2, 9, 9)}, r"as large as the dilated kernel, got input \[5, 6\]"),
        ({"offset": (2, 35, 5, 6)}, r"\[N, 2 \* deformable groups \* 9.*got \[2, 35, 5, 6\]"),
        ({"offset": (2, 0, 5, 6)}, r"got \[2, 0, 5, 6\]"),
        ({"offset": (36, 5, 6)}, r"got \[36, 5, 6\]"),
        ({"offset": (2, 54, 5, 6)}, r"4 channels divisible by the 3 deformable groups"),
        ({"offset": (2, 36, 10, 12)}, r"offset \[2, 36, 5, 6\] for input.*got \[2, 36, 10, 12\]"),
        ({"mask": (2, 9, 5, 6)}, r"mask \[2, 18, 5, 6\].*got \[2, 9, 5, 6\]"),
        ({"mask": (2, 18, 10, 12)}, r"mask \[2, 18, 5, 6\].*got \[2, 18, 10, 12\]"),
        ({"mask": (1, 18, 5, 6)}, r"got \[1, 18, 5, 6\]"),
        ({"bias": (4,)}, r"bias \[8\], got \[4\]"),
        ({"bias": (8, 1)}, r"bias \[8\], got \[8, 1\]"),
    ],
)
def test_convolution_shapes(module: Any, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module.modulated_deform_conv2d(**shapes(**{**CONVOLUTION, **changed}), padding=1)
    module.modulated_deform_conv2d(**shapes(**CONVOLUTION), padding=1)


@both
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stride": 0}, "stride as one or two integers >= 1, got 0"),
        ({"stride": (1, 2, 3)}, r"stride.*got \(1, 2, 3\)"),
        ({"stride": 1.5}, "stride.*got 1.5"),
        ({"stride": "2"}, "stride.*got '2'"),
        ({"padding": -1}, "padding as one or two integers >= 0, got -1"),
        ({"padding": (1, -1)}, r"padding.*got \(1, -1\)"),
        ({"dilation": (0, 1)}, r"dilation as one or two integers >= 1, got \(0, 1\)"),
    ],
)
def test_convolution_settings(module: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module.modulated_deform_conv2d(**shapes(**CONVOLUTION), **{"padding": 1, **settings})


@both
@pytest.mark.parametrize("name", CONVOLUTION)
def test_convolution_devices_and_types(module: Any, name: str) -> None:
    arguments = shapes(**CONVOLUTION)
    other = "offset" if name == "input" else name
    with pytest.raises(ValueError, match=f"{other} on (cpu|meta).*got (cpu|meta).*one device"):
        module.modulated_deform_conv2d(**arguments | {name: arguments[name].to("meta")}, padding=1)
    with pytest.raises(ValueError, match=f"floating-point {name}, got torch.int64"):
        module.modulated_deform_conv2d(**arguments | {name: arguments[name].long()}, padding=1)


def test_geometry() -> None:
    tensors = shapes(input=(2, 12, 9, 11), offset=(2, 3 * 2 * 6, 4, 10), weight=(8, 3, 3, 2))
    geometry = checks.deform_conv_geometry(
        **tensors, bias=None, stride=(2, 1), padding=[1, 0], dilation=(2, 1), mask=None
    )
    assert geometry == checks.DeformConvGeometry(
        kernel=(3, 2), stride=(2, 1), padding=(1, 0), dilation=(2, 1), output=(4, 10), groups=4,
        deform_groups=3,
    )  # fmt: skip


RELU: dict[str, tuple[int, ...]] = {
    "x": (2, 8, 3, 5),
    "fc1_weight": (2, 8),
    "fc1_bias": (2,),
    "fc2_weight": (32, 2),
    "fc2_bias": (32,),
}


@both
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": (8,)}, r"x \[N, C, ...\], got \[8\]"),
        ({"x": (2, 9, 3)}, r"fc1_weight \[C // r, 9\] for x \[2, 9, 3\], got \[2, 8\]"),
        ({"fc1_weight": (2, 8, 1, 1)}, r"got \[2, 8, 1, 1\]"),
        ({"fc1_bias": (3,)}, r"fc1_bias \[2\], got \[3\]"),
        ({"fc2_weight": (16, 2)}, r"fc2_weight \[32, 2\] for x.*got \[16, 2\]"),
        ({"fc2_weight": (32, 3)}, r"fc2_weight \[32, 2\].*got \[32, 3\]"),
        ({"fc2_bias": (8,)}, r"fc2_bias \[32\], got \[8\]"),
    ],
)
def test_dynamic_relu_shapes(module: Any, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module.dynamic_relu(**shapes(**{**RELU, **changed}))
    module.dynamic_relu(**shapes(**RELU))


@both
@pytest.mark.parametrize("name", RELU)
def test_dynamic_relu_devices_and_types(module: Any, name: str) -> None:
    arguments = shapes(**RELU)
    with pytest.raises(ValueError, match=r"on (cpu|meta).*got (cpu|meta).*one device"):
        module.dynamic_relu(**arguments | {name: arguments[name].to("meta")})
    with pytest.raises(ValueError, match=f"floating-point {name}, got torch.int32"):
        module.dynamic_relu(**arguments | {name: arguments[name].int()})
    with pytest.raises(ValueError, match=r"activation to be one of.*'relu'"):
        module.dynamic_relu(**arguments, activation="relu")


# --- the pyramid and its parameters ---------------------------------------------------------------


def replaced(parameters: BlockParameters, name: str, tensor: Tensor) -> BlockParameters:
    value: Any = tensor
    if "." in name:
        name, field = name.split(".")
        branch: BranchParameters = getattr(parameters, name)
        value = branch._replace(**{field: value})
    return parameters._replace(**{name: value})


@both
@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("offset_weight", (18, 4, 3, 3), [27, 4, 3, 3]),
        ("offset_weight", (27, 5, 3, 3), [27, 4, 3, 3]),
        ("offset_bias", (18,), [27]),
        ("low.weight", (8, 4, 1, 1), [8, 4, 3, 3]),
        ("mid.weight", (8, 4, 5, 5), [8, 4, 3, 3]),
        ("high.weight", (6, 4, 3, 3), [8, 4, 3, 3]),
        ("low.bias", (4,), [8]),
        ("high.norm_weight", (4,), [8]),
        ("mid.norm_bias", (1,), [8]),
        ("gate_weight", (1, 8), [8]),
        ("gate_bias", (), [1]),
        ("fc1_weight", (2, 4), [2, 8]),
        ("fc1_bias", (3,), [2]),
        ("fc2_weight", (16, 2), [32, 2]),
        ("fc2_bias", (8,), [32]),
    ],
)
def test_block_parameters(
    module: Any, name: str, shape: tuple[int, ...], expected: list[int]
) -> None:
    features = random_pyramid(1, 4, halving_sizes(4, 4, 2))
    parameters = replaced(random_block_parameters(4, 8), name, torch.randn(shape).double())
    with pytest.raises(ValueError) as error:  # noqa: PT011
        module.pyramid_block(features, parameters, num_groups=2)
    assert f"{name} of shape {expected}" in str(error.value)
    assert f"got {list(shape)}" in str(error.value)


@both
@pytest.mark.parametrize("num_groups", [0, 3, 16, -2])
def test_groups_of_the_block(module: Any, num_groups: int) -> None:
    features = random_pyramid(1, 4, halving_sizes(4, 4, 2))
    with pytest.raises(ValueError, match=f"8 channels and {num_groups} groups"):
        module.pyramid_block(features, random_block_parameters(4, 8), num_groups=num_groups)


@both
@pytest.mark.parametrize("name", ["offset_weight", "high.weight", "gate_weight", "fc2_bias"])
def test_block_parameters_elsewhere(module: Any, name: str) -> None:
    features = random_pyramid(1, 4, halving_sizes(4, 4, 2))
    parameters = random_block_parameters(4, 8)
    *path, last = name.split(".")
    tensor: Tensor = getattr(getattr(parameters, path[0]) if path else parameters, last)
    with pytest.raises(ValueError, match=r"on cpu.*got meta"):
        module.pyramid_block(features, replaced(parameters, name, tensor.to("meta")), num_groups=2)


@both
@pytest.mark.parametrize("high_offset", ["flat", "crop", "mmdet_main", "aligned"])
def test_pyramids_that_do_not_fit(module: Any, high_offset: str) -> None:
    parameters = random_block_parameters(4, 8)

    def run(features: list[Tensor]) -> list[Tensor]:
        out: list[Tensor] = module.pyramid_block(
            features, parameters, high_offset=high_offset, num_groups=2
        )
        return out

    good = random_pyramid(2, 4, halving_sizes(9, 6, 3))
    with pytest.raises(ValueError, match=r"at least one level"):
        run([])
    with pytest.raises(ValueError, match=r"level 1 of shape \[N, 4, H, W\], got \[4, 5, 3\]"):
        run([good[0], good[1][0], good[2]])
    with pytest.raises(ValueError, match=r"level 2 of shape \[N, 4, H, W\], got \[2, 3, 3, 2\]"):
        run([good[0], good[1], good[2][:, :3]])
    with pytest.raises(ValueError, match=r"batch 2 .*got 1 on level 1"):
        run([good[0], good[1][:1], good[2]])
    with pytest.raises(ValueError, match=r"float64 on cpu.*got torch.float16 on cpu on level 1"):
        run([good[0], good[1].half(), good[2]])
    with pytest.raises(ValueError, match=r"float64 on cpu.*got torch.float64 on meta on level 2"):
        run([good[0], good[1], good[2].to("meta")])
    with pytest.raises(ValueError, match=r"floating-point"):
        run([x.long() for x in good])
    wrong = [good[0], good[2], good[2]]
    if high_offset == "aligned":
        assert [x.shape[-2:] for x in run(wrong)] == [x.shape[-2:] for x in wrong]
    else:
        with pytest.raises(ValueError, match=r"level 1 of size 5x3.*level 0's 9x6.*got 3x2"):
            run(wrong)
        with pytest.raises(ValueError, match=r"level 2 of size 3x2.*level 1's 5x3.*got 3x3"):
            run([good[0], good[1], *random_pyramid(2, 4, [(3, 3)])])


@both
def test_unknown_reading_of_offsets(module: Any) -> None:
    features = random_pyramid(1, 4, halving_sizes(4, 4, 2))
    with pytest.raises(ValueError, match=r"'flat', 'crop', 'mmdet_main', 'aligned'.*got 'exact'"):
        module.pyramid_block(
            features, random_block_parameters(4, 8), high_offset="exact", num_groups=2
        )


@pytest.mark.parametrize(
    ("size", "expected"),
    [((1, 1), (1, 1)), ((2, 3), (1, 2)), ((100, 167), (50, 84)), ((0, 7), (0, 4))],
)
def test_halved_is_the_size_of_a_stride_2_convolution(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert halved(size) == expected
    assert halved(torch.Size([2, 3, *size])) == expected
    if 0 not in size:
        out = torch.nn.functional.conv2d(
            torch.zeros(1, 1, *size), torch.zeros(1, 1, 3, 3), stride=2, padding=1
        )
        assert tuple(out.shape[-2:]) == expected


def test_pack_and_unpack() -> None:
    levels = random_pyramid(1, 1, [(2, 2), (1, 1)])
    doubled = [2 * x for x in levels]
    for features in (levels, tuple(levels), {"p3": levels[0], "p4": levels[1]}):
        assert unpack(features) == levels
        packed = repack(features, doubled)  # type: ignore[type-var]
        assert type(packed) is type(features)
        assert unpack(packed) == doubled
    with pytest.raises(ValueError, match=r"argument 2 is shorter"):
        repack({"p3": levels[0], "p4": levels[1]}, levels[:1])


@both
@pytest.mark.parametrize("high_offset", ["flat", "crop", "mmdet_main", "aligned"])
@pytest.mark.parametrize("size", [(0, 6), (6, 0), (0, 0)])
def test_levels_without_pixels(module: Any, high_offset: str, size: tuple[int, int]) -> None:
    features = random_pyramid(2, 4, halving_sizes(*size, 3))
    outs = module.pyramid_block(
        features, random_block_parameters(4, 8), high_offset=high_offset, num_groups=2
    )
    assert [x.shape for x in outs] == [(2, 8, *x.shape[-2:]) for x in features]


def test_a_single_image_is_named_as_such() -> None:
    with pytest.raises(ValueError, match=r"\[N, 16, H, W\], got \[16, 4, 4\]; .* x\[None\]"):
        checks.pyramid([torch.zeros(16, 4, 4)], 16, "flat")
    with pytest.raises(ValueError, match=r"got \[1, 8, 4, 4\]; in_channels of the head"):
        checks.pyramid([torch.zeros(1, 8, 4, 4)], 16, "flat")
