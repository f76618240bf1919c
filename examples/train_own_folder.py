"""Train a small detector on an own folder of images, and measure it.

A folder has annotations/instances_train.json and instances_val.json in COCO's format, and the
images in train/ and val/. Here such a folder is written first, so that the script runs by itself;
put yours in its place. The second command is the same on the command line.

    python examples/train_own_folder.py
    python -m dyhead_cuda train --model atss --data FOLDER --out runs/mine
"""

import tempfile
from pathlib import Path

import torch

from dyhead_cuda.detection import (
    DataConfig,
    DigitScenes,
    ModelConfig,
    TrainConfig,
    load_model,
    train,
    write_coco,
)

SIZE = 96  # pixels; a real training has 800


def main(folder: Path, runs: Path) -> None:
    data = DataConfig(str(folder), flip=False)
    classes = data.open("train").classes
    model = ModelConfig(
        "atss",
        num_classes=len(classes),
        backbone="timm/test_resnet.r160_in1k",  # tiny; the default is "resnet50"
        channels=32,
        blocks=1,
        last_level=5,
        min_size=SIZE,
        max_size=SIZE,
    )
    config = TrainConfig(steps=4, batch_size=2, lr=1e-3, warmup_steps=1)
    metrics = train(config, model, data, runs)  # the same call resumes a run that was stopped
    print(f"AP {metrics.summary['AP']:.3f} after {config.steps} steps, which teach nothing yet")

    detector, _ = load_model(runs)  # in evaluation mode; images are [3, H, W], RGB in 0..1
    with torch.no_grad():
        (found,) = detector([torch.rand(3, SIZE, SIZE)])
    print("a detector returns", {name: list(x.shape) for name, x in found.items()})


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        own = Path(temporary, "own")
        write_coco(DigitScenes("train", num_images=4, size=(SIZE, SIZE)), own)
        write_coco(DigitScenes("val", num_images=2, size=(SIZE, SIZE)), own)
        main(own, Path(temporary, "run"))
