"""`make gpu-check`, rehearsed: every stage runs as on a GPU, on the CPU and with tiny shapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_check.stages import STAGES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def program_store() -> None:
    """In place of the end-to-end tests': most that the stages compile are kernels by themselves, which JAX's own cache
    keeps.
    """


def gpu_check(output: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-m", "gpu_check", "--output", str(output), *options]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.thorough
def test_the_rehearsal(tmp_path: Path):
    ran = gpu_check(tmp_path / "out.json", "--rehearse", "--strict", "--stages", *(stage.name for stage in STAGES))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    document = json.loads((tmp_path / "out.json").read_text())
    assert {name: stage["status"] for name, stage in document["stages"].items()} == {
        stage.name: "passed" for stage in STAGES
    }
    assert document["rehearsal"] and ran.stdout.count("REHEARSAL") == 2
    records = [record for stage in document["stages"].values() for record in stage["records"]]
    assert all(record["ratio"] is None for record in records if "ratio" in record)
    measured = {record["operation"].split("/")[0] for record in records if record["kind"] == "measurement"}
    assert measured >= {
        *("ceiling: copy", "ceiling: matmul", "decode_attention", "prefill_attention", "kv_write"),
        *("quant_matmul", "grouped_matmul", "decode step", "mixed step", "host time of a step", "sweep", "drafts"),
    }
    systems = {record["system"] for record in records if record["kind"] == "throughput"}
    assert systems == {"jaxllm", "transformers generate", "transformers continuous"}


def test_without_a_gpu_it_fails_and_says_so(tmp_path: Path):
    ran = gpu_check(tmp_path / "out.json")
    assert ran.returncode == 1 and "FAIL JAX has a GPU" in ran.stdout
    document = json.loads((tmp_path / "out.json").read_text())
    _, *others = (stage["status"] for stage in document["stages"].values())
    assert set(others) == {"not run: there is no GPU"}
    assert not document["is_correct"] and not document["rehearsal"]
