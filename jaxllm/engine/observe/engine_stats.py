"""A few numbers of a running engine, for those who show them as it runs."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxllm.engine.scheduling.scheduler_stats import SchedulerStats


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Counters since the engine's start, in tokens, beside the scheduler's present state."""

    scheduler: SchedulerStats
    #: of requests that have their first token
    prompt_tokens: int
    #: those of them that the prefix cache had
    prompt_tokens_cached: int
    generation_tokens: int
    prefix_cache_queries: int
    prefix_cache_hits: int
    #: of the most recent 1000 requests, in [0, 1]
    prefix_cache_hit_rate: float
