"""How much of the prompts the prefix cache had."""

from __future__ import annotations

import collections

#: requests that the hit rate looks back on (vLLM's number)
RECENT_REQUESTS = 1000


class PrefixCacheStats:
    """Counters in tokens. Resumed requests are counted apart: they mostly hit their own blocks."""

    def __init__(self, recent_requests: int = RECENT_REQUESTS) -> None:
        self.requests = 0
        #: tokens of the requests at their first admission
        self.queries = 0
        #: those of them that the cache had
        self.hits = 0
        #: the same of requests that come back after a preemption
        self.preempted_queries = 0
        self.preempted_hits = 0
        self._recent: collections.deque[tuple[int, int]] = collections.deque()
        self._recent_requests = recent_requests
        self._recent_queries = 0
        self._recent_hits = 0

    def record(self, num_tokens: int, num_hits: int, *, resumed: bool) -> None:
        """Count one admission of `num_tokens` tokens, `num_hits` of them found."""
        if resumed:
            self.preempted_queries += num_tokens
            self.preempted_hits += num_hits
            return
        self.requests += 1
        self.queries += num_tokens
        self.hits += num_hits
        self._recent.append((num_tokens, num_hits))
        self._recent_queries += num_tokens
        self._recent_hits += num_hits
        if len(self._recent) > self._recent_requests:
            old_tokens, old_hits = self._recent.popleft()
            self._recent_queries -= old_tokens
            self._recent_hits -= old_hits

    @property
    def hit_rate(self) -> float:
        """Share of the most recent requests' tokens that the cache had, in [0, 1]; 0.0 before the first request."""
        # once: another thread may ask while the cache is reset
        queries = self._recent_queries
        return self._recent_hits / queries if queries else 0.0

    def forget_recent(self) -> None:
        """Start the hit rate anew, as after a reset of the cache; the counters stay."""
        self._recent.clear()
        self._recent_queries = self._recent_hits = 0
