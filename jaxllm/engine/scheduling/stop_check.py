"""When a token ends its request. Stop strings are the output processor's, which sees the text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxllm.engine.request import RequestStatus

if TYPE_CHECKING:
    from jaxllm.api.constraints import RepetitionDetectionParams
    from jaxllm.engine.request import Request


#: the stop reason of a repetition, as vLLM calls it
REPETITION_DETECTED = "repetition_detected"


def check_stop(request: Request, token_id: int) -> tuple[RequestStatus | None, int | str | None]:
    """Status and stop reason that `token_id`, the request's newest token, ends it with; (None, None) if it goes on.

    vLLM's order: EOS unless `ignore_eos` (no stop reason), `stop_token_ids` (the id), length, and behind `min_tokens`
    repetition. For the stops `min_tokens` is enforced on the device, which does not sample one before it.
    """
    if token_id in request.stop_token_ids:
        if token_id in request.eos_token_ids and not request.params.ignore_eos:
            return RequestStatus.FINISHED_STOPPED, None
        if token_id in (request.params.stop_token_ids or ()):
            return RequestStatus.FINISHED_STOPPED, token_id
    if len(request.all_token_ids) >= request.max_total_tokens:
        return RequestStatus.FINISHED_LENGTH, None
    if request.repetition is not None and request.num_output_tokens >= request.params.min_tokens:
        if ends_in_repetition(request.all_token_ids, request.num_prompt_tokens, request.repetition):
            return RequestStatus.FINISHED_REPETITION, REPETITION_DETECTED
    return None, None


def ends_in_repetition(token_ids: list[int], start: int, params: RepetitionDetectionParams) -> bool:
    """Whether ``token_ids[start:]`` ends with some pattern of an allowed size, `min_count` times in a row."""
    for size in range(max(params.min_pattern_size, 1), params.max_pattern_size + 1):
        length = size * params.min_count
        first = len(token_ids) - length
        if first < start:
            return False
        # a tail that repeats with this period equals itself shifted by it; the first comparison mostly says no
        if token_ids[-1] == token_ids[-1 - size] and token_ids[first:-size] == token_ids[first + size :]:
            return True
    return False
