"""Who drafts tokens, and how many, for the model to verify."""

from __future__ import annotations

import dataclasses

from jaxllm.config import argument_checks as check
from jaxllm.config.argument import Arguments, argument


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeculativeConfig(Arguments):
    """vLLM's ``speculative_config``."""

    method: str | None = argument(None, check.one_of("ngram", "draft_model", "eagle", "eagle3"), "who drafts")
    model: str | None = argument(None, check.path_text, "the model that drafts, where the method needs one")
    num_speculative_tokens: int | None = argument(None, check.at_least(1), "tokens that are drafted at once")
    prompt_lookup_max: int | None = argument(None, check.at_least(1), "longest run of tokens that ngram looks for")
    prompt_lookup_min: int | None = argument(None, check.at_least(1), "the shortest")
