"""Who drafts tokens, and how many, for the model to verify."""

from __future__ import annotations

import dataclasses

from jaxllm.api import checks
from jaxllm.api.errors import ValidationError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeculativeConfig:
    """vLLM's ``speculative_config``.

    Raises:
        ValidationError: a value has the wrong type, lies outside its range, or contradicts another one.
    """

    #: such as "ngram" (the prompt is looked up) or "draft_model"
    method: str | None = None
    #: the one that drafts, where the method needs one
    model: str | None = None
    num_speculative_tokens: int | None = None
    #: longest and shortest run of tokens that "ngram" looks for
    prompt_lookup_max: int | None = None
    prompt_lookup_min: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min"):
            value = getattr(self, name)
            if value is not None and checks.integer(f"speculative_config.{name}", value) < 1:
                raise ValidationError(f"speculative_config.{name} must be at least 1, got {value}.")
        shortest, longest = self.prompt_lookup_min, self.prompt_lookup_max
        if shortest is not None and longest is not None and shortest > longest:
            raise ValidationError(
                f"speculative_config.prompt_lookup_min ({shortest}) must be at most prompt_lookup_max ({longest})."
            )
