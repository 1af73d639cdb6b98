"""How many decode steps the next launch does on the device before the host looks at any of them, and with how many
drafts.

Several, or drafts, when nothing is lost by not looking: every running request only decodes, none of them can end for a
reason that the host alone knows, and there are blocks for all the tokens without a preemption. Several steps also need
that nobody waits. One step without drafts, otherwise. The number of steps begins small after an arrival, since more
arrivals may follow and would have to wait, and doubles while nothing happens.

Where somebody has a prompt to compute, or waits and finds a row, launches take turns: one step for the prompts, and one
step with drafts for those that decode. That is a launch more than a step of all of them would be, so it costs `_APART`
steps each time, less the drafts that were right.

Where the host restricts what requests may sample (`Matcher`), a launch with drafts is one step, and waits until all
before it is read, so that nothing is under way meanwhile. That costs `_WAIT` steps each time, whether there are drafts
in the end or not, less the drafts that were right. Both are paid out of a credit (`speculative.credit`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from jaxllm.api.sampling_params import RequestOutputKind
from jaxllm.engine.step import MAX_END_TOKEN_IDS
from jaxllm.speculative.credit import Credit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxllm.config.scheduler import SchedulerConfig
    from jaxllm.engine.cache.manager import KVCacheManager
    from jaxllm.engine.request import Request
    from jaxllm.engine.step import SchedulerOutput, StepOutput

#: steps that a launch takes longer which is not made while another one is under way. An assumption: the host needs 1 ms
_WAIT = 0.1
#: steps that those who decode take longer beside prompts in a launch of their own: the weights are read once more
_APART = 1.0


class Launch(NamedTuple):
    """What a launch does with requests that only decode."""

    num_steps: int = 1
    num_drafts: int = 0
    #: those who have a prompt to compute take no part, and nobody is admitted
    apart: bool = False

    @property
    def num_tokens(self) -> int:
        """Most tokens that it brings a request."""
        return self.num_steps * (1 + self.num_drafts)


ONE_STEP = Launch()
#: nothing of what runs, until all that is under way is read
WAIT = Launch(num_steps=0)


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
        #: what waiting for the host, and launches apart from prompts, may still cost
        self._waiting_credit, self._apart_credit = Credit(), Credit()
        #: whether prompts had the latest launch, beside which others decode
        self._prompts_had_theirs = False
        #: whether the latest choice was to wait, which is paid for once, however often it is made again
        self._waits = False

    def add(self, request: Request) -> None:
        """Take notice of an arrival: note what it allows, and begin small again."""
        if self._never:
            return
        self._pace = 1
        if not self._drafts and not _ends_on_device(request):
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

    def may_draft(self, num_seqs: int) -> bool:
        """Whether so many requests may have drafts."""
        if num_seqs > self._max_num_seqs or not self._drafts:
            return False
        return not self._drafts_by_num_seqs or num_seqs < 1 or self._drafts_by_num_seqs[num_seqs - 1] > 0

    def choose(self, running: Sequence[Request], num_waiting: int, num_free_rows: int) -> Launch:
        """The next launch: one step, or what each of the running requests can do that has tokens left."""
        launch = self._choose(running, num_waiting, num_free_rows)
        self._waits = launch is WAIT
        return launch

    def _choose(self, running: Sequence[Request], num_waiting: int, num_free_rows: int) -> Launch:
        if self._never or not 0 < len(running) <= self._max_num_seqs:
            return ONE_STEP
        if num_waiting and not self._drafts:
            return ONE_STEP
        drafts = self._drafts
        if self._drafts_by_num_seqs and not (drafts := self._drafts_by_num_seqs[len(running) - 1]):
            return ONE_STEP
        steps, longest = self._pace, 0
        decoding: list[Request] = []
        restricted: list[Request] = []
        prompts = num_waiting > 0 and num_free_rows > 0
        for request in running:
            num_tokens = len(request.all_token_ids) + request.num_output_placeholders
            left = request.max_total_tokens - num_tokens
            if left <= 0:
                continue
            start = request.num_computed_tokens
            if self._drafts and computes_prompt(request):
                prompts = True
                continue
            if num_tokens - start != 1 or start < request.decode_steps_from:
                return ONE_STEP
            decoding.append(request)
            steps = min(steps, request.max_decode_steps)
            longest = max(longest, left)
            if request.matcher is not None:
                unread = num_tokens - len(request.all_token_ids) + self._most * (1 + drafts) - 1
                if request.matcher.may_constrain(unread):
                    restricted.append(request)
        if prompts:
            return ONE_STEP if restricted else self._take_turns(decoding, drafts)
        self._prompts_had_theirs = False
        if restricted:
            if any(request.num_unsure_tokens for request in running):
                # they take no part in a step without drafts: what is under way is read first
                return ONE_STEP
            if self._fit(running, 1 + drafts):
                launch = self._choose_restricted(restricted, drafts, alone=len(restricted) == len(running))
                if launch is not None:
                    return launch
            self._waiting_credit.grow()
            return ONE_STEP
        self._pace = min(2 * self._pace, self._most)
        steps = min(steps, longest)
        while not self._fit(running, steps * (1 + drafts)):
            if steps <= 1:
                return ONE_STEP
            steps //= 2
        steps = max(steps, 1)
        if drafts:
            self._apart_credit.grow(steps)
        return Launch(steps, drafts)

    def _take_turns(self, decoding: list[Request], drafts: int) -> Launch:
        """The next launch where others have prompts to compute: theirs comes first."""
        if self._prompts_had_theirs and decoding and self._apart_credit.is_left and self._fit(decoding, 1 + drafts):
            self._prompts_had_theirs = False
            self._apart_credit.pay(_APART)
            return Launch(1, drafts, apart=True)
        self._prompts_had_theirs = True
        self._apart_credit.grow()
        return ONE_STEP

    def _choose_restricted(self, restricted: list[Request], drafts: int, *, alone: bool) -> Launch | None:
        """A launch with drafts, or that it is worth waiting for; None: one step.

        Args:
            restricted: requests that the host restricts.
            alone: there are no others, for whom the device drafts.
        """
        if not self._waiting_credit.is_left and not self._waits:
            return None
        unread = [request.num_output_placeholders for request in restricted]
        # as far as the host has read, there are more drafts than what is still to be read
        worth = not alone or any(
            request.host_drafts is not None
            and len(request.host_drafts.find(request.all_token_ids, request.matcher)) > count  # pyright: ignore
            for request, count in zip(restricted, unread, strict=True)
        )
        if not worth:
            return None
        if not self._waits:
            # what is launched at once is waited for afterwards
            self._waiting_credit.pay(_WAIT)
        return WAIT if any(unread) else Launch(1, drafts)

    def learn(self, scheduled: SchedulerOutput, output: StepOutput) -> None:
        """Take in what a launch with drafts has brought."""
        if output.accepted is None:
            return
        won = float(output.accepted.sum()) / len(scheduled.rows)
        if scheduled.checked:
            self._waiting_credit.win(won)
        elif scheduled.is_apart:
            self._apart_credit.win(won)

    def _fit(self, running: Sequence[Request], num_tokens: int) -> bool:
        """Whether the free blocks hold so many more tokens of every request."""
        size, blocks = self._kv.block_size, 0
        for request in running:
            end = min(request.num_computed_tokens + num_tokens, request.max_total_tokens - 1)
            blocks += max(0, -(-(end - request.num_slots) // size))
        return blocks * len(self._kv.config.groups) <= self._kv.pool.num_free


def computes_prompt(request: Request) -> bool:
    """Whether a running request has more to compute than its last token, or that is one of its prompt."""
    num_tokens = len(request.all_token_ids) + request.num_output_placeholders
    start = request.num_computed_tokens
    return num_tokens - start > 1 or start < request.num_prompt_tokens


def _ends_on_device(request: Request) -> bool:
    """Whether the device can tell by itself where the request ends, and needs nothing of the host until then. With
    drafts, the host drops what comes behind an end.
    """
    params = request.params
    return not (
        request.pools
        or params.structured_outputs is not None
        or params.thinking_token_budget is not None
        or params.trace_decode_token_ids is not None
        or params.stop_strings
        or params.num_logprobs is not None
        or request.repetition is not None
        or len(request.end_token_ids) > MAX_END_TOKEN_IDS
    )
