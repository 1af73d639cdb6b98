"""What a stage finds out, written down at once: a line of JSON each, so that a crash loses nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

#: names the file that a stage writes to
RESULTS_VARIABLE = "GPU_CHECK_RESULTS"
#: "1": the shapes are tiny and the device is a CPU
REHEARSAL_VARIABLE = "GPU_CHECK_REHEARSAL"
#: the check without which nothing else makes sense
HAS_GPU = "JAX has a GPU"


def is_rehearsal() -> bool:
    return os.environ.get(REHEARSAL_VARIABLE) == "1"


def fact(name: str, value: Any) -> None:
    """Something that is so: a version, a memory plan."""
    _write({"kind": "fact", "name": name, "value": value})


def check(name: str, passed: bool, detail: str = "") -> bool:
    """Something that must be so; returns `passed`."""
    _write({"kind": "check", "name": name, "passed": bool(passed), "detail": detail})
    return bool(passed)


def measurement(
    operation: str,
    label: str,
    seconds: float,
    *,
    num_bytes: float | None = None,
    flops: float | None = None,
    bound: str | None = None,
    target: float | None = None,
    **more: Any,
) -> None:
    """Something that takes time.

    Args:
        num_bytes: that must be read or written at least.
        flops: that must be done, two for each product.
        bound: the ceiling that it is compared with, "copy" (bytes) or "matmul" (flops).
        target: share of that ceiling to reach.
        more: anything else to keep.
    """
    numbers = {"seconds": seconds, "bytes": num_bytes, "flops": flops, "bound": bound, "target": target}
    _write({"kind": "measurement", "operation": operation, "label": label, **numbers, **more})


def throughput(system: str, tokens_per_second: float, **more: Any) -> None:
    """Generated tokens per second of one engine on the common workload."""
    _write({"kind": "throughput", "system": system, "tokens_per_second": tokens_per_second, **more})


def read(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a stage's file; the last one may have been cut off."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def _write(record: dict[str, Any]) -> None:
    line = json.dumps(record)
    print(line, flush=True)
    if path := os.environ.get(RESULTS_VARIABLE):
        with open(path, "a") as file:
            file.write(line + "\n")
