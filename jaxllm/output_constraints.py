"""What generated text has to be, or must not become; both are parts of `SamplingParams`."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxllm import checks
from jaxllm.errors import ValidationError


@dataclasses.dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """What the generated text has to match: exactly one of the first six fields."""

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        kinds = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
        given = [kind for kind in kinds if getattr(self, kind) is not None]
        if not given:
            raise ValidationError(
                "You must use one kind of structured outputs constraint but none are specified; "
                f"the kinds are {', '.join(kinds)}."
            )
        if len(given) > 1:
            raise ValidationError(
                "You can only use one kind of structured outputs constraint but multiple are specified: "
                f"{', '.join(given)}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RepetitionDetectionParams:
    """Ends a request whose last tokens are one pattern, `min_count` times over."""

    max_pattern_size: int
    min_pattern_size: int = 1
    min_count: int = 2

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            checks.integer(field.name, getattr(self, field.name))
        if not 1 <= self.min_pattern_size <= self.max_pattern_size:
            raise ValidationError(
                "repetition_detection needs 1 <= min_pattern_size <= max_pattern_size, "
                f"got {self.min_pattern_size} and {self.max_pattern_size}."
            )
        if self.min_count < 2:
            raise ValidationError(f"min_count must be at least 2 to detect repetitive patterns, got {self.min_count}.")
