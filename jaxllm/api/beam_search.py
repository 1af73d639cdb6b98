"""What beam search takes and gives: vLLM's `BeamSearchParams` and `BeamSearchOutput`."""

from __future__ import annotations

import dataclasses

from jaxllm.api import checks
from jaxllm.api.errors import ValidationError
from jaxllm.api.outputs import PositionLogprobs


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """How many sequences are kept, and for how long.

    Raises:
        ValidationError: a value has the wrong type or lies outside its range.
    """

    beam_width: int
    max_tokens: int
    #: go on after an end of sequence
    ignore_eos: bool = False
    #: of the log-probabilities, where the engine's `logprobs_mode` is a processed one; raw ones have none
    temperature: float = 0.0
    #: sequences are ranked by cumulative log-probability / number of generated tokens ** this
    length_penalty: float = 1.0
    #: whether an end of sequence is among the tokens of its sequence
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        for name in ("beam_width", "max_tokens"):
            value = checks.integer(name, getattr(self, name))
            if value < 1:
                raise ValidationError(f"{name} must be at least 1, got {value}.")
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            checks.boolean(name, getattr(self, name))
        checks.real("length_penalty", self.length_penalty)
        temperature = checks.real("temperature", self.temperature)
        if not 0.0 <= temperature <= 2.0:
            raise ValidationError(f"temperature must be in [0, 2], got {temperature}.")


@dataclasses.dataclass(kw_only=True)
class BeamSearchSequence:
    """One sequence, on its way or done."""

    #: prompt, then what was generated
    tokens: list[int]
    #: one entry a generated token, the end of sequence included
    logprobs: list[PositionLogprobs] = dataclasses.field(default_factory=list)
    cum_logprob: float = 0.0
    #: of `tokens`, the prompt included; None while the search goes on
    text: str | None = None
    #: "stop" (an end of sequence) or "length"
    finish_reason: str | None = None
    #: the id of the end of sequence
    stop_reason: int | None = None

    def score(self, length_penalty: float) -> float:
        """cum_logprob / generated tokens ** length_penalty, as transformers ranks beams."""
        return self.cum_logprob / max(len(self.logprobs), 1) ** length_penalty


@dataclasses.dataclass(kw_only=True)
class BeamSearchOutput:
    """The sequences of one prompt, best first, at most `beam_width`."""

    sequences: list[BeamSearchSequence]
