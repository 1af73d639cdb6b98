"""What a request returns: vLLM's outputs, with its field names."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxllm.api.logprobs import FlatLogprobs, Logprob, PositionLogprobs, PromptLogprobs, SampleLogprobs
from jaxllm.api.output_html import request_html

__all__ = [
    "CompletionOutput",
    "FlatLogprobs",
    "Logprob",
    "PositionLogprobs",
    "PromptLogprobs",
    "RequestMetrics",
    "RequestOutput",
    "RequestStateStats",
    "SampleLogprobs",
]

_SHOWN_CHARACTERS = 60
_SHOWN_TOKENS = 6


@dataclasses.dataclass(kw_only=True)
class RequestMetrics:
    """When things happened to a request.

    `arrival_time` is wall-clock time (`time.time()`); the names that end in `_ts` are monotonic (`time.monotonic()`),
    0.0 until they happen. Seconds all.
    """

    num_generation_tokens: int = 0
    arrival_time: float = 0.0
    queued_ts: float = 0.0
    scheduled_ts: float = 0.0
    first_token_ts: float = 0.0
    last_token_ts: float = 0.0
    #: seconds from arrival to the first token
    first_token_latency: float = 0.0
    num_preemptions: int = 0
    #: of `speculative_config`: drafts for its positions, and those of them that were right
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0

    @property
    def queue_time(self) -> float:
        """Seconds from its arrival in the engine until it first ran; 0.0 before that."""
        return self.scheduled_ts - self.queued_ts if self.scheduled_ts else 0.0

    @property
    def prefill_time(self) -> float:
        """Seconds from its first step to its first token; 0.0 before that."""
        return self.first_token_ts - self.scheduled_ts if self.first_token_ts else 0.0

    @property
    def decode_time(self) -> float:
        """Seconds from its first token to its newest one."""
        return self.last_token_ts - self.first_token_ts

    @property
    def inference_time(self) -> float:
        """Seconds from its first step to its newest token."""
        return self.prefill_time + self.decode_time

    @property
    def time_per_output_token(self) -> float:
        """Mean seconds a token after the first; 0.0 while there is one at most."""
        return self.decode_time / (self.num_generation_tokens - 1) if self.num_generation_tokens > 1 else 0.0


#: vLLM's name for it
RequestStateStats = RequestMetrics


@dataclasses.dataclass(kw_only=True, repr=False)
class CompletionOutput:
    """One completion of a prompt."""

    #: among the request's completions
    index: int
    text: str
    token_ids: list[int]
    #: sum over the generated tokens; None when no logprobs were asked for
    cumulative_logprob: float | None = None
    #: one entry a generated token
    logprobs: SampleLogprobs | None = None
    #: "stop", "length", "repetition", "abort", "error"; None while running
    finish_reason: str | None = None
    #: the stop string or the stop token id that ended it, "repetition_detected"; None for the model's own end of
    #: sequence
    stop_reason: int | str | None = None
    lora_request: Any = None

    def finished(self) -> bool:
        """Whether no more tokens will come."""
        return self.finish_reason is not None

    def __repr__(self) -> str:
        parts = [
            f"index={self.index}",
            f"text={_short_text(self.text)}",
            f"token_ids={_short_tokens(self.token_ids)}",
            f"finish_reason={self.finish_reason!r}",
        ]
        if self.stop_reason is not None:
            parts.append(f"stop_reason={self.stop_reason!r}")
        if self.cumulative_logprob is not None:
            parts.append(f"cumulative_logprob={self.cumulative_logprob:.4f}")
        return f"CompletionOutput({', '.join(parts)})"


@dataclasses.dataclass(kw_only=True, repr=False)
class RequestOutput:
    """A prompt and its completions."""

    request_id: str
    #: None when the prompt came as token ids
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    #: one entry a prompt token, the first None; None when not asked for. Of a request's outputs of kind DELTA the first
    #: has all of them and the others none
    prompt_logprobs: PromptLogprobs | None = None
    metrics: RequestMetrics = dataclasses.field(default_factory=RequestMetrics)
    #: prompt tokens that the prefix cache had
    num_cached_tokens: int = 0
    #: why the request was refused or failed, when its finish_reason is "error"
    error: str | None = None
    #: position of the prompt among those of the call
    index: int = 0
    lora_request: Any = None
    encoder_prompt: str | None = None
    encoder_prompt_token_ids: list[int] | None = None
    kv_transfer_params: dict[str, Any] | None = None

    def __repr__(self) -> str:
        parts = [
            f"request_id={self.request_id!r}",
            f"prompt={_short_text(self.prompt)}",
            f"prompt_token_ids={_short_tokens(self.prompt_token_ids)}",
            f"outputs={self.outputs!r}",
            f"finished={self.finished}",
        ]
        if self.num_cached_tokens:
            parts.append(f"num_cached_tokens={self.num_cached_tokens}")
        if self.error is not None:
            parts.append(f"error={self.error!r}")
        return f"RequestOutput({', '.join(parts)})"

    def _repr_html_(self) -> str:
        return request_html(self)


def failed_output(
    request_id: str, prompt: str | None, reason: str, *, finish_reason: str = "error", index: int = 0
) -> RequestOutput:
    """What a request gets that was refused ("error") or could not be finished ("abort")."""
    completion = CompletionOutput(index=0, text="", token_ids=[], finish_reason=finish_reason)
    return RequestOutput(
        request_id=request_id,
        prompt=prompt,
        prompt_token_ids=[],
        outputs=[completion],
        finished=True,
        error=reason,
        index=index,
    )


def was_refused(output: Any) -> bool:
    """Whether the `error` of an output, of any kind, is the request's own fault: it was refused, not cut short."""
    if isinstance(output, RequestOutput):
        return any(completion.finish_reason == "error" for completion in output.outputs)
    return output.is_refused


def _short_text(text: str | None) -> str:
    if text is None or len(text) <= _SHOWN_CHARACTERS:
        return repr(text)
    return f"{text[:_SHOWN_CHARACTERS]!r}... ({len(text)} characters)"


def _short_tokens(ids: list[int]) -> str:
    if len(ids) <= _SHOWN_TOKENS:
        return repr(list(ids))
    return f"[{', '.join(map(str, ids[:_SHOWN_TOKENS]))}, ...] ({len(ids)} tokens)"
