"""How many decode steps the next launch does on the device before the host looks at any of them, and with how many
drafts.

Several, or drafts, when nothing is lost by not looking: every running request only decodes, none of them can end for a
reason that the host alone knows, and there are blocks for all the tokens without a preemption. Several steps also need
that nobody waits; with drafts, that nobody who waits has a row. One step without drafts, otherwise. The number of steps
begins small after an arrival, since more arrivals may follow and would have to wait, and doubles while nothing happens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from jaxllm.api.sampling_params import RequestOutputKind
from jaxllm.engine.step import MAX_END_TOKEN_IDS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxllm.config.scheduler import SchedulerConfig
    from jaxllm.engine.cache.manager import KVCacheManager
    from jaxllm.engine.request import Request


class Launch(NamedTuple):
    """What a launch does with requests that only decode."""

    num_steps: int = 1
    num_drafts: int = 0

    @property
    def num_tokens(self) -> int:
        """Most tokens that it brings a request."""
        return self.num_steps * (1 + self.num_drafts)


ONE_STEP = Launch()


class DecodeSteps:
    """Decides for one scheduler.

    Args:
        config: `num_decode_steps` of 1 means that a launch without drafts always does one step.
    """

    def __init__(self, config: SchedulerConfig, kv_cache_manager: KVCacheManager) -> None:
        self._kv = kv_cache_manager
        self._drafts = config.num_drafts
        self._drafts_by_num_seqs = config.drafts_by_num_seqs
        # a window's bound on blocks holds for no more tokens at once
        self._most = min(config.num_decode_steps, config.max_num_batched_tokens)
        self._max_num_seqs = config.max_decode_steps_seqs
        if self._drafts:
            self._most, self._max_num_seqs = config.num_draft_steps, config.max_draft_seqs
        self._stream_interval = config.stream_interval
        self._never = self._most == 1 and not self._drafts
        self._pace = 1

    def add(self, request: Request) -> None:
        """Take notice of an arrival: note what it allows, and begin small again."""
        if self._never:
            return
        self._pace = 1
        if not (_brings_tokens_alone(request) if self._drafts else _ends_on_device(request)):
            return
        params = request.params
        if params.output_kind is RequestOutputKind.FINAL_ONLY:
            request.max_decode_steps = self._most
        else:
            # tokens that somebody reads as they come do not come in larger lots than was asked for, or than one step
            # with drafts brings
            lot = max(params.stream_interval or 1, self._stream_interval)
            request.max_decode_steps = max(min(self._most, lot // (1 + self._drafts)), 1)
        # the first input that was generated
        request.decode_steps_from = request.num_prompt_tokens
        if len(request.stop_token_ids) > MAX_END_TOKEN_IDS:
            # the device does not know all that must not come before `min_tokens`
            request.decode_steps_from += max(params.min_tokens - 1, 0)

    def choose(self, running: Sequence[Request], num_waiting: int, num_free_rows: int) -> Launch:
        """The next launch: one step, or what each of the running requests can do that has tokens left."""
        if self._never or not 0 < len(running) <= self._max_num_seqs:
            return ONE_STEP
        if num_waiting and (num_free_rows or not self._drafts):
            return ONE_STEP
        drafts = self._drafts
        if self._drafts_by_num_seqs and not (drafts := self._drafts_by_num_seqs[len(running) - 1]):
            return ONE_STEP
        steps, longest = self._pace, 0
        for request in running:
            num_tokens = len(request.all_token_ids) + request.num_output_placeholders
            left = request.max_total_tokens - num_tokens
            if left <= 0:
                continue
            start = request.num_computed_tokens
            if num_tokens - start != 1 or start < request.decode_steps_from:
                return ONE_STEP
            steps = min(steps, request.max_decode_steps)
            longest = max(longest, left)
        self._pace = min(2 * self._pace, self._most)
        steps = min(steps, longest)
        while not self._fit(running, steps * (1 + drafts)):
            if steps <= 1:
                return ONE_STEP
            steps //= 2
        return Launch(max(steps, 1), drafts)

    def _fit(self, running: Sequence[Request], num_tokens: int) -> bool:
        """Whether the free blocks hold so many more tokens of every request."""
        size, blocks = self._kv.block_size, 0
        for request in running:
            end = min(request.num_computed_tokens + num_tokens, request.max_total_tokens - 1)
            blocks += max(0, -(-(end - request.num_slots) // size))
        return blocks * len(self._kv.config.groups) <= self._kv.pool.num_free


def _brings_tokens_alone(request: Request) -> bool:
    """Whether nothing of the host is needed between two tokens. Where the host finds an end among those of a step with
    drafts, it drops the rest.
    """
    params = request.params
    return not (request.pools or params.structured_outputs is not None or params.thinking_token_budget is not None)


def _ends_on_device(request: Request) -> bool:
    """Whether the device can tell by itself where the request ends, and needs nothing of the host until then."""
    params = request.params
    return _brings_tokens_alone(request) and not (
        params.stop_strings
        or params.num_logprobs is not None
        or request.repetition is not None
        or len(request.end_token_ids) > MAX_END_TOKEN_IDS
    )
