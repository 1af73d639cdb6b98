"""vLLM's line of statistics, every few seconds while the engine runs."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from jaxllm.api.errors import ValidationError
from jaxllm.engine.observe.step_observer import StepObserver

if TYPE_CHECKING:
    from jaxllm.engine.observe.metrics import EngineStats

logger = logging.getLogger("jaxllm")

#: seconds between two lines
INTERVAL_VARIABLE = "JAXLLM_LOG_STATS_INTERVAL"


def stats_interval() -> float:
    """Seconds between two lines: `INTERVAL_VARIABLE` of the environment, else 10 as in vLLM.

    Raises:
        ValidationError: the variable holds something else than a positive number.
    """
    text = os.environ.get(INTERVAL_VARIABLE, "10")
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ValidationError(
            f"{INTERVAL_VARIABLE} must be a number of seconds greater than 0, such as 10; got {text!r}."
        )
    return seconds


class StatsLog(StepObserver):
    """Logs throughput and load of the time since the last line.

    No thread does it: the time in which no request runs does not count, and no line comes in it. What a last, shorter
    interval brought is logged when the engine ends.

    Args:
        stats: where the engine's numbers come from.
        interval: seconds.
        cache_name: what the KV cache is called.
        prefix_caching: whether there is a hit rate to tell; it is that of the last 1000 requests, vLLM's.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        stats: Callable[[], EngineStats],
        interval: float,
        *,
        prefix_caching: bool,
        cache_name: str = "KV cache",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stats, self._interval, self._prefix_caching, self._clock = stats, interval, prefix_caching, clock
        self._cache_name = cache_name
        self._last = stats()
        #: seconds since the last line in which requests ran
        self._busy = 0.0
        #: when the engine was last seen at work; None when nothing ran afterwards
        self._seen: float | None = None

    def turn_begins(self) -> None:
        now = self._clock()
        # requests may also have been aborted between two turns, or have waited for a caller who was busy elsewhere
        if self._seen is None or now - self._seen > self._interval:
            self._seen = now

    def turn_ends(self) -> None:
        now = self._clock()
        if self._seen is not None:
            self._busy += now - self._seen
        self._seen = now
        if self._busy >= self._interval:
            self._log()
        scheduler = self._stats().scheduler
        if not scheduler.num_running and not scheduler.num_waiting:
            self._seen = None

    def failed(self) -> None:
        self._seen = None

    def engine_ends(self) -> None:
        now, last = self._stats(), self._last
        if (now.prompt_tokens, now.generation_tokens) != (last.prompt_tokens, last.generation_tokens):
            self._log()

    def _log(self) -> None:
        now, last, seconds = self._stats(), self._last, max(self._busy, 1e-9)
        self._last, self._busy = now, 0.0
        computed = (now.prompt_tokens - now.prompt_tokens_cached) - (last.prompt_tokens - last.prompt_tokens_cached)
        preemptions = now.scheduler.num_preemptions - last.scheduler.num_preemptions
        parts = [
            f"Avg prompt throughput: {computed / seconds:.1f} tokens/s",
            f"Avg generation throughput: {(now.generation_tokens - last.generation_tokens) / seconds:.1f} tokens/s",
            f"Running: {now.scheduler.num_running} reqs",
            f"Waiting: {now.scheduler.num_waiting} reqs",
            *([f"Preemptions: {preemptions}"] if preemptions else []),
            f"{self._cache_name} usage: {100 * now.scheduler.kv_cache_usage:.1f}%",
            *([f"Prefix cache hit rate: {100 * now.prefix_cache_hit_rate:.1f}%"] if self._prefix_caching else []),
        ]
        if now.external_hit_rate is not None:
            parts.append(f"External prefix cache hit rate: {100 * now.external_hit_rate:.1f}%")
        if drafts := now.num_drafts - last.num_drafts:
            drafted = now.num_draft_tokens - last.num_draft_tokens
            accepted = now.num_accepted_tokens - last.num_accepted_tokens
            parts.append(
                f"Mean acceptance length: {1 + accepted / drafts:.2f}, Accepted: {accepted} of {drafted} drafted tokens"
            )
        logger.info("Engine %03d: %s", 0, ", ".join(parts))
