"""How long an operation takes on the device at hand: what every ``bench.py`` shares."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


def seconds_per_call(
    function: Callable[..., Any], arguments: tuple[Any, ...], *, calls: int, repeats: int = 10
) -> float:
    """Median seconds of one of the ``calls`` operations inside a compiled ``function``, over ``repeats`` runs of it.

    Many operations to a run, because starting one from Python takes longer than a small kernel.
    """
    compiled = jax.jit(function).lower(*arguments).compile()
    jax.block_until_ready(compiled(*arguments))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        times.append(time.perf_counter() - start)
    return statistics.median(times) / calls


def parse_arguments(description: str, devices: tuple[str, ...] = ("gpu", "interpret-smoke")) -> argparse.Namespace:
    """The command line of every ``bench.py``: ``device``, one of `devices`, and ``json`` (a file or None)."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--device",
        choices=devices,
        default="gpu",
        help="gpu, cpu: real shapes, compiled; interpret-smoke: small ones in Pallas' interpreter, to see that it runs",
    )
    parser.add_argument("--json", type=Path, help="where to write the results")
    return parser.parse_args()


def report(results: list[dict[str, Any]], file: Path | None) -> None:
    """Prints one line per result, and writes them all with the device's name where ``file`` is given."""
    for result in results:
        print(
            "  ".join(
                f"{name} {value:.4g}" if isinstance(value, float) else str(value) for name, value in result.items()
            )
        )
    if file is not None:
        document = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "results": results}
        file.write_text(json.dumps(document, indent=1) + "\n")
