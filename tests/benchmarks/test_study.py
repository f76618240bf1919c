"""The study of what the head is worth: what it compares, and its files and tables."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.readme import STUDY, replace_section
from benchmarks.study import plots, report, results
from benchmarks.study.costs import costs
from benchmarks.study.measures import positives
from benchmarks.study.setup import QUICK, Setup, fingerprint
from benchmarks.study.variants import SEEDS, TABLES, VARIANTS, chosen
from dyhead_cuda.detection.data import DataConfig, DigitScenes
from dyhead_cuda.detection.models.atss import ATSS
from dyhead_cuda.detection.models.config import build, count_parameters
from dyhead_cuda.detection.statistics import positives_per_level
from dyhead_cuda.detection.training.config import TrainConfig
from tests.helpers.paths import ROOT
from tests.helpers.study import record, write_costs, write_runs, write_searches

COMMITTED = ROOT / "benchmarks" / "results" / "study"


def rows_of(text: str, label: str) -> list[str]:
    """The rows of a report's tables that start with a label."""
    return [line for line in text.splitlines() if line.startswith(f"| {label} |")]


def test_variants_differ_in_what_their_table_is_about() -> None:
    assert {name for table in TABLES.values() for name in table.variants} == set(VARIANTS)
    heads = list(VARIANTS.values())
    assert len({json.dumps(variant.settings()) for variant in heads}) == len(heads)
    assert len({variant.label for variant in heads}) == len(heads)
    for name in ("attentions", "high_offset"):
        assert len({VARIANTS[v].blocks for v in TABLES[name].variants}) == 1
    assert len({VARIANTS[v].high_offset for v in TABLES["high_offset"].variants}) == 4
    assert not any("task" in VARIANTS[v].attentions for v in ("none", "scale", "spatial"))
    assert VARIANTS["none"].without_task == "relu", "else the head would be linear"
    assert chosen(["task", "plain"]) == ["plain", "task"]
    assert chosen([]) == list(VARIANTS)


def test_detectors_differ_only_in_the_head() -> None:
    plain, head = (build(QUICK.model(VARIANTS[name])) for name in ("plain", "dyhead-2"))
    ours, theirs = ({n for n, _ in m.named_parameters()} for m in (head, plain))
    assert {name.partition(".blocks")[0] for name in ours - theirs} == {"backbone.dyhead"}
    assert {name.split("_tower")[0] for name in theirs - ours} == {"head.cls", "head.box"}
    none = build(QUICK.model(VARIANTS["none"]))
    assert count_parameters(none) < count_parameters(head)


@pytest.mark.parametrize("setup", [Setup(), QUICK], ids=["whole", "quick"])
def test_settings_are_plain_data_that_the_detector_data_and_training_take(setup: Setup) -> None:
    assert Setup.from_dict(json.loads(json.dumps(setup.to_dict()))) == setup
    trial = setup.run("plain", 1, 0.5)
    settings = setup.settings(trial)
    assert json.loads(json.dumps(settings)) == settings
    made = {
        "model": setup.model(VARIANTS["plain"]).to_dict(),
        "data": setup.data().to_dict(),
        "training": setup.training(trial, "cpu").to_dict(),
    }
    assert (made["training"]["seed"], made["training"]["lr"]) == (1, 0.5)
    for section, values in settings.items():
        assert values == {name: made[section][name] for name in values}
    for kind in (TrainConfig, DataConfig):
        section = "training" if kind is TrainConfig else "data"
        assert kind.from_dict(made[section]).to_dict() == made[section]


def test_a_fingerprint_tells_settings_apart() -> None:
    settings = [
        setup.settings(setup.run(name, seed, lr))
        for setup in (QUICK, replace(QUICK, images=9), replace(QUICK, body_lr=1.0))
        for name in ("plain", "dyhead-2", "none")
        for seed in (0, 1)
        for lr in (0.1, 0.2)
    ]
    assert len({fingerprint(each) for each in settings}) == len(settings)
    more = replace(QUICK, search_steps=7, rates=(0.1, 0.2))
    run = QUICK.run("plain", 0, 0.1)
    assert fingerprint(more.settings(run)) == fingerprint(QUICK.settings(run)), "not of the runs"


def test_mean_spread_and_differences(tmp_path: Path) -> None:
    names = ["plain", "dyhead-1-local"]
    write_runs(tmp_path, QUICK, names)
    study = results.read(tmp_path, QUICK)
    assert results.values(study, "dyhead-1-local") == pytest.approx({0: 0.33, 1: 0.32, 2: 0.31})
    assert results.mean_and_spread([1.0, 2.0, 4.5]) == pytest.approx((2.5, 1.802775638))
    # By seed: 0.33 - 0.29, 0.32 - 0.30, 0.31 - 0.31.
    assert results.difference(study, "dyhead-1-local", "plain") == pytest.approx((0.02, 0.02))
    (tmp_path / "runs" / "plain-seed-1.json").unlink()
    study = results.read(tmp_path, QUICK)
    assert results.difference(study, "dyhead-1-local", "plain")[0] == pytest.approx(0.02)
    assert math.isnan(results.mean_and_spread([1.0])[1])
    assert math.isnan(results.mean_and_spread([])[0])
    assert all(math.isnan(value) for value in results.values(study, "plain", "APl").values())
    assert results.values(study, "plain", "class accuracy")[0] == pytest.approx(0.5)


def test_the_rate_of_a_row_is_the_best_that_was_tried(tmp_path: Path) -> None:
    write_searches(tmp_path, QUICK, ["plain", "dyhead-2"])
    assert results.read(tmp_path, QUICK).rates["plain"] == QUICK.rates[1]
    best = next(t for t in QUICK.search(["plain"]) if t.lr == QUICK.rates[1])
    failed = {**record(QUICK, best, 0.2), "failed": "the loss is nan"}
    del failed["summary"]
    results.write(tmp_path, f"{best.path}.json", failed)
    study = results.read(tmp_path, QUICK)
    assert study.rates["plain"] == QUICK.rates[0], "of equals the lowest"
    text = report.section(study, tmp_path, tmp_path, SEEDS)
    assert rows_of(text, VARIANTS["plain"].label)[-2].split(" | ")[1:] == [
        "10.0", "failed", "10.0", f"{QUICK.rates[0]:g} |"
    ]  # fmt: skip
    (tmp_path / f"{best.path}.json").unlink()
    assert results.read(tmp_path, QUICK).rates["plain"] is None


def test_results_of_another_setup_are_ignored(tmp_path: Path) -> None:
    names = ["plain", "dyhead-2"]
    write_runs(tmp_path, QUICK, names)
    write_costs(tmp_path, QUICK, names)
    assert results.read(tmp_path, QUICK).ignored == []
    other = replace(QUICK, images=9)
    study = results.read(tmp_path, other)
    assert len(study.ignored) == 2 * (3 + SEEDS), "costs do not depend on the images"
    assert study.rates["plain"] is None
    assert not any(study.runs.values())
    text = report.section(study, tmp_path, tmp_path, SEEDS)
    assert f"of another setup: 12 results (search/dyhead-2-lr-{QUICK.rates[0]:g}.json, " in text
    # The search has a new winner, so the runs are of another learning rate.
    best = next(t for t in QUICK.search(["plain"]) if t.lr == QUICK.rates[0])
    results.write(tmp_path, f"{best.path}.json", record(QUICK, best, 0.9))
    study = results.read(tmp_path, QUICK)
    assert study.ignored == [f"runs/plain-seed-{seed}.json" for seed in range(SEEDS)]
    assert len(results.read(tmp_path, replace(QUICK, channels=32)).costs) == 0


def test_tables(tmp_path: Path) -> None:
    folder, names = tmp_path / "results", ["plain", "dyhead-1-local"]
    write_runs(folder, QUICK, names)
    write_costs(folder, QUICK, names)
    study = results.read(folder, QUICK)
    plots.draw_all(study, folder)
    text = report.section(study, folder, tmp_path, SEEDS)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    shown = sum(2 + len(table.variants) for table in TABLES.values())
    assert len(rows) == shown + 2 * (2 + len(VARIANTS))
    label = VARIANTS["dyhead-1-local"].label
    heads, inits, search, cost = rows_of(text, label)
    assert heads.startswith(f"| {label} | 3 | 32.0 ± 1.0 | +2.0 ± 2.0 | 32.0 ± 1.0 |")
    assert heads.endswith("| 16.0 ± 0.5 | - | 64.0 ± 2.0 | 50.0 ± 0.0 |")
    assert inits == heads
    assert search == f"| {label} | 10.0 | 20.0 | 10.0 | {QUICK.rates[1]:g} |"
    assert cost == f"| {label} | 1.00 | 2.00 M | 102 ms | 42 ms |"
    assert set(rows_of(text, "spatial")[0]) == set("| spatial | - |"), "no runs yet"
    assert f"6 of {SEEDS * len(VARIANTS)} are here" in text
    assert "Runs are being added" in text
    assert "12 on a processor, 2 threads. Commits: 0123456789ab." in text
    assert "on another, 4 threads, torch 2.9" in text
    assert "30 on P3, 10 on P4" in text
    assert "nan" not in text
    for name in plots.PLOTS:
        assert f"(results/{name}.png)" in text


def test_all_runs_are_here_at_the_end(tmp_path: Path) -> None:
    write_runs(tmp_path, QUICK, list(VARIANTS), seeds=1)
    text = report.section(results.read(tmp_path, QUICK), tmp_path, tmp_path, 1)
    assert text.startswith(f"All {len(VARIANTS)} runs are here")
    assert "±" not in "".join(line for line in text.splitlines() if line.startswith("|"))


def test_nothing_is_drawn_of_nothing(tmp_path: Path) -> None:
    study = results.read(tmp_path, QUICK)
    assert plots.draw_all(study, tmp_path) == []
    text = report.section(study, tmp_path, tmp_path, SEEDS)
    assert f"0 of {SEEDS * len(VARIANTS)} are here" in text
    assert ".png" not in text


def test_costs_of_heads() -> None:
    found = costs(QUICK, ["shared-4", "plain"], torch.device("cpu"), rounds=1)
    for cost in ("parameters", "gflops", "step_ms", "prediction_ms"):
        assert found["plain"][cost] > 0
    assert found["plain"]["gflops"] > found["shared-4"]["gflops"]
    assert found["plain"]["setup"] != found["shared-4"]["setup"]


def test_the_class_of_positives() -> None:
    scenes = QUICK.data().open("val")
    assert isinstance(scenes, DigitScenes)
    model = build(QUICK.model(VARIANTS["plain"])).eval()
    assert isinstance(model, ATSS)
    found = positives(model, scenes, 3, "cpu")
    anchors = {name: level["anchors"] for name, level in found.items()}
    assert anchors == positives_per_level(model, scenes)
    total = sum(anchors.values())
    objects = [int(label) for i in range(len(scenes)) for label in scenes[i][1]["labels"]]
    assert total >= len(objects) > 0
    # Whoever always says one class is right at that class's anchors, and these are all of them.
    right = 0
    for kind in range(10):
        with torch.no_grad():
            model.head.classes.weight.zero_()
            model.head.classes.bias = nn.Parameter((torch.arange(10) == kind).float())
        ours = positives(model, scenes, 3, "cpu")
        here = sum(level["right"] for level in ours.values())
        assert (here > 0) == (kind + 1 in objects)
        right += here
    assert right == total


def test_the_docs_show_the_committed_results(tmp_path: Path) -> None:
    path = ROOT / "docs" / "study.md"
    text = path.read_text()
    new = report.section(results.read(COMMITTED, Setup()), COMMITTED, path.parent, SEEDS)
    assert replace_section(text, STUDY, new) == text, (
        "run python -m benchmarks study --report --write docs/study.md"
    )


def test_files_of_something_else_are_refused(tmp_path: Path) -> None:
    write_runs(tmp_path, QUICK, ["plain"])
    shutil.copy(tmp_path / "runs" / "plain-seed-0.json", tmp_path / "runs" / "x.json")
    (tmp_path / "runs" / "x.json").write_text('{"schema": 7}')
    with pytest.raises(ValueError, match=r"expected results of a study of schema 3 in .*x\.json"):
        results.read(tmp_path, QUICK)
