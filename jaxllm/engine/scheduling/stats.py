"""The scheduler in numbers."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerStats:
    """The scheduler in numbers."""

    num_running: int
    num_waiting: int
    #: preemptions since the start
    num_preemptions: int
    #: computed tokens given up by them
    num_preempted_tokens: int
    #: share of the KV cache in use, in [0, 1]
    kv_cache_usage: float
    #: share of the host's pool of blocks that has contents, in [0, 1]; None: there is none
    host_cache_usage: float | None = None
    #: evicted blocks that the pool had no room for
    num_stores_skipped: int = 0
    #: share of the encoder's cache that running requests use, in [0, 1]; None: there are no pictures
    encoder_cache_usage: float | None = None
    #: items that chunks needed, and those of them whose vectors were there
    encoder_cache_queries: int = 0
    encoder_cache_hits: int = 0
