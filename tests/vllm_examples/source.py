"""Brings vLLM's source distribution here: its examples are in no wheel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def fetch(version: str, folder: Path) -> Path:
    """The unpacked source distribution of a version such as "0.33.*", below `folder`, where it is kept.

    pip would build it to learn what it depends on. It unpacks it before that, finds that what the build needs is not
    installed, and is told to leave its folder as it is.

    Raises RuntimeError when there is nothing afterwards.
    """
    for found in folder.glob("pip-*/vllm_*"):
        if (found / "examples").is_dir():
            return found
    folder.mkdir(parents=True, exist_ok=True)
    options = ["--no-deps", "--no-binary", "vllm", "--no-build-isolation", "--check-build-dependencies", "--no-clean"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), f"vllm=={version}"],
        env={**os.environ, "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
    )
    for found in folder.glob("pip-*/vllm_*"):
        if (found / "examples").is_dir():
            return found
    raise RuntimeError(f"pip brought no source distribution of vllm=={version}:\n{done.stdout}{done.stderr}")
