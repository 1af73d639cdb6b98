"""What a step brought its requests."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxllm.engine.request import Request


@dataclasses.dataclass(slots=True)
class StepUpdates:
    """What a step brought. Parallel lists, one entry for each request that got tokens, or that ended where its token
    should have come.

    No object is made for a token: a thousand of them a step, while they live, count as objects that last, and bring the
    collector to go through everything that the process holds, which takes longer than many steps.
    """

    requests: list[Request] = dataclasses.field(default_factory=list)
    #: tokens that each got, the last ones of its `all_token_ids` until the next step is taken in
    counts: list[int] = dataclasses.field(default_factory=list)
    #: the first of them in `StepOutput.token_ids`, and so in its `logprobs`
    firsts: list[int] = dataclasses.field(default_factory=list)
    #: those of `requests` that ended with the step; whoever ends more of them for what it brought adds them
    ended: list[Request] = dataclasses.field(default_factory=list)
