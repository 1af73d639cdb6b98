"""What a benchmark asks of an engine: prompts as token ids, and how much to generate."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchRequest:
    """One request. Token ids, so that every engine computes the same."""

    prompt_token_ids: tuple[int, ...]
    #: tokens to generate, neither more nor fewer
    output_len: int
    #: seconds after the beginning at which it comes; None: the benchmark says when
    arrival_s: float | None = None


def prompt_tokens(requests: list[BenchRequest]) -> int:
    """Tokens of all prompts together."""
    return sum(len(request.prompt_token_ids) for request in requests)


def output_tokens(requests: list[BenchRequest]) -> int:
    """Tokens that all requests together generate."""
    return sum(request.output_len for request in requests)
