"""The stages, each in a process of its own with a time limit: a crash or a hang fails one of them."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu_check import records

#: seconds in which everything must be done
TOTAL_SECONDS = 540.0
#: a stage with less than this left is not started
LEAST_SECONDS = 10.0
#: lines of a failed stage's output that are kept
KEPT_LINES = 60


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage. What earlier stages leave of their time, later ones may use."""

    name: str
    title: str
    #: what runs: ``python -m MODULE``
    module: str
    #: seconds after the check's start when it must be done
    ends_at: float
    #: whether the check fails with it
    is_correctness: bool
    #: runs only when it is asked for by name
    is_extra: bool = False
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


#: several processes of one stage have room beside each other
_ON_DEMAND = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
STAGES = (
    Stage(
        name="environment",
        title="machine and ceilings",
        module="gpu_check.environment",
        ends_at=40,
        is_correctness=True,
    ),
    Stage(
        name="kernels",
        title="kernel suites, compiled",
        module="gpu_check.kernel_suites",
        ends_at=150,
        is_correctness=True,
        environment=_ON_DEMAND,
    ),
    Stage(
        name="parity",
        title="greedy parity with the CPU",
        module="gpu_check.parity",
        ends_at=225,
        is_correctness=True,
        environment=_ON_DEMAND,
    ),
    Stage(
        name="operations",
        title="operations",
        module="gpu_check.operations",
        ends_at=330,
        is_correctness=False,
    ),
    Stage(
        name="steps",
        title="whole steps at Llama-3.1-8B's shape",
        module="gpu_check.steps",
        ends_at=430,
        is_correctness=False,
    ),
    Stage(
        name="throughput",
        title="throughput beside transformers",
        module="gpu_check.throughput",
        ends_at=TOTAL_SECONDS,
        is_correctness=False,
    ),
    Stage(
        name="sweep",
        title="tile sizes",
        module="gpu_check.sweep",
        ends_at=TOTAL_SECONDS,
        is_correctness=False,
        is_extra=True,
    ),
    Stage(
        name="drafts",
        title="drafts",
        module="gpu_check.drafts",
        ends_at=TOTAL_SECONDS,
        is_correctness=False,
        is_extra=True,
    ),
)


def stage_environment(stage: Stage, results: Path, *, rehearsal: bool, deadline: float) -> dict[str, str]:
    """The environment of a stage's process.

    Args:
        deadline: `time.time` when the stage will be killed; a stage may leave out what does not fit.
    """
    environment = {**os.environ, **stage.environment}
    environment[records.RESULTS_VARIABLE] = str(results)
    environment["GPU_CHECK_DEADLINE"] = str(deadline)
    environment["PYTHONUNBUFFERED"] = "1"
    environment["TOKENIZERS_PARALLELISM"] = "false"
    environment["HF_HUB_OFFLINE"] = "1"
    if rehearsal:
        environment[records.REHEARSAL_VARIABLE] = "1"
        environment["JAX_PLATFORMS"] = "cpu"
    return environment


def seconds_left() -> float:
    """Until this stage's process will be killed."""
    return float(os.environ.get("GPU_CHECK_DEADLINE", "inf")) - time.time()


def run_stage(stage: Stage, *, seconds: float, rehearsal: bool) -> dict[str, Any]:
    """Run a stage for at most `seconds`; returns its status, what it recorded, and the end of its output if it
    failed.
    """
    if seconds < LEAST_SECONDS:
        return {"status": "not run: out of time", "seconds": 0.0, "records": []}
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        results, log = Path(folder, "results.jsonl"), Path(folder, "log")
        start = time.time()
        environment = stage_environment(stage, results, rehearsal=rehearsal, deadline=start + seconds)
        with log.open("wb") as output:
            # a process group, so that what the stage starts ends with it
            process = subprocess.Popen(
                [sys.executable, "-m", stage.module],
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _kill(process)
        found = records.read(results)
        result: dict[str, Any] = {
            "status": _status(code, found),
            "seconds": round(time.time() - start, 1),
            "records": found,
        }
        if result["status"] != "passed":
            result["output"] = log.read_text(errors="replace").splitlines()[-KEPT_LINES:]
        return result


def _status(code: int | None, found: list[dict[str, Any]]) -> str:
    if code is None:
        return "out of time"
    if code < 0:
        return f"crashed: {signal.Signals(-code).name}"
    failed = [record["name"] for record in found if record["kind"] == "check" and not record["passed"]]
    if failed:
        return "failed: " + ", ".join(failed)
    if code:
        return f"failed: exit status {code}"
    return "passed" if found else "failed: nothing was recorded"


def _kill(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
