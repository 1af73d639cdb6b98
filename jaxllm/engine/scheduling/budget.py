"""What one step has to give away: tokens, and positions of prompts that can be scored."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxllm.config.scheduler import SchedulerConfig
    from jaxllm.engine.request import Request


@dataclasses.dataclass(slots=True)
class StepBudget:
    """What is left of it."""

    tokens: int
    #: most tokens of one request
    chunk_size: int
    #: positions whose successors are known and get log-probabilities
    scored: int

    @classmethod
    def of(cls, config: SchedulerConfig, num_requests: int) -> StepBudget:
        """The budget of a new step, while so many requests run or wait.

        Chunks are limited only in company: nobody else is there to get the tokens that a lone request does not. With
        `long_prefill_token_threshold_adaptive` nobody gets less than a fair share of the step.
        """
        chunk_size, threshold = config.max_num_batched_tokens, config.long_prefill_token_threshold
        if threshold > 0 and config.enable_chunked_prefill and num_requests > 1:
            if config.long_prefill_token_threshold_adaptive:
                threshold = max(threshold, config.max_num_batched_tokens // num_requests)
            chunk_size = min(chunk_size, threshold)
        return cls(config.max_num_batched_tokens, chunk_size, config.max_scored_tokens)

    def chunk(
        self, request: Request, start: int, left: int, most: int = sys.maxsize, *, least: int = 0
    ) -> tuple[int, int]:
        """(tokens, positions with logits) of the next chunk of a request that has `left` tokens from `start` on; (0, 0)
        where nothing is left to score with.

        Args:
            most: tokens that can be computed.
            least: those that cannot be apart, whatever the size of chunks.
        """
        count = min(left, max(self.chunk_size, least), self.tokens, most)
        first = max(start, request.num_scheduled_scores)
        num_scored = min(start + count, request.num_scored_tokens) - first
        if num_scored <= 0:
            return count, int(count == left)
        if num_scored > self.scored:
            count = first + self.scored - start
        if not count:
            return 0, 0
        return count, max(start + count - first, int(count == left))

    def take(self, request: Request, start: int, count: int) -> None:
        """Give away a chunk."""
        self.tokens -= count
        end = min(start + count, request.num_scored_tokens)
        if end > request.num_scheduled_scores:
            self.scored -= end - max(start, request.num_scheduled_scores)
            request.num_scheduled_scores = end
