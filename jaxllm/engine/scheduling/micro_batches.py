"""Which running requests a step leaves to the next ones, so that the stages of a pipeline work on different requests.

With N stages, N steps are under way at different stages, and with `async_scheduling` one more, which waits for what the
oldest one samples. A request whose next token is being sampled is passed over until N - 1 other steps are launched: its
next step begins when the last stage is done with the one before, and so does nobody's else. A step takes an Nth of the
running requests, so that all steps are equally long. Chunks of a prompt follow each other without a gap, since nothing
is sampled between them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxllm.engine.request import Request
    from jaxllm.engine.step import SchedulerOutput

#: sampled and unread tokens of one request: more would be computed in vain behind an end that nobody has read of
MOST_UNREAD = 2


class MicroBatches:
    """The steps under way of a pipeline.

    Args:
        count: stages, more than one.
        ahead: whether a request may be scheduled before what it samples is read.
    """

    def __init__(self, count: int, *, ahead: bool) -> None:
        self._count = count
        self._most_unread = MOST_UNREAD if ahead else 1
        #: steps with entries
        self._num_launched = 0
        #: requests that the step may still let sample, and the last step whose requests it may take
        self._left = self._newest = 0

    def begin(self, num_running: int) -> None:
        """Begin a step."""
        self._left = -(-num_running // self._count)
        # fewer requests than stages follow each other as closely as they can
        self._newest = self._num_launched - min(self._count, max(num_running, 1))

    def takes(self, request: Request) -> bool:
        """Whether the step lets a running request that has all its tokens but one computed sample the next."""
        if request.num_output_placeholders and (
            request.micro_batch > self._newest or request.num_output_placeholders >= self._most_unread
        ):
            return False
        self._left -= 1
        return self._left >= 0

    def end(self, step: SchedulerOutput) -> None:
        """End it."""
        if step.rows:
            for request in step.requests:
                request.micro_batch = self._num_launched
            self._num_launched += 1
