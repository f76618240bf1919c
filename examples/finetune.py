"""Fine-tune: a trained detector gets other classes, and only its head learns at first.

python examples/finetune.py
"""

import dataclasses

import torch

from dyhead_cuda.detection import DigitScenes, ModelConfig, build

SIZE = 96
CONFIG = ModelConfig(
    "atss",
    num_classes=80,
    backbone="timm/test_resnet.r160_in1k",  # tiny; the default is "resnet50"
    channels=32,
    blocks=2,
    last_level=5,
    min_size=SIZE,
    max_size=SIZE,
)
torch.manual_seed(0)

# What was trained before, on 80 classes. For a released checkpoint of mmdet or microsoft see
# dyhead_cuda.detection.atss_from_mmdet; for a run of this package, load_model("runs/atss").
trained = build(CONFIG).state_dict()

detector = build(dataclasses.replace(CONFIG, num_classes=10)).train()
own = detector.state_dict()
fitting = {name: x for name, x in trained.items() if x.shape == own[name].shape}
left_out = sorted(set(own) - set(fitting))
detector.load_state_dict(fitting, strict=False)
print("starts anew, as the classes are others:", left_out)

# The backbone rests; the Dynamic Head, which predicts offsets, takes a tenth of the rate.
parameters: dict[str, list[torch.nn.Parameter]] = {"offsets": [], "others": []}
for name, parameter in detector.named_parameters():
    if name.startswith("backbone.body."):
        parameter.requires_grad_(False)
    else:
        parameters["offsets" if "offset_conv" in name else "others"].append(parameter)
optimizer = torch.optim.AdamW(
    [{"params": parameters["offsets"], "lr": 1e-4}, {"params": parameters["others"], "lr": 1e-3}]
)
scenes = DigitScenes("train", num_images=4, size=(SIZE, SIZE))
images, targets = zip(*(scenes[i] for i in range(len(scenes))), strict=True)
for step in range(8):
    losses = detector(list(images), list(targets))
    loss = torch.stack(list(losses.values())).sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.3f}")
