"""A benchmark writes down versions, machine and arguments beside its numbers."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import platform
from pathlib import Path
from typing import Any

import psutil

import jaxllm
from jaxllm.api.errors import JaxLLMError
from jaxllm.bench.peers.protocol import peak_rss_bytes

_PACKAGES = ("jax", "jaxlib", "numpy", "transformers", "tokenizers")
#: parsed arguments that are not to be repeated
_PRIVATE = ("run", "hf_token")


def write(path: Path | None, arguments: argparse.Namespace, results: dict[str, Any]) -> None:
    """Write `results` as JSON, with all that a reader needs to judge them and to run the benchmark again.

    Args:
        path: None writes nothing.

    Raises:
        JaxLLMError: the system does not take the file.
    """
    if path is None:
        return
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    record = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), "jaxllm": jaxllm.__version__, **versions},
        "machine": _machine(),
        "arguments": plain_arguments(arguments),
        "peak_rss_bytes": peak_rss_bytes(),
        **results,
    }
    try:
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise JaxLLMError(f"{path} cannot be written: {error.strerror or error}") from None


def plain_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """As they are written down."""
    return {name: _plain(value) for name, value in sorted(vars(arguments).items()) if name not in _PRIVATE}


def show_drafts(drafts: dict[str, int] | None) -> None:
    """Print `JaxLLMSession.drafts`, where there are any."""
    if drafts is None:
        return
    steps, drafted, accepted = drafts["num_drafts"], drafts["num_draft_tokens"], drafts["num_accepted_tokens"]
    print(
        f"Drafts: {accepted} of {drafted} tokens accepted ({100 * accepted / max(drafted, 1):.1f}%), mean acceptance "
        f"length {1 + accepted / max(steps, 1):.2f}"
    )


def table(rows: list[list[str]]) -> str:
    """Return rows of as many cells each as lines, with each column as wide as its longest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def usable_cores() -> int:
    """Return the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # "inf", as vLLM writes it: JSON has no such number
    return value if isinstance(value, int | float | str | list | dict | None) else str(value)


def _machine() -> dict[str, Any]:
    """Return what the process runs on, and how busy that is."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return {
        "platform": platform.platform(),
        "cpu": next(models, platform.processor() or platform.machine()),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "load_average": list(os.getloadavg()),
    }
