"""Stage 2: the suites of the kernels, which run compiled where JAX has a GPU."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

from gpu_check import records

SUITES = Path(__file__).parents[1] / "kernels"
#: each compiles for itself, and holds a context on the card
WORKERS = 8


def main() -> int:
    if not records.check("there are suites", any(SUITES.glob("test_*.py")), str(SUITES)):
        return 1
    command = [sys.executable, "-m", "pytest", "-p", "gpu_check.pytest_plugin", "-q", str(SUITES)]
    # which warnings another machine's packages have says nothing of the kernels
    command += ["-W", "default", "-p", "no:cacheprovider", "--no-header"]
    if not records.is_rehearsal() and importlib.util.find_spec("xdist"):
        command += ["-n", str(WORKERS)]
    code = subprocess.run(command, check=False).returncode
    records.check("pytest", code == 0, f"exit status {code}")
    return code


if __name__ == "__main__":
    sys.exit(main())
