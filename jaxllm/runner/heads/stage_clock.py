"""When each pipeline stage is done with each step, while somebody wants to know."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import jax


class StageClock:
    """A thread for each stage waits for what the stage's launches compute, one after the other.

    Args:
        stages: of the pipeline.
        when_stopped: is called with the clock.
    """

    def __init__(self, stages: int, when_stopped: Callable[[StageClock], object]):
        self._when_stopped = when_stopped
        self._launched: list[queue.SimpleQueue[Any]] = [queue.SimpleQueue() for _ in range(stages)]
        self._times: list[list[tuple[int, float, float]]] = [[] for _ in range(stages)]
        self._threads = [
            threading.Thread(target=_watch, args=watched, name="jaxllm stage clock", daemon=True)
            for watched in zip(self._launched, self._times, strict=True)
        ]
        for thread in self._threads:
            thread.start()

    def launched(self, step: int, stage: int, array: jax.Array) -> None:
        """A step is launched at a stage, which is done with it when `array` is there."""
        self._launched[stage].put((step, time.monotonic(), array))

    def stop(self) -> list[list[tuple[int, float, float]]]:
        """Wait for what is launched. Returns of each stage (step, when it was launched, when it was done), in order, in
        seconds of `time.monotonic`.
        """
        self._when_stopped(self)
        for launched in self._launched:
            launched.put(None)
        for thread in self._threads:
            thread.join()
        return self._times


def _watch(launched: queue.SimpleQueue[Any], times: list[tuple[int, float, float]]) -> None:
    while (item := launched.get()) is not None:
        step, begun, array = item
        try:
            array.block_until_ready()
        except Exception:  # noqa: BLE001, S112 - a step that failed is told of by whoever reads it
            continue
        times.append((step, begun, time.monotonic()))
        # nobody else may want it any more
        del item, array
