"""Weights of backbones from files, and what is said where they cannot be downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor
from torchvision import models

from dyhead_cuda.detection import Pyramid
from dyhead_cuda.detection.models import backbone_weights

TIMM = "test_resnet.r160_in1k"


def saved(state: dict[str, Tensor], path: Path) -> str:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state}, path)
    return str(path)


def randomised(network: torch.nn.Module) -> dict[str, Tensor]:
    for buffer in network.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    return dict(network.state_dict())


def pyramid(name: str, weights: str | None, **options: Any) -> Pyramid:
    return Pyramid(name, weights=weights, channels=16, blocks=0, last_level=5, **options).eval()


@torch.no_grad()
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
@pytest.mark.parametrize("classifier", [True, False])
def test_torchvision(suffix: str, classifier: bool, tmp_path: Path) -> None:
    network: Any = models.resnet18(num_classes=7)
    state = randomised(network.eval())
    kept = {k: v for k, v in state.items() if classifier or not k.startswith("fc.")}
    found = pyramid("resnet18", saved(kept, tmp_path / f"weights{suffix}"))
    image = torch.rand(1, 3, 64, 64)
    x = network.maxpool(network.relu(network.bn1(network.conv1(image))))
    for layer, got in zip(
        ("layer1", "layer2", "layer3", "layer4"), ["", *found.body(image).values()], strict=True
    ):
        x = getattr(network, layer)(x)
        if got != "":
            torch.testing.assert_close(got, x)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in found.modules())


@torch.no_grad()
@pytest.mark.parametrize("classifier", [True, False])
def test_timm(classifier: bool, tmp_path: Path) -> None:
    network: Any = timm.create_model(TIMM).eval()
    state = randomised(network)
    kept = {k: v for k, v in state.items() if classifier or not k.startswith("fc.")}
    found = pyramid(f"timm/{TIMM}", saved(kept, tmp_path / "weights.safetensors"))
    image = torch.rand(1, 3, 64, 64)
    (last,) = list(found.body(image).values())[-1:]
    torch.testing.assert_close(last, network.forward_features(image))


def test_swin(tmp_path: Path) -> None:
    state = models.swin_t().state_dict()
    found: Any = pyramid("swin_t", saved(dict(state), tmp_path / "swin.pth"))
    key = "1.0.attn.qkv.weight"
    assert torch.equal(found.body.stages.state_dict()[key], state[f"features.{key}"])


@pytest.mark.parametrize(("name", "file"), [("resnet18", "resnet34"), (f"timm/{TIMM}", "resnet18")])
def test_a_file_of_another_backbone_is_an_error(name: str, file: str, tmp_path: Path) -> None:
    path = saved(models.get_model(file).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(
        ValueError, match=r"whose tensors do not fit: .*; and \d+ more; name the"
    ) as caught:
        pyramid(name, path)
    assert len(str(caught.value)) < 400
    pyramid(name, path, load_weights=False)  # a checkpoint is loaded next


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a file of weights, but .*no.pth is not there"):
        pyramid("resnet18", str(tmp_path / "no.pth"))


def test_offline_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(
        ConnectionError,
        match=r"cannot get the weights DEFAULT of resnet18 \(.*no route.*\); .*"
        r"from https://download.pytorch.org/\S+resnet18\S+\.pth, then .*--weights FILE",
    ) as caught:
        pyramid("resnet18", "DEFAULT")
    assert "\n" not in str(caught.value)


def test_offline_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def fail(*arguments: Any, pretrained: bool = False, **options: Any) -> Any:
        if pretrained:
            raise RuntimeError("cannot\nconnect")
        return create(*arguments, **options)

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(
        ConnectionError,
        match=r"of timm/test_resnet.r160_in1k \(cannot connect\); .* "
        r"https://huggingface.co/timm/test_resnet.r160_in1k, then pass the file: --weights FILE",
    ):
        pyramid(f"timm/{TIMM}", "pretrained")


def test_memory_is_not_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(models, "get_model", fail)
    with pytest.raises(torch.OutOfMemoryError):
        backbone_weights.torchvision_network("resnet18", "DEFAULT")
