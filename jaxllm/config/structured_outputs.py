"""How the engine constrains outputs, and where reasoning begins and ends: vLLM's two configurations."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.config.argument import Arguments, argument, switch

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "guidance")
#: vLLM's others: they would say the same of a grammar
OTHER_BACKENDS = ("xgrammar", "outlines", "lm-format-enforcer")
#: vLLM's reasoning parsers whose marks are plain strings -> (start, end) of the reasoning
PARSERS = {
    **dict.fromkeys(
        ("deepseek_r1", "deepseek_v3", "ernie45", "glm45", "holo2", "qwen3", "step3"), ("<think>", "</think>")
    ),
    "mistral": ("[THINK]", "[/THINK]"),
    "seed_oss": ("<seed:think>", "</seed:think>"),
}


def _string(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValidationError(f"{name} must be a string, got {value!r} of type {type(value).__name__}.")
    return value


def parser(name: str, value: Any) -> str:
    """Empty, or a known reasoning parser; raises ValidationError for anything else."""
    if _string(name, value) and value not in PARSERS:
        raise ValidationError(
            f"{name}={value!r} is not supported; supported are {', '.join(sorted(PARSERS))}. Others can be "
            "described with reasoning_config={'reasoning_start_str': ..., 'reasoning_end_str': ...}."
        )
    return value


def _backend(name: str, value: Any) -> str:
    if value in OTHER_BACKENDS:
        logger.warning("%s=%r has no effect: jaxllm has one backend, guidance (llguidance).", name, value)
        return "guidance"
    if value not in BACKENDS:
        raise ValidationError(
            f"{name}={value!r} is not supported: jaxllm has one backend, guidance (llguidance). Leave it out, or pass "
            "'auto' or 'guidance'."
        )
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class StructuredOutputsConfig(Arguments):
    """Says how a grammar constrains what is sampled."""

    NAME = "structured_outputs_config.{}"

    backend: str = argument("auto", _backend, "auto or guidance, which is the only one")
    disable_any_whitespace: bool = switch(False, "JSON has no spaces that it does not need")
    disable_additional_properties: bool = switch(False, "objects have the properties of their schema, and no others")
    reasoning_parser: str = argument("", parser, "the model's reasoning marks: a grammar begins behind the reasoning")
    enable_in_reasoning: bool = switch(False, "the grammar holds in the reasoning as well")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReasoningConfig(Arguments):
    """The marks around a model's reasoning; empty: the parser's, or ``<think>`` and ``</think>``."""

    NAME = "reasoning_config.{}"

    reasoning_parser: str = argument("", parser, "the model family whose marks these are")
    reasoning_start_str: str = argument("", _string, "how reasoning begins")
    reasoning_end_str: str = argument("", _string, "what a spent thinking_token_budget forces")

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
