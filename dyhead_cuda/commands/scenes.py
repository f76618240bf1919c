"""``python -m dyhead_cuda scenes``: composed scenes as files, with COCO annotations."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from dyhead_cuda.commands import train_settings
from dyhead_cuda.commands.common import fail
from dyhead_cuda.detection.data import ComposedScenes, write_coco
from dyhead_cuda.detection.data.coco_layout import find_json


def run(arguments: argparse.Namespace) -> int:
    """Writes the splits; ``train --data FOLDER`` reads what it leaves.

    Returns:
        0, or 2 if the options, the objects or the folder cannot be used.
    """
    console = Console(highlight=False, soft_wrap=True)
    try:
        config = train_settings.scenes_config(arguments, seed=arguments.seed)
        sets = []
        for split in dict.fromkeys(arguments.split):
            _check_free(arguments.out, split)
            scenes = config.open(split)
            assert isinstance(scenes, ComposedScenes)
            sets.append(scenes)
        for scenes in sets:
            path = write_coco(scenes, arguments.out)
            facts = f"{len(scenes)} images, {len(scenes.coco['annotations'])} objects"
            console.print(escape(f"{path}: {facts} of {len(scenes.classes)} classes"))
    except (ValueError, OSError, ImportError) as error:
        return fail(error)
    return 0


def _check_free(folder: Path, split: str) -> None:
    """Raise ValueError if something would be overwritten, or shadowed by what is written."""
    try:
        found = find_json(folder, split)
    except ValueError:
        found = folder / split
    if found.exists():
        raise ValueError(
            f'expected a folder without images or annotations of split "{split}", but there is '
            f"{found}; choose another --out"
        )
