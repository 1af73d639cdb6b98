"""What generated text has to be, or must not become; both are parts of `SamplingParams`."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from jaxllm.api import checks
from jaxllm.api.errors import ValidationError

KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
#: objects and arrays of a JSON schema inside each other; vLLM's limit
MAX_NESTING = 64
#: levels that a structural tag adds around its schemas
STRUCTURAL_TAG_NESTING = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """What the generated text has to match: exactly one of the first six fields.

    Raises:
        ValidationError: none or several of them are given, or a value cannot be one.
    """

    #: a JSON schema
    json: str | dict[str, Any] | None = None
    #: what the whole text matches, in the syntax of Rust's regex crate: no look-around, no back-references
    regex: str | None = None
    choice: list[str] | None = None
    #: Lark, or GBNF (llama.cpp's EBNF)
    grammar: str | None = None
    #: True: any JSON object
    json_object: bool | None = None
    #: JSON with "structures" (each with "begin", "schema" and "end") and "triggers"
    structural_tag: str | dict[str, Any] | None = None
    #: JSON without spaces and line breaks between its parts
    disable_any_whitespace: bool = False
    #: objects of the schema that list properties take no others, unless it says so
    disable_additional_properties: bool = False
    #: a regex of what may stand between the parts of JSON
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if not given:
            raise ValidationError(
                "You must use one kind of structured outputs constraint but none are specified; "
                f"the kinds are {', '.join(KINDS)}."
            )
        if len(given) > 1:
            raise ValidationError(
                "You can only use one kind of structured outputs constraint but multiple are specified: "
                f"{', '.join(given)}."
            )
        for name in ("regex", "grammar", "whitespace_pattern"):
            self._check_type(name, (str,), "a string")
        for name in ("json", "structural_tag"):
            self._check_type(name, (str, dict), "a JSON schema, as a dict or as a string" if name == "json" else "JSON")
        for name in ("json", "grammar", "structural_tag"):
            value = getattr(self, name)
            if isinstance(value, str) and not value.strip():
                raise ValidationError(f"structured_outputs.{name} cannot be an empty string")
        for name in ("disable_any_whitespace", "disable_additional_properties"):
            object.__setattr__(self, name, checks.boolean(f"structured_outputs.{name}", getattr(self, name)))
        self._check_choice()
        if self.json_object is not None and not checks.boolean("structured_outputs.json_object", self.json_object):
            raise ValidationError(
                "structured_outputs.json_object must be True if set; omit structured_outputs to disable structured "
                "outputs"
            )
        if self.regex and "\x00" in self.regex:
            raise ValidationError("structured_outputs.regex must not contain a NUL character ('\\x00')")
        self._check_json()

    def _check_type(self, name: str, kinds: tuple[type, ...], wanted: str) -> None:
        value = getattr(self, name)
        if value is not None and not isinstance(value, kinds):
            hint = (
                "; of a pydantic model, pass Model.model_json_schema()" if hasattr(value, "model_json_schema") else ""
            )
            raise ValidationError(
                f"structured_outputs.{name} must be {wanted}, got {value!r:.80} of type {type(value).__name__}{hint}."
            )

    def _check_choice(self) -> None:
        if self.choice is None:
            return
        if isinstance(self.choice, str):
            raise ValidationError(f"structured_outputs.choice must be a list of strings, got {self.choice!r:.80}.")
        texts = checks.items("structured_outputs.choice", self.choice)
        if not texts:
            raise ValidationError(f"Choice '{texts}' cannot be an empty list")
        wrong = [text for text in texts if not isinstance(text, str)]
        if wrong:
            raise ValidationError(
                "structured_outputs.choice must contain only strings, "
                f"got {wrong[0]!r:.80} of type {type(wrong[0]).__name__}."
            )
        object.__setattr__(self, "choice", texts)

    def _check_json(self) -> None:
        """What can be said of the JSON in `json` and `structural_tag` without compiling it."""
        for name, limit in (("json", MAX_NESTING), ("structural_tag", MAX_NESTING + STRUCTURAL_TAG_NESTING)):
            value = getattr(self, name)
            if value is None:
                continue
            try:
                parsed = json.loads(value) if isinstance(value, str) else value
                too_deep = nested_beyond(parsed, limit)
                json.dumps(parsed)
            except RecursionError:
                too_deep = True
            except (TypeError, ValueError) as error:
                raise ValidationError(f"structured_outputs.{name} is not JSON: {error}: {value!r:.80}") from None
            if too_deep:
                raise ValidationError(
                    f"The JSON schema is nested too deeply: objects and arrays may nest at most {MAX_NESTING} levels"
                )


def nested_beyond(value: Any, limit: int) -> bool:
    """Whether objects and arrays stand inside each other on more than `limit` levels."""
    level = [value] if isinstance(value, (dict, list)) else []
    while level:
        if not limit:
            return True
        limit -= 1
        children = (child for node in level for child in (node.values() if isinstance(node, dict) else node))
        level = [child for child in children if isinstance(child, (dict, list))]
    return False


@dataclasses.dataclass(frozen=True, kw_only=True)
class RepetitionDetectionParams:
    """Ends a request whose last output tokens are one pattern, `min_count` times over."""

    #: tokens of the longest pattern; 0: detect nothing
    max_pattern_size: int = 0
    #: tokens of the shortest pattern; 0 is 1
    min_pattern_size: int = 0
    min_count: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            name = f"repetition_detection.{field.name}"
            object.__setattr__(self, field.name, checks.integer(name, getattr(self, field.name)))
        if not 0 <= self.min_pattern_size <= self.max_pattern_size:
            raise ValidationError(
                "max_pattern_size, min_pattern_size must be >=0, with min_pattern_size <= max_pattern_size. Set both "
                f"to 0 to disable repetitive pattern detection; got {self.max_pattern_size} and "
                f"{self.min_pattern_size}."
            )
        if self.max_pattern_size and self.min_count < 2:
            raise ValidationError(
                "min_count must be >= 2 to detect repetitive patterns in engine output. If you do not wish to detect "
                f"repetitive patterns, set max_pattern_size to 0; got {self.min_count}."
            )
