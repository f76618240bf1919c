"""The study of what the head is worth: what it compares, how it runs, and its tables."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import main
from benchmarks.readme import STUDY, markers, replace_section
from benchmarks.study import plots, report, results
from benchmarks.study.setup import QUICK, Setup
from benchmarks.study.variants import TABLES, VARIANTS, variants_of
from dyhead_cuda.detection.data import DataConfig
from dyhead_cuda.detection.models.config import build, count_parameters
from dyhead_cuda.detection.training.config import TrainConfig
from tests.helpers.paths import ROOT

COMMITTED = ROOT / "benchmarks" / "results" / "study" / "study.json"

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100")


def study(tables: list[str], seeds: int = 3) -> dict[str, Any]:
    """A study whose numbers tell variants and seeds apart."""
    variants = {}
    for index, name in enumerate(variants_of(tables)):
        runs = []
        for seed in reversed(range(seeds)):
            ap = 0.30 + 0.02 * index + 0.01 * (seed - 1) * (-1) ** index
            summary = dict.fromkeys(METRICS, ap) | {"APl": None}
            curve = [[10, ap / 2], [20, ap]]
            runs.append({"seed": seed, "summary": summary, "per_class": {"0": ap}, "curve": curve})
        variants[name] = {
            "label": VARIANTS[name].label,
            "parameters": 1_000_000 * (index + 1),
            "gflops": 0.5 * (index + 1),
            "step_ms": 100.0 + index,
            "prediction_ms": 40.0 + index,
            "runs": runs,
        }
    environment = {
        "command": "python -m benchmarks study",
        "date": "2026-01-02T03:04:05+00:00",
        "commit": "0123456789ab",
        "device": "cpu",
        "processor": "a processor",
        "threads": 2,
        "versions": {"torch": "2.11.0"},
    }
    setup = Setup().to_dict()
    return {"environment": environment, "setup": setup, "tables": tables, "variants": variants}


def test_variants_differ_in_what_their_table_is_about() -> None:
    assert {name for table in TABLES.values() for name in table.variants} == set(VARIANTS)
    heads = [VARIANTS[name] for name in VARIANTS]
    assert len({(v.blocks, v.attentions, v.high_offset) for v in heads}) == len(heads)
    assert len({v.label for v in heads}) == len(heads)
    assert {VARIANTS[name].blocks for name in TABLES["depth"].variants} == {0, 1, 2, 4, 6}
    for name in ("attentions", "high_offset"):
        assert len({VARIANTS[v].blocks for v in TABLES[name].variants}) == 1
    assert len({VARIANTS[v].high_offset for v in TABLES["high_offset"].variants}) == 4


def test_detectors_of_the_plan_differ_only_in_the_head() -> None:
    setup = Setup(channels=16)
    plain, head = (build(setup.model(VARIANTS[name])) for name in ("plain", "dyhead-2"))
    ours, theirs = ({n for n, _ in m.named_parameters()} for m in (head, plain))
    assert {name.partition(".blocks")[0] for name in ours - theirs} == {"backbone.dyhead"}
    assert {name.split("_tower")[0] for name in theirs - ours} == {"head.cls", "head.box"}
    none = build(setup.model(VARIANTS["none"]))
    assert count_parameters(none) < count_parameters(head)


def test_settings_are_plain_data() -> None:
    setup = Setup()
    assert Setup(**json.loads(json.dumps(setup.to_dict()))) == setup
    for kind, made in ((TrainConfig, setup.training(1, "cpu")), (DataConfig, setup.data())):
        assert kind.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    assert setup.training(1, "cpu").seed == 1


def test_mean_spread_and_differences() -> None:
    found = study(["depth"])
    assert results.values(found, "dyhead-1") == pytest.approx([0.33, 0.32, 0.31])
    assert results.mean_and_spread([1.0, 2.0, 4.5]) == pytest.approx((2.5, 1.802775638))
    # By seed: 0.33 - 0.29, 0.32 - 0.30, 0.31 - 0.31.
    assert results.difference(found, "dyhead-1", "plain") == pytest.approx((0.02, 0.02))
    assert math.isnan(results.mean_and_spread([1.0])[1])
    assert all(math.isnan(value) for value in results.values(found, "plain", "APl"))


def test_tables(tmp_path: Path) -> None:
    found, path = study(list(TABLES)), tmp_path / "results" / "study.json"
    path.parent.mkdir()
    results.write(path, found)
    plots.draw_all(found, path.with_suffix(""))
    text = report.section(results.read(path), path, tmp_path)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == sum(2 + len(table.variants) for table in TABLES.values())
    row = next(row for row in rows if row.startswith("| DyHead, 1 block "))
    assert "| 32.0 ± 1.0 | +2.0 ± 2.0 |" in row
    assert row.endswith("| 2.00 M | 1.00 | 101 ms | 41 ms |")
    assert "0123456789ab" in text
    assert "(results/study.json)" in text
    for name in plots.PLOTS:
        assert f"(results/study-{name}.png)" in text


def test_one_seed_has_no_spread(tmp_path: Path) -> None:
    text = report.section(study(["attentions"], seeds=1), tmp_path / "study.json", tmp_path)
    assert "| no attention | 29.0 |" in text
    assert "±" not in "".join(line for line in text.splitlines() if line.startswith("|"))
    assert "nan" not in text
    drawn = plots.draw_all(study(["attentions"], seeds=1), tmp_path / "study")
    assert [path.name for path in drawn] == ["study-tables.png"]


def test_the_command_trains_measures_writes_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin, end = markers(STUDY)
    readme = tmp_path / "README.md"
    readme.write_text(f"{begin}\nold\n{end}\n")
    options = ["study", "--quick", "--folder", str(tmp_path / "runs"), "--tables", "high_offset"]
    options += ["--device", "cpu", "--write", str(readme), "--seeds"]
    assert main([*options, "1"]) == 0
    logs = sorted((tmp_path / "runs").glob("*/seed-*/log.jsonl"))
    assert len(logs) == len(TABLES["high_offset"].variants)
    found = results.read(tmp_path / "runs" / "study.json")
    assert set(found["variants"]) == set(TABLES["high_offset"].variants)
    for facts in found["variants"].values():
        (run,) = facts["runs"]
        assert run["curve"][-1] == [QUICK.steps, run["summary"]["AP"]]
        assert set(run["summary"]) == set(METRICS)
        assert facts["step_ms"] > 0
        assert facts["gflops"] > 0
    assert "| DyHead, 2 blocks |" in readme.read_text()
    assert capsys.readouterr().out.count("min left") == len(logs)
    before = {log: log.read_bytes() for log in logs}
    assert main([*options, "2"]) == 0
    assert {log: log.read_bytes() for log in logs} == before, "finished runs are not run again"
    assert len(results.read(tmp_path / "runs" / "study.json")["variants"]["crop"]["runs"]) == 2


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "study.json"
    assert main(["study", "--report", "--json", str(path)]) == 2
    assert "study.json" in capsys.readouterr().err
    path.write_text('{"schema": 7}')
    assert main(["study", "--report", "--json", str(path)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"expected a study of schema 2 in {path}, got schema 7" in said
    readme = tmp_path / "README.md"
    readme.write_text("no markers")
    assert main(["study", "--folder", str(tmp_path / "new"), "--write", str(readme)]) == 2
    assert "expected the lines" in capsys.readouterr().err
    assert not list((tmp_path / "new").iterdir()), "found before the first training"
    with pytest.raises(SystemExit):
        main(["study", "--seeds", "0"])
    assert "integer of at least 1" in capsys.readouterr().err


def test_the_docs_show_the_committed_study() -> None:
    path = ROOT / "docs" / "study.md"
    text = path.read_text()
    found = results.read(COMMITTED)
    assert all(len(facts["runs"]) >= 3 for facts in found["variants"].values())
    new = report.section(found, COMMITTED, path.parent)
    assert replace_section(text, STUDY, new) == text, (
        "run python -m benchmarks study --report --json benchmarks/results/study/study.json "
        "--write docs/study.md"
    )
