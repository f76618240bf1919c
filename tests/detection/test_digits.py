"""The composed digits: deterministic, without leaks, with tight boxes and readable ink."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from dyhead_cuda.detection.data import DigitScenes
from dyhead_cuda.detection.data.digits import _scans

SMALL: dict[str, Any] = {"num_images": 12, "size": (64, 96), "heights": (10, 40)}


def pixels(dataset: DigitScenes, order: list[int]) -> dict[int, NDArray[np.uint8]]:
    return {index: dataset.scene(index).image for index in order}


@pytest.mark.parametrize("cache", [False, True])
def test_a_scene_depends_on_its_index_alone(cache: bool) -> None:
    forward = DigitScenes("train", **SMALL, cache=cache)
    backward = DigitScenes("train", **{**SMALL, "num_images": 40})
    there = pixels(forward, list(range(12)))
    back = pixels(backward, list(range(11, -1, -1)))
    for index in range(12):
        np.testing.assert_array_equal(there[index], back[index])
        again, target = forward[index]
        other, other_target = backward[index]
        assert torch.equal(again, other)
        assert all(torch.equal(target[key], other_target[key]) for key in target)
    assert len({image.tobytes() for image in there.values()}) == 12


def test_another_process_draws_the_same() -> None:
    code = (
        "import hashlib\nfrom dyhead_cuda.detection.data import DigitScenes\n"
        "d = DigitScenes('val', 3, size=(64, 64))\n"
        "print(hashlib.sha256(b''.join(d.scene(i).image.tobytes() for i in (2, 0))).hexdigest())"
    )
    run = [sys.executable, "-c", code]
    first = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    import hashlib

    here = DigitScenes("val", 3, size=(64, 64))
    joined = here.scene(2).image.tobytes() + here.scene(0).image.tobytes()
    assert first.strip() == hashlib.sha256(joined).hexdigest()


def test_split_and_seed_change_the_scene() -> None:
    images = {
        DigitScenes(split, **SMALL, seed=seed).scene(0).image.tobytes()
        for split in ("train", "val")
        for seed in (0, 1)
    }
    assert len(images) == 4


def test_no_scan_is_in_both_splits() -> None:
    everything = load_digits()
    seen = {split: [len(scans) for scans in _scans(split)] for split in ("train", "val")}
    for number in range(10):
        assert seen["train"][number] + seen["val"][number] == (everything.target == number).sum()
        assert seen["val"][number] >= 40
        train = {scan.tobytes() for scan in _scans("train")[number]}
        assert train.isdisjoint(scan.tobytes() for scan in _scans("val")[number])
