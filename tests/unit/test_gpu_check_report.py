"""`make gpu-check`'s own machinery: what ends a stage, and how its numbers are judged."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from gpu_check.report import Report
from gpu_check.stages import KEPT_LINES, STAGES, TOTAL_SECONDS, Stage, run_stage

CORRECTNESS = STAGES[0]
SPEED = next(stage for stage in STAGES if stage.name == "throughput")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs a module of this text as a stage."""
    path = [str(tmp_path), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))

    def run(text: str, seconds: float = 60.0) -> dict[str, Any]:
        (tmp_path / "some_stage.py").write_text("from gpu_check import records\n" + text)
        stage = Stage(name="some", title="some", module="some_stage", ends_at=60, is_correctness=True)
        return run_stage(stage, seconds=seconds, rehearsal=True)

    return run


def test_a_stage_that_passes(run: Any):
    result = run("records.check('one', True)\nrecords.fact('rehearsal', records.is_rehearsal())")
    assert result["status"] == "passed" and "output" not in result
    assert [record["name"] for record in result["records"]] == ["one", "rehearsal"]
    assert result["records"][1]["value"] is True


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("import os\nos.abort()", "crashed: SIGABRT"),
        ("raise ValueError('no')", "failed: exit status 1"),
        ("records.check('two', False)", "failed: two"),
        ("records.check('three', False)\nimport os\nos.abort()", "crashed: SIGABRT"),
    ],
)
def test_what_was_recorded_survives_the_stages_end(run: Any, text: str, status: str):
    result = run("records.fact('first', 1)\nprint('said')\n" + text)
    assert result["status"] == status
    assert result["records"][0] == {"kind": "fact", "name": "first", "value": 1}
    assert "said" in result["output"] and len(result["output"]) <= KEPT_LINES


def test_nothing_recorded_is_no_success(run: Any):
    assert run("")["status"] == "failed: nothing was recorded"


def test_a_stage_that_hangs_ends_with_what_it_started(run: Any, monkeypatch: pytest.MonkeyPatch):
    text = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "records.fact('child', child.pid)\n"
        "time.sleep(600)"
    )
    monkeypatch.setattr("gpu_check.stages.LEAST_SECONDS", 0.0)
    result = run(text, seconds=4.0)
    assert result["status"] == "out of time" and result["seconds"] < 30
    (record,) = result["records"]
    deadline = time.monotonic() + 60
    while _runs(record["value"]):  # the kernel takes a moment
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(process_id: int) -> bool:
    """Whether a process is there and has not ended: whose parent is gone may stay a zombie."""
    try:
        status = Path(f"/proc/{process_id}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rsplit(")", 1)[1].split()[0] != "Z"


def test_no_time_is_left(run: Any):
    assert run("records.fact('ran', 1)", seconds=3) == {
        "status": "not run: out of time",
        "seconds": 0.0,
        "records": [],
    }


def test_the_stages_fit_into_nine_minutes():
    ends = [stage.ends_at for stage in STAGES]
    assert ends == sorted(ends) and ends[-1] == TOTAL_SECONDS <= 540


def measured(operation: str, seconds: float, **more: Any) -> dict[str, Any]:
    numbers = {"bytes": None, "flops": None, "bound": None, "target": None, **more}
    return {"kind": "measurement", "operation": operation, "label": "some", "seconds": seconds, **numbers}


def report_of(*records: dict[str, Any], rehearsal: bool = False, status: str = "passed") -> Report:
    ceilings = [
        measured("ceiling: copy", 2.0, bytes=100),
        measured("ceiling: copy", 1.0, bytes=100),
        measured("ceiling: matmul", 1.0, flops=1000),
    ]
    report = Report({"date": "today"}, rehearsal=rehearsal)
    report.add(CORRECTNESS, {"status": "passed", "seconds": 1.0, "records": ceilings})
    report.add(SPEED, {"status": status, "seconds": 1.0, "records": list(records)})
    return report


def test_measurements_are_judged_by_the_best_ceiling():
    good = measured("attention", 1.0, bytes=85, bound="copy", target=0.8)
    bad = measured("prefill", 2.0, flops=900, bytes=1, bound="matmul", target=0.5)
    free = measured("write", 1.0, bytes=10, bound="copy")
    report = report_of(good, bad, free)
    assert (good["ratio"], good["passed"]) == (0.85, True)
    assert (bad["ratio"], bad["passed"]) == (0.45, False)
    assert (free["ratio"], free["passed"]) == (0.1, None)
    assert report.missed == ["prefill some: 0.45"] and report.is_correct
    assert "MISSED" in report.table() and "reached" in report.table()


def test_engines_are_compared_with_the_fastest_run_of_ours():
    speeds = {"jaxllm": 50.0, "transformers generate": 8.0, "transformers continuous": 12.5}
    records = [{"kind": "throughput", "system": name, "tokens_per_second": rate} for name, rate in speeds.items()]
    report = report_of(*records, {**records[0], "tokens_per_second": 100.0})
    assert [record["ratio"] for record in records] == [None, 12.5, 8.0]
    assert report.missed == []
    slow = report_of({**records[0], "tokens_per_second": 20.0}, records[1])
    assert slow.missed == ["throughput transformers generate: 2.50"]


def test_only_correctness_decides_and_everything_unfinished_is_named():
    report = report_of(status="crashed: SIGABRT")
    assert report.is_correct and report.missed == [f"{SPEED.name}: crashed: SIGABRT"]
    report.add(CORRECTNESS, {"status": "not run: out of time", "seconds": 0.0, "records": []})
    assert not report.is_correct


def test_a_rehearsal_looks_like_nothing_else(tmp_path: Path):
    attention = measured("attention", 1.0, bytes=85, bound="copy", target=0.8)
    ours, theirs = (
        {"kind": "throughput", "system": name, "tokens_per_second": 10.0} for name in ("jaxllm", "transformers")
    )
    report = report_of(attention, ours, theirs, rehearsal=True)
    report.write(tmp_path / "out.json")
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["rehearsal"] is True and "REHEARSAL" in document["what"] and document["ceilings"] == {}
    assert attention["ratio"] is attention["passed"] is theirs["ratio"] is None
    assert (
        report.table().startswith("REHEARSAL") and "reached" not in report.table() and " of copy" not in report.table()
    )
    assert list(tmp_path.iterdir()) == [tmp_path / "out.json"]
