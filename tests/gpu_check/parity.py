"""Stage 3: the same small model on this device and on the CPU, in processes of their own at the same time.

float32: every greedy token is the same, whether prompts are computed whole, in chunks, from cached prefixes, or again
after preemptions. bfloat16: against the CPU's float32, this device's log-probabilities may err twice as much as the
CPU's own bfloat16 does (whose attention computes in float32), and two hundredths on top.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from gpu_check import records
from gpu_check.model_folder import write_checkpoint
from gpu_check.sizes import sizes

#: of log-probabilities in float32, which differ by the order of sums alone
FLOAT32_BOUND = 1e-3
BFLOAT16_FACTOR, BFLOAT16_MARGIN = 2.0, 0.02


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="gpu-check-parity-") as name:
        folder = Path(name)
        write_checkpoint(folder, sizes().parity_model)
        # the CPU's first: it takes longer
        reference = _start(folder, "cpu.json", "--reference", JAX_PLATFORMS="cpu")
        if records.is_rehearsal():
            reference.wait()  # the other one then finds its programs compiled
        device = _start(folder, "device.json")
        codes = [process.wait() for process in (device, reference)]
        for code, what in zip(codes, ("this device's side", "the CPU's side"), strict=True):
            if not records.check(what, code == 0, f"exit status {code}"):
                raise SystemExit(1)
        found = {side: json.loads((folder / f"{side}.json").read_text()) for side in ("cpu", "device")}
    expected_platform = "cpu" if records.is_rehearsal() else "gpu"
    records.check("the platform", found["device"]["platform"] == expected_platform, found["device"]["device"])
    _compare_tokens(found["cpu"]["runs"]["whole prompts"], found["device"]["runs"])
    _compare_scores(found["cpu"]["scores"], found["device"]["scores"])


def _start(folder: Path, output: str, *options: str, **environment: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "gpu_check.parity_side", str(folder), str(folder / output), *options]
    return subprocess.Popen(command, env={**os.environ, **environment})


def _compare_tokens(expected: dict[str, Any], runs: dict[str, dict[str, Any]]) -> None:
    count = sum(map(len, expected["tokens"]))
    records.fact("least gap between the two most likely tokens", expected["least_gap"])
    for name, run in runs.items():
        different = []
        for prompt, (theirs, ours) in enumerate(zip(expected["tokens"], run["tokens"], strict=True)):
            at = next((i for i, pair in enumerate(zip(theirs, ours, strict=True)) if pair[0] != pair[1]), None)
            if at is not None:
                different.append(f"prompt {prompt} from token {at} on")
        records.check(f"float32 tokens, {name}", not different, "; ".join(different) or f"{count} equal")
    records.check("prefixes were found", (cached := runs["prefix hits"]["cached_tokens"]) > 0, f"{cached} tokens")
    records.check("requests were preempted", (times := runs["preempted"]["preemptions"]) > 0, f"{times} times")


def _compare_scores(cpu: dict[str, list[float]], device: dict[str, list[float]]) -> None:
    truth = np.asarray(cpu["float32"])
    largest = float(np.max(np.abs(np.asarray(device["float32"]) - truth)))
    records.check("float32 log-probabilities", largest <= FLOAT32_BOUND, f"differ by {largest:.1e} at most")
    for name, measure in (("mean", np.mean), ("largest", np.max)):
        theirs, ours = (float(measure(np.abs(np.asarray(side["bfloat16"]) - truth))) for side in (cpu, device))
        bound = BFLOAT16_FACTOR * theirs + BFLOAT16_MARGIN
        records.check(
            f"bfloat16 log-probabilities, {name} error",
            ours <= bound,
            f"{ours:.4f}; the CPU's own {theirs:.4f}, so at most {bound:.4f}",
        )


if __name__ == "__main__":
    main()
