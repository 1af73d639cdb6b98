"""The tokens that a step sampled, on their way to its requests: those that may end one go first, the rest can wait."""

from __future__ import annotations

import time
from collections.abc import Set
from typing import TYPE_CHECKING

from jaxllm.engine.request import RequestStatus
from jaxllm.engine.scheduling.request_update import StepUpdates
from jaxllm.engine.scheduling.stop_check import check_stop

if TYPE_CHECKING:
    from jaxllm.engine.request import Request
    from jaxllm.engine.step import SchedulerOutput, StepOutput

_PREEMPTED = int(RequestStatus.PREEMPTED)
NOTHING_ALLOWED = (
    "what the request allows (structured_outputs, thinking_token_budget, allowed_token_ids, bad_words, min_tokens) "
    "leaves no token to generate"
)


class SampledTokens:
    """Of one step, which its requests have got as soon as `settle` has been called.

    Args:
        index_of_step: which of the launch's steps.

    Raises:
        ValueError: the output has another number of entries than the step.
    """

    def __init__(self, scheduled: SchedulerOutput, output: StepOutput, index_of_step: int) -> None:
        self.requests: list[Request] = scheduled.requests
        self._samples, self._token_ids = scheduled.samples, output.token_ids
        #: what can end without one of the tokens that end requests; None: anybody
        self._ending: list[Request] | None = None if scheduled.steps else scheduled.ending
        if index_of_step:
            self._samples = [steps > index_of_step for steps in scheduled.steps]
            self._token_ids = output.later_token_ids[index_of_step - 1]
        if len(self._token_ids) != len(self.requests):
            raise ValueError(f"{len(self._token_ids)} tokens for the {len(self.requests)} entries of a step")
        #: entry -> tokens that it got, of those taken one by one; None: nothing is said of it
        self._taken: dict[int, int | None] = {}
        #: filled by `settle`
        self.updates = StepUpdates(time=time.monotonic())

    def may_end(self, end_token_ids: Set[int]) -> list[int]:
        """Entries whose token may end their request, in order.

        Args:
            end_token_ids: all that may end any request, and -1, which stands for no token.
        """
        if self._ending is None:
            return [index for index, sample in enumerate(self._samples) if sample]
        found = set()
        if not end_token_ids.isdisjoint(self._token_ids):
            samples = self._samples
            found = {i for i, token_id in enumerate(self._token_ids) if token_id in end_token_ids and samples[i]}
        for request in self._ending:
            index = self.requests.index(request)
            if self._samples[index]:
                found.add(index)
        return sorted(found)

    def take(self, index: int) -> tuple[RequestStatus, int | str | None] | None:
        """Give an entry its token; returns the status and stop reason with which its request ends now, if it does."""
        request, token_id = self.requests[index], self._token_ids[index]
        request.num_output_placeholders -= 1
        if request.is_finished:
            self._taken[index] = None
            return None
        if token_id < 0:
            # a request that pools has nothing to sample
            self._taken[index] = 0
            request.error = None if request.pools else NOTHING_ALLOWED
            return RequestStatus.FINISHED_STOPPED if request.pools else RequestStatus.FINISHED_ERROR, None
        self._taken[index] = 1
        request.all_token_ids.append(token_id)
        status, stop_reason = check_stop(request, token_id)
        if status is None:
            return None
        # what was scheduled behind an end may not be computed
        request.num_computed_tokens = min(request.num_computed_tokens, len(request.all_token_ids) - 1)
        return status, stop_reason

    def settle(self) -> None:
        """Give all others theirs."""
        counts = [1] * len(self.requests)
        passed_over: list[int] = []
        samples, taken = self._samples, self._taken
        if taken:
            samples = list(samples)
            for index in taken:
                samples[index] = False
        entries = zip(range(len(counts)), self.requests, samples, self._token_ids, strict=True)
        for index, request, sample, token_id in entries:
            if sample:
                request.num_output_placeholders -= 1
                if request.status <= _PREEMPTED:
                    request.all_token_ids.append(token_id)
                    continue
            else:
                count = taken.get(index)
                if count is not None:
                    counts[index] = count
                    continue
            passed_over.append(index)
        updates = self.updates
        updates.requests, updates.counts, updates.indices = list(self.requests), counts, list(range(len(counts)))
        for index in reversed(passed_over):
            del updates.requests[index], updates.counts[index], updates.indices[index]
