"""COCO metrics against cases worked out by hand and an independent average precision."""

from __future__ import annotations

import dataclasses
import datetime
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from torchvision.ops import box_iou

from dyhead_cuda.detection.data import DigitScenes
from dyhead_cuda.detection.evaluation import KEYPOINT_SUMMARY, Metrics, evaluate, score

Output = dict[str, Tensor]


class Boxes(Dataset[tuple[Tensor, Output]]):
    """Images (of different sizes, their index as their value) with given boxes and labels."""

    classes = ("cat", "dog", "owl")
    category_ids = (3, 7, 44)
    num_keypoints = 0

    def __init__(self, objects: list[list[tuple[list[float], int]]]) -> None:
        self.objects = objects
        annotations: list[dict[str, Any]] = []
        for index, listed in enumerate(objects):
            for (left, top, right, bottom), label in listed:
                size = [right - left, bottom - top]
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": 100 + index,
                        "category_id": self.category_ids[label - 1],
                        "bbox": [left, top, *size],
                        "area": size[0] * size[1],
                        "iscrowd": 0,
                    }
                )
        self.coco: dict[str, Any] = {
            "images": [{"id": 100 + index} for index in range(len(objects))],
            "annotations": annotations,
            "categories": [
                {"id": number, "name": name}
                for number, name in zip(self.category_ids, self.classes, strict=True)
            ],
        }

    def __len__(self) -> int:
        return len(self.objects)

    def __getitem__(self, index: int) -> tuple[Tensor, Output]:
        listed = self.objects[index]
        target = {
            "boxes": torch.tensor([box for box, _ in listed], dtype=torch.float32).view(-1, 4),
            "labels": torch.tensor([label for _, label in listed], dtype=torch.int64),
            "image_id": torch.tensor(100 + index),
        }
        return torch.full((3, 32 + index, 40), index / 255), target


class Oracle(nn.Module):
    """A "detector" that returns what it is told for the image whose value is its index."""

    def __init__(self, outputs: list[Output]) -> None:
        super().__init__()
        self.outputs = outputs
        self.norm = nn.BatchNorm1d(1)  # a buffer, and a part with a training mode of its own
        self.batches: list[int] = []

    def forward(self, images: list[Tensor]) -> list[Output]:
        assert not self.training
        assert torch.is_inference_mode_enabled()
        self.batches.append(len(images))
        return [self.outputs[round(255 * float(image[0, 0, 0]))] for image in images]


class InOrder(nn.Module):
    """A "detector" that returns what it is told, image after image."""

    def __init__(self, outputs: list[Output]) -> None:
        super().__init__()
        self.outputs = iter(outputs)

    def forward(self, images: list[Tensor]) -> list[Output]:
        return [next(self.outputs) for _ in images]


def output(boxes: list[list[float]], labels: list[int], scores: list[float]) -> Output:
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "scores": torch.tensor(scores, dtype=torch.float32),
    }


def truth_as_output(dataset: Any, index: int, shift: float = 0, turn: int = 0) -> Output:
    """The objects themselves, moved to the right, with classes moved on."""
    target = dataset[index][1]
    labels = (target["labels"] - 1 + turn) % len(dataset.classes) + 1
    moved = target["boxes"] + torch.tensor([shift, 0, shift, 0])
    found = {"boxes": moved, "labels": labels, "scores": torch.linspace(0.9, 0.5, len(labels))}
    if "keypoints" in target:
        found["keypoints"] = target["keypoints"] + torch.tensor([shift, 0, 0])
    return found


def run(dataset: Any, outputs: list[Output], **options: Any) -> Metrics:
    return evaluate(Oracle(outputs), dataset, device="cpu", batch_size=2, **options)


@pytest.fixture
def animals() -> Boxes:
    return Boxes(
        [
            [([2, 2, 12, 22], 1), ([20, 5, 30, 15], 2)],
            [([0, 0, 20, 10], 1)],
            [],
            [([5, 5, 25, 25], 2), ([26, 1, 36, 21], 2), ([1, 26, 11, 31], 1)],
            [([3, 3, 33, 23], 1)],
        ]
    )


def test_perfect_detections_have_an_ap_of_one(animals: Boxes) -> None:
    metrics = run(animals, [truth_as_output(animals, index) for index in range(5)])
    for name in ("AP", "AP50", "AP75", "APs", "AR100"):
        assert metrics.summary[name] == pytest.approx(1)
    assert metrics.summary["AR1"] == pytest.approx((1 + 2 / 3) / 2)  # all cats, two of three dogs
    assert math.isnan(metrics.summary["APm"])
    assert math.isnan(metrics.summary["APl"])
    assert metrics.per_class["cat"] == pytest.approx(1)
    assert metrics.per_class["dog"] == pytest.approx(1)
    assert math.isnan(metrics.per_class["owl"])
    assert metrics.keypoints is None
    first = metrics.detections[0]
    assert first["image_id"] == 100
    assert first["category_id"] == 3
    assert first["bbox"] == [2, 2, 10, 20]
    assert first["score"] == pytest.approx(0.9)
    assert set(first) == {"image_id", "category_id", "bbox", "score"}


def test_the_iou_of_shifted_boxes_decides() -> None:
    # Moved by 2 of 20 pixels: IoU 18 / 22 = 0.818, enough for 7 of the 10 thresholds 0.5 to 0.95.
    dataset = Boxes([[([10, 10, 30, 30], 1)], [([5, 5, 25, 20], 3)]])
    metrics = run(dataset, [truth_as_output(dataset, index, shift=2) for index in range(2)])
    assert metrics.summary["AP"] == pytest.approx(0.7)
    assert metrics.summary["AP50"] == metrics.summary["AP75"] == pytest.approx(1)
    assert metrics.summary["AR100"] == pytest.approx(0.7)
    expected = {"cat": 0.7, "dog": math.nan, "owl": 0.7}
    assert metrics.per_class == pytest.approx(expected, nan_ok=True)


def test_the_wrong_class_counts_nothing(animals: Boxes) -> None:
    metrics = run(animals, [truth_as_output(animals, index, turn=2) for index in range(5)])
    assert metrics.summary["AP"] == metrics.summary["AR100"] == 0


def test_the_wrong_class_counts_where_classes_do_not(animals: Boxes) -> None:
    wrong = run(animals, [truth_as_output(animals, index, turn=2) for index in range(5)])
    metrics = score(animals, wrong.detections, class_agnostic=True)
    assert metrics.summary["AP"] == pytest.approx(1)
    assert metrics.per_class == {}
    twice = [each | {"category_id": 3} for each in wrong.detections] + wrong.detections
    assert score(animals, twice, class_agnostic=True).summary["AP"] < 1, "one box too many"


def test_sizes_of_objects() -> None:
    dataset = Boxes([[([0, 0, 100, 100], 1), ([0, 0, 40, 40], 2)]])
    outputs = [truth_as_output(dataset, 0)]
    outputs[0]["boxes"][1] += 200
    metrics = run(dataset, outputs)
    assert metrics.summary["APl"] == pytest.approx(1)
    assert metrics.summary["APm"] == 0
    assert math.isnan(metrics.summary["APs"])
    assert metrics.per_class == pytest.approx({"cat": 1, "dog": 0, "owl": math.nan}, nan_ok=True)


def test_a_confident_mistake_halves_the_precision() -> None:
    dataset = Boxes([[([0, 0, 10, 10], 2)]])
    found = output([[20, 20, 30, 30], [0, 0, 10, 10]], [2, 2], [0.9, 0.8])
    assert run(dataset, [found]).summary["AP"] == pytest.approx(0.5)
    found["scores"] = torch.tensor([0.7, 0.8])
    assert run(dataset, [found]).summary["AP"] == pytest.approx(1)


def independent_ap50(dataset: Boxes, detections: list[Output], label: int) -> float:
    """Greedy matching by score at IoU 0.5, precision interpolated at 101 recalls."""
    rows = []
    objects = 0
    for index, found in enumerate(detections):
        target = dataset[index][1]
        boxes = target["boxes"][target["labels"] == label]
        objects += len(boxes)
        free = torch.ones(len(boxes), dtype=torch.bool)
        mine = (found["labels"] == label).nonzero().flatten()
        for place in mine[found["scores"][mine].argsort(descending=True)]:
            overlap = box_iou(found["boxes"][place, None], boxes)[0] * free
            hit = bool(len(boxes)) and float(overlap.max()) >= 0.5
            if hit:
                free[int(overlap.argmax())] = False
            rows.append((float(found["scores"][place]), hit))
    rows.sort(reverse=True)
    hits = np.cumsum([hit for _, hit in rows])
    recall = hits / objects
    precision = hits / np.arange(1, len(rows) + 1)
    levels = np.linspace(0, 1, 101)
    best = [precision[recall >= level].max(initial=0) for level in levels]
    return float(np.mean(best))


def test_ap50_equals_an_independent_one() -> None:
    generator = torch.Generator().manual_seed(3)

    def random_boxes(number: int) -> Tensor:
        corner = torch.randint(0, 60, (number, 2), generator=generator)
        size = torch.randint(8, 30, (number, 2), generator=generator)
        return torch.cat((corner, corner + size), dim=1).float()

    objects: list[list[tuple[list[float], int]]] = []
    outputs: list[Output] = []
    for _ in range(12):
        boxes = random_boxes(4)
        labels = torch.randint(1, 3, (4,), generator=generator)
        objects.append(list(zip(boxes.tolist(), labels.tolist(), strict=True)))
        jitter = torch.randint(-6, 7, (4, 4), generator=generator)
        found = torch.cat((boxes + jitter, random_boxes(3)))
        found[:, 2:] = torch.maximum(found[:, 2:], found[:, :2] + 1)
        others = torch.randint(1, 3, (3,), generator=generator)
        outputs.append(
            {
                "boxes": found,
                "labels": torch.cat((labels, others)),
                "scores": torch.rand(7, generator=generator),
            }
        )
    dataset = Boxes(objects)
    expected = [independent_ap50(dataset, outputs, label) for label in (1, 2)]
    assert all(0.1 < value < 0.9 for value in expected)
    assert run(dataset, outputs).summary["AP50"] == pytest.approx(np.mean(expected), abs=1e-6)


def test_no_detections_and_no_objects(animals: Boxes) -> None:
    nothing = [output([], [], []) for _ in range(5)]
    blind = run(animals, nothing)
    assert blind.summary["AP"] == blind.per_class["cat"] == 0
    assert blind.detections == []
    empty = Boxes([[], []])
    seeing_things = output([[0, 0, 9, 9]], [1], [0.5])
    for outputs in (nothing, [seeing_things, seeing_things]):
        metrics = run(empty, outputs)
        assert all(math.isnan(value) for value in metrics.summary.values())
        assert all(math.isnan(value) for value in metrics.per_class.values())


def test_crowds_are_neither_missed_nor_mistakes() -> None:
    dataset = Boxes([[([0, 0, 30, 30], 1), ([32, 2, 38, 12], 1)]])
    dataset.coco["annotations"][0]["iscrowd"] = 1
    found = output([[5, 5, 15, 15], [32, 2, 38, 12]], [1, 1], [0.9, 0.8])
    assert run(dataset, [found]).summary["AP"] == pytest.approx(1)
    dataset.coco["annotations"][0]["iscrowd"] = 0
    assert run(dataset, [found]).summary["AP"] == pytest.approx(0.25, abs=0.01)


def test_the_model_and_the_random_state_are_as_before(animals: Boxes, capsys: Any) -> None:
    model = Oracle([truth_as_output(animals, index) for index in range(5)])
    model.norm.eval()
    truth = [dict(each) for each in animals.coco["annotations"]]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    seen: list[tuple[int, int]] = []
    evaluate(model, animals, device="cpu", batch_size=2, progress=lambda *done: seen.append(done))
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert not model.norm.training
    assert model.batches == [2, 2, 1]
    assert seen == [(2, 5), (4, 5), (5, 5)]
    assert animals.coco["annotations"] == truth
    assert capsys.readouterr().out == ""


def test_the_model_is_as_before_after_an_error(animals: Boxes) -> None:
    model = Oracle([output([[0, 0, 5, 5]], [4], [0.5])] * 5)
    with pytest.raises(ValueError, match=r"expected labels of 1 to 3 .*, got 4 to 4"):
        evaluate(model, animals, device="cpu", batch_size=5)
    assert model.training
    model = Oracle([output([[0, 0, 5, 5]], [0], [0.5])] * 5)
    with pytest.raises(ValueError, match="got 0 to 0"):
        evaluate(model, animals, device="cpu", batch_size=5)


def test_detections_that_are_not_finite_are_left_out(
    animals: Boxes, caplog: pytest.LogCaptureFixture
) -> None:
    outputs = [truth_as_output(animals, index) for index in range(5)]
    whole = run(animals, outputs).summary
    boxes = torch.cat((outputs[1]["boxes"], torch.tensor([[0, 0, math.nan, 5]])))
    outputs[1] = output(boxes.tolist(), [1, 1], [0.9, 0.99])
    outputs[4] = output([[3, 3, 33, 23], [3, 3, 33, 23]], [1, 1], [0.8, math.nan])
    assert run(animals, outputs).summary == pytest.approx(whole, nan_ok=True)
    assert "image 101: left out 1 detections that are not finite" in caplog.text


def test_keypoints_by_object_keypoint_similarity() -> None:
    dataset = DigitScenes(
        "val", 4, size=(160, 160), keypoints=True, heights=(40, 60), glyphs=(1, 3)
    )

    def found(shift: float, **options: Any) -> dict[str, float]:
        model = InOrder([truth_as_output(dataset, index, shift) for index in range(4)])
        metrics = evaluate(model, dataset, device="cpu", batch_size=3, **options)
        assert metrics.keypoints is not None
        return metrics.keypoints

    perfect = found(0)
    assert tuple(perfect) == KEYPOINT_SUMMARY
    assert perfect["AP"] == pytest.approx(1)
    # Moved by d in x: OKS is exp(-d^2 / (2 area (2 sigma)^2)) for each keypoint, so for each digit.
    shift, sigma = 5.0, 0.06
    targets = [dataset[index][1] for index in range(4)]
    areas = torch.cat([target["area"] for target in targets])
    labels = torch.cat([target["labels"] for target in targets])
    similarity = torch.exp(-(shift**2) / (2 * areas * (2 * sigma) ** 2))
    assert similarity.min() < 0.6 < 0.7 < similarity.max()
    reached = similarity[:, None] >= torch.linspace(0.5, 0.95, 10)
    recalls = [reached[labels == label].double().mean() for label in labels.unique()]
    moved = found(shift, keypoint_sigmas=[sigma] * 4)
    assert moved["AR"] == pytest.approx(float(torch.stack(recalls).mean()), abs=1e-6)
    with pytest.raises(ValueError, match="expected 4 keypoint_sigmas above 0, got"):
        found(0, keypoint_sigmas=[0.1])


def test_scoring_detections_again_gives_the_same(animals: Boxes) -> None:
    metrics = run(animals, [truth_as_output(animals, index, shift=1) for index in range(5)])
    again = score(animals, metrics.detections)
    assert again.summary == pytest.approx(metrics.summary, nan_ok=True)
    assert 0 < again.summary["AP"] < 1


def five_images() -> tuple[Boxes, list[Output]]:
    dataset = Boxes([[([index, index, 20 + index, 20], 1 + index % 2)] for index in range(5)])
    return dataset, [truth_as_output(dataset, index, shift=index) for index in range(5)]


def evaluate_on_rank(rank: int, folder: str) -> None:
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        dataset, outputs = five_images()
        model = Oracle(outputs)
        # Three batches on rank 0 and two on rank 1: DDP's own forward would never end.
        metrics = evaluate(DistributedDataParallel(model), dataset, device="cpu", batch_size=1)
        torch.save((dataclasses.asdict(metrics), model.batches), f"{folder}/{rank}.pt")
    finally:
        distributed.destroy_process_group()


def evaluate_on_second_rank(_: int, folder: str) -> None:
    evaluate_on_rank(1, folder)


def test_two_processes_score_as_one(tmp_path: Path) -> None:
    other = multiprocessing.spawn(evaluate_on_second_rank, (str(tmp_path),), join=False)
    evaluate_on_rank(0, str(tmp_path))
    while not other.join():
        pass
    (first, first_batches), (second, second_batches) = (
        torch.load(tmp_path / f"{rank}.pt") for rank in range(2)
    )
    assert (first_batches, second_batches) == ([1, 1, 1], [1, 1])
    alone = run(*five_images())
    for metrics in (first, second):
        assert metrics["summary"] == pytest.approx(alone.summary, nan_ok=True)
        assert metrics["per_class"] == pytest.approx(alone.per_class, nan_ok=True)
        images = [detection["image_id"] for detection in metrics["detections"]]
        assert sorted(images) == [100, 101, 102, 103, 104]
    assert 0 < alone.summary["AP"] < 1
