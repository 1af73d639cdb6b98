"""Seconds of device work."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax


def seconds_per_run(
    compiled: Callable[..., Any], arguments: Sequence[Any], *, repeats: int, launches: int = 1, carried: int = 0
) -> float:
    """Median seconds of one launch of a compiled function, over `repeats` series of `launches` that follow each other.

    Args:
        carried: how many of the first arguments the function takes over and returns; they go into the next launch.
    """
    arguments = list(arguments)

    def series(count: int) -> None:
        result = None
        for _ in range(count):
            result = compiled(*arguments)
            if carried == 1:
                arguments[0] = result
            elif carried:
                arguments[:carried] = result[:carried]
        jax.block_until_ready(result)

    series(2)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        series(launches)
        times.append((time.perf_counter() - start) / launches)
    return statistics.median(times)
