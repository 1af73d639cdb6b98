"""How the engine constrains outputs, and where reasoning begins and ends: vLLM's two configurations."""

from __future__ import annotations

import dataclasses

from jaxllm.api import checks
from jaxllm.api.errors import ValidationError

BACKENDS = ("auto", "guidance")
#: vLLM's reasoning parsers whose marks are plain strings -> (start, end) of the reasoning
PARSERS = {
    **dict.fromkeys(
        ("deepseek_r1", "deepseek_v3", "ernie45", "glm45", "holo2", "qwen3", "step3"), ("<think>", "</think>")
    ),
    "mistral": ("[THINK]", "[/THINK]"),
    "seed_oss": ("<seed:think>", "</seed:think>"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StructuredOutputsConfig:
    """Raises ValidationError for a backend or a reasoning parser that is not there."""

    #: "auto" is "guidance", the only one
    backend: str = "auto"
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    #: names the model's reasoning marks: a grammar begins behind the reasoning then
    reasoning_parser: str = ""
    #: the grammar holds in the reasoning as well
    enable_in_reasoning: bool = False

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ValidationError(
                f"structured_outputs_config.backend={self.backend!r} is not supported: jaxllm has one backend, "
                "guidance (llguidance). Leave it out, or pass 'auto' or 'guidance'."
            )
        for name in ("disable_any_whitespace", "disable_additional_properties", "enable_in_reasoning"):
            object.__setattr__(self, name, checks.boolean(f"structured_outputs_config.{name}", getattr(self, name)))
        check_parser(self.reasoning_parser)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReasoningConfig:
    """The marks around a model's reasoning; empty: the parser's, or ``<think>`` and ``</think>``.

    Raises ValidationError for an unknown parser.
    """

    reasoning_parser: str = ""
    reasoning_start_str: str = ""
    #: what a spent `thinking_token_budget` forces
    reasoning_end_str: str = ""

    def __post_init__(self) -> None:
        check_parser(self.reasoning_parser)
        for name in ("reasoning_start_str", "reasoning_end_str"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise ValidationError(f"reasoning_config.{name} must be a string, got {value!r}.")

    @property
    def is_set(self) -> bool:
        """Whether the user named the model's marks."""
        return bool(self.reasoning_parser or self.reasoning_start_str or self.reasoning_end_str)

    @property
    def natural_end(self) -> str:
        """How the model itself ends its reasoning; the forced end may say more before it."""
        return PARSERS[self.reasoning_parser][1] if self.reasoning_parser else self.end

    @property
    def start(self) -> str:
        return self.reasoning_start_str or PARSERS[self.reasoning_parser or "qwen3"][0]

    @property
    def end(self) -> str:
        return self.reasoning_end_str or PARSERS[self.reasoning_parser or "qwen3"][1]


def check_parser(name: str) -> None:
    """Raise ValidationError unless `name` is empty or a known reasoning parser."""
    if name and name not in PARSERS:
        raise ValidationError(
            f"reasoning_parser={name!r} is not supported; supported are {', '.join(sorted(PARSERS))}. Others can be "
            "described with reasoning_config={'reasoning_start_str': ..., 'reasoning_end_str': ...}."
        )
