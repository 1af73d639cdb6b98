"""What a step brought its requests, or the steps of one launch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from jaxllm.engine.request import Request


class RequestUpdate(NamedTuple):
    request: Request
    new_token_ids: list[int]
    #: the request's row in the step's `LogprobArrays`
    index: int
    finished: bool


@dataclasses.dataclass(slots=True)
class StepUpdates:
    """Parallel lists, one entry for each request that got tokens, or ended without one.

    No object is made for a token: a thousand of them a step, while they live, count as objects that last, and bring the
    collector to go through everything that the process holds, which takes longer than many steps.
    """

    requests: list[Request] = dataclasses.field(default_factory=list)
    #: tokens that each got, the last ones of its `all_token_ids` until the next step is taken in
    counts: list[int] = dataclasses.field(default_factory=list)
    #: each one's row in the step's `LogprobArrays`
    indices: list[int] = dataclasses.field(default_factory=list)
    #: when the step was read, seconds of time.monotonic()
    time: float = 0.0

    @classmethod
    def ended(cls, requests: list[Request]) -> StepUpdates:
        """Requests that ended outside of any step."""
        return cls(requests, [0] * len(requests), [-1] * len(requests))

    def record_times(self) -> None:
        """Tell the requests when their tokens came; nothing that decides the next step asks for it."""
        now = self.time
        for request in self.requests:
            request.last_token_ts = now
            if not request.first_token_ts:
                request.first_token_ts = now

    def join(self, later: StepUpdates) -> None:
        """Add what the launch's next step brought: the requests that go on are among these."""
        position = {id(request): i for i, request in enumerate(self.requests)}
        for request, count in zip(later.requests, later.counts, strict=True):
            self.counts[position[id(request)]] += count

    def __len__(self) -> int:
        return len(self.requests)

    def __iter__(self) -> Iterator[RequestUpdate]:
        """Entry by entry, as things are now."""
        for request, count, index in zip(self.requests, self.counts, self.indices, strict=True):
            tokens = request.all_token_ids
            yield RequestUpdate(request, tokens[len(tokens) - count :], index, request.is_finished)
