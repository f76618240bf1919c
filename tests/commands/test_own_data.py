"""docs/own_data.md: its commands run, and the folders that it shows are found."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from dyhead_cuda.__main__ import COMMANDS, main
from dyhead_cuda.detection import CocoFolder, DigitScenes, write_coco
from dyhead_cuda.detection.names import SPLITS
from tests.helpers.detection.coco_folders import content, save
from tests.helpers.paths import ROOT

PAGE = (ROOT / "docs" / "own_data.md").read_text()
LINES = [
    shlex.split(line, comments=True)
    for line in re.findall(r"^    python -m dyhead_cuda (.*)$", PAGE, re.M)
]
LAYOUTS = re.findall(r"^\| `my_data/(\S+)` \| `my_data/(\S+)` \|$", PAGE, re.M)
FOR_GPUS = "--weights"  # downloads them, and goes on for hours


def test_the_commands_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for split in SPLITS:
        write_coco(DigitScenes(split, 3, size=(48, 64)), "my_data")
    quick = [line for line in LINES if FOR_GPUS not in line]
    assert [line[0] for line in quick] == ["train", "eval", "predict"]
    for line in quick:
        assert main(line) == 0, line
    assert len(list(Path("predictions").glob("*.json"))) == 3
    written = re.findall(r"`(runs/first/\S+)`", PAGE)
    assert len(written) == 5
    assert all(Path(name).exists() for name in written)


@pytest.mark.parametrize("line", [line for line in LINES if FOR_GPUS in line], ids=" ".join)
def test_the_other_commands_of_the_page_have_options_that_there_are(line: list[str]) -> None:
    parser = argparse.ArgumentParser()
    COMMANDS[line[0]].add_arguments(parser)
    assert parser.parse_args(line[1:])


@pytest.mark.parametrize(("annotations", "images"), LAYOUTS)
def test_the_folders_of_the_page_are_found(annotations: str, images: str, tmp_path: Path) -> None:
    for split in (*SPLITS, "valid", "validation"):
        folder = save(
            tmp_path / split,
            content(),
            annotations.replace("train", split),
            images.replace("train", split),
        )
        assert len(CocoFolder(folder, "train" if split == "train" else "val")) == 3


def test_the_page_has_layouts() -> None:
    assert len(LAYOUTS) == 8
