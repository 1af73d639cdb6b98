"""Programs of the tests that need a process with a JAX of its own: one with several devices, for example."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from support.quick_compile import QUICK, flags

ROOT = Path(__file__).parents[2]


def environment() -> dict[str, str]:
    """Of a process on a CPU that finds the tests' modules and compiles quickly."""
    quick = flags(QUICK, os.environ.get("XLA_FLAGS", ""))
    return {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "XLA_FLAGS": quick}


def found_by(module: str, folder: Path, *arguments: str) -> Any:
    """The JSON that ``python -m MODULE FOLDER ARGUMENTS`` prints last, on a CPU."""
    done = subprocess.run(
        [sys.executable, "-m", module, str(folder), *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
