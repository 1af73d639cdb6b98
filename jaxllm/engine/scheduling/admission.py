"""What the runner is told of a request that enters a row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxllm.engine.step import AdmittedRequest

if TYPE_CHECKING:
    from jaxllm.engine.request import Request


def admission(request: Request, num_cached_tokens: int) -> AdmittedRequest:
    """`request`, which has its row and blocks, with the tokens that the prefix cache had."""
    return AdmittedRequest(
        row=request.row,
        request_id=request.request_id,
        token_ids=list(request.all_token_ids),
        num_prompt_tokens=request.num_prompt_tokens,
        num_computed_tokens=num_cached_tokens,
        params=request.params,
        seed=request.seed,
        stop_token_ids=request.stop_token_ids,
        end_token_ids=request.end_token_ids,
        block_ids=tuple(list(table) for table in request.block_tables),
        bad_words=request.bad_words,
    )
