"""Fine-tune: a trained detector gets other classes, and only its head learns at first.

python examples/finetune.py
"""

import dataclasses
import logging
import tempfile
from pathlib import Path

import torch

from dyhead_cuda.detection import DigitScenes, ModelConfig, build, read_start

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
logging.basicConfig(format="%(message)s")
torch.manual_seed(0)

# What was trained before, on 80 classes: here a state dict, usually a run such as "runs/atss" or a
# released checkpoint of mmdet or microsoft. `train --start-from` does all of this.
with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "trained.pt"
    torch.save(build(CONFIG).state_dict(), file)
    start = read_start(file)

scenes = DigitScenes("train", num_images=4, size=(SIZE, SIZE))
config = dataclasses.replace(CONFIG, num_classes=len(scenes.classes))
start.check(config)  # an error lists what does not fit
detector = build(config).train()
start.load_into(detector, scenes.classes)  # the log says which classes start anew

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
images, targets = zip(*(scenes[i] for i in range(len(scenes))), strict=True)
for step in range(8):
    losses = detector(list(images), list(targets))
    loss = torch.stack(list(losses.values())).sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.3f}")
