"""What a step brought one request, or the steps of one launch."""

from __future__ import annotations

from typing import NamedTuple

from jaxllm.engine.request import Request


class RequestUpdate(NamedTuple):
    request: Request
    new_token_ids: list[int]
    #: the request's row in the step's `LogprobArrays`
    index: int
    finished: bool


def joined(before: list[RequestUpdate], after: list[RequestUpdate]) -> list[RequestUpdate]:
    """One update for each request of two steps of a launch; those of `before` get the later tokens, too."""
    found = {id(update.request): update for update in before}
    for update in after:
        earlier = found.get(id(update.request))
        if earlier is not None:
            earlier.new_token_ids.extend(update.new_token_ids)
            update = earlier._replace(finished=update.finished)
        found[id(update.request)] = update
    return list(found.values())
