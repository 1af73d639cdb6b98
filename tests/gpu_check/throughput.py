"""Stage 6: tokens per second of the whole engine and of transformers, one after the other on the same card, with the
same shape of model and the same requests. Each in a process of its own, which gives the card back.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from gpu_check import records
from gpu_check.model_folder import write_config
from gpu_check.sizes import sizes
from gpu_check.stages import seconds_left

#: in this order: the one that everything is compared with, then those that it is compared with
SYSTEMS = (
    ("gpu_check.throughput_jaxllm",),
    ("gpu_check.throughput_transformers", "continuous"),
    ("gpu_check.throughput_transformers", "generate"),
)
#: seconds that are kept for each system still to come
RESERVED = 25.0
#: what a process needs to give the card back, and what is not worth starting
LEAST_SECONDS = 12.0


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="gpu-check-model-") as folder:
        write_config(Path(folder), sizes().model)
        for index, (module, *options) in enumerate(SYSTEMS):
            name = " ".join((module.removeprefix("gpu_check.throughput_"), *options))
            seconds = seconds_left() - RESERVED * (len(SYSTEMS) - 1 - index) - 3
            if seconds < LEAST_SECONDS:
                records.check(name, False, "not run: out of time")
                continue
            _run(name, [sys.executable, "-m", module, folder, *options], seconds)


def _run(name: str, command: list[str], seconds: float) -> None:
    try:
        code = subprocess.run(command, timeout=seconds, check=False).returncode
    except subprocess.TimeoutExpired:
        records.check(name, False, f"out of time after {seconds:.0f} s")
    else:
        records.check(name, code == 0, f"exit status {code}" if code else "")


if __name__ == "__main__":
    main()
