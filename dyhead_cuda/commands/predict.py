"""``python -m dyhead_cuda predict``: the detections on images, drawn and as JSON."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.markup import escape
from torchvision.transforms.functional import to_tensor

from dyhead_cuda.commands import images
from dyhead_cuda.commands.common import check_names, fail, fail_for_memory
from dyhead_cuda.detection.figures import drawing
from dyhead_cuda.detection.files import make_folder, write_json
from dyhead_cuda.detection.prediction import describe, predict
from dyhead_cuda.detection.training import parallel
from dyhead_cuda.detection.training.errors import RunError
from dyhead_cuda.detection.training.trainer import load_model
from dyhead_cuda.detection.tta import TestTimeAugmentation


def run(arguments: argparse.Namespace) -> int:
    """Writes NAME.png and NAME.json for every image NAME.*; unreadable ones are skipped.

    Returns:
        0, or 2 if the checkpoint, the folder, the device or any image cannot be used.
    """
    console = Console(highlight=False, soft_wrap=True)
    status = 0
    try:
        check_names(arguments.images)
        device = parallel.choose_device(arguments.device)
        detector, config = load_model(arguments.checkpoint, device)
        model = TestTimeAugmentation(detector, arguments.scales, arguments.flip).eval()
        make_folder(arguments.out)
        for path in arguments.images:
            try:
                image, name = images.load_photograph(path)
            except images.ImageError as error:
                status = fail(error)
                continue
            pixels = to_tensor(image)
            found = predict(model, pixels, arguments.threshold)
            picture = arguments.out / f"{name}.png"
            drawing.save(drawing.draw(pixels, found, config["classes"]), picture)
            facts = {"file": str(path), "width": image.width, "height": image.height}
            facts |= {"detections": describe(found, config["classes"])}
            write_json(picture.with_suffix(".json"), facts)
            count = len(found["labels"])
            console.print(f"{escape(str(picture))}: {count} object" + "s" * (count != 1))
    except (RunError, ValueError, OSError) as error:
        return fail(error)
    except (MemoryError, RuntimeError) as error:
        return fail_for_memory(error, "shrink the images")
    return status
