"""When a token ends its request. Stop strings are the output processor's, which sees the text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxllm.engine.request import RequestStatus

if TYPE_CHECKING:
    from jaxllm.engine.request import Request


def check_stop(request: Request, token_id: int) -> tuple[RequestStatus | None, int | None]:
    """Status and stop reason that `token_id`, the request's newest token, ends it with; (None, None) if it goes on.

    vLLM's order: EOS unless `ignore_eos` (no stop reason), `stop_token_ids` (the id), length. `min_tokens` is enforced
    on the device, which does not sample a stop before it.
    """
    if token_id in request.stop_token_ids:
        if token_id in request.eos_token_ids and not request.params.ignore_eos:
            return RequestStatus.FINISHED_STOPPED, None
        if token_id in (request.params.stop_token_ids or ()):
            return RequestStatus.FINISHED_STOPPED, token_id
    if len(request.all_token_ids) >= request.max_total_tokens:
        return RequestStatus.FINISHED_LENGTH, None
    return None, None
