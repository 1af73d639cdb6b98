"""How one request is sampled: vLLM's `SamplingParams`, with its names, defaults and limits."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import functools
import inspect
import logging
import numbers
from typing import Any, ClassVar, TypeVar

from jaxllm.api import checks
from jaxllm.api.constraints import RepetitionDetectionParams, StructuredOutputsParams
from jaxllm.api.errors import ValidationError

__all__ = [
    "RepetitionDetectionParams",
    "RequestOutputKind",
    "SamplingParams",
    "StructuredOutputsParams",
]

logger = logging.getLogger(__name__)
_Part = TypeVar("_Part", StructuredOutputsParams, RepetitionDetectionParams)

#: below this a temperature means greedy
GREEDY_TEMPERATURE = 1e-5
#: logits divided by less than this overflow in half precision
LOWEST_TEMPERATURE = 1e-2
MAX_LOGPROB_TOKEN_IDS = 128
LOGIT_BIAS_LIMIT = 100.0
#: of a repetition penalty, and one over the least: what it makes of any logit is still a number of float32
MOST_REPETITION_PENALTY = 1e30
DEFAULT_MAX_TOKENS = 16
#: of a prompt, in one request: vLLM's ``VLLM_MAX_N_SEQUENCES``
MOST_COMPLETIONS = 16384

#: what asks for nothing more than there is
_INERT = {"use_beam_search": False, "early_stopping": False, "length_penalty": 1.0}
_REMOVED = {
    "best_of": "sample with n=... and choose among the outputs by their cumulative_logprob",
    "use_beam_search": "beam search is no longer a sampling parameter",
    "early_stopping": "it belonged to beam search, which is no longer a sampling parameter",
    "length_penalty": "it belonged to beam search, which is no longer a sampling parameter",
    "logits_processors": "pass jax functions to LLM(logits_processors=[...]), or use logit_bias, allowed_token_ids or "
    "bad_words",
    "truncate_prompt_tokens": "pass tokenization_kwargs={'truncate_prompt_tokens': N} to generate()",
    "guided_decoding": "use structured_outputs=StructuredOutputsParams(...), whose fields have the same names",
}


class RequestOutputKind(enum.Enum):
    """What each output of a streamed request holds."""

    #: all of the text so far
    CUMULATIVE = 0
    #: only what is new
    DELTA = 1
    #: one output, when the request ends
    FINAL_ONLY = 2


@dataclasses.dataclass(kw_only=True, slots=True)
class SamplingParams:
    """Sampling parameters of a request; construction checks and normalises every field.

    The fields may be set afterwards; `clone()` checks again, and the engine works on a clone, so that what the
    caller holds is never changed.

    Raises:
        ValidationError: a value has the wrong type or lies outside its range.
        TypeError: an argument does not exist, or no longer exists in vLLM.
    """

    __struct_fields__: ClassVar[tuple[str, ...]]

    #: completions of the prompt
    n: int = 1
    #: in [-2, 2]; subtracted once from the logit of every token generated so far
    presence_penalty: float = 0.0
    #: in [-2, 2]; subtracted from a token's logit as often as it was generated
    frequency_penalty: float = 0.0
    #: > 0; divides (positive) or multiplies (negative) the logits of tokens in prompt and output
    repetition_penalty: float = 1.0
    #: in [0, 2]; below 1e-5 is greedy
    temperature: float = 1.0
    #: in (0, 1]
    top_p: float = 1.0
    #: 0 or -1: all tokens
    top_k: int = 0
    #: in [0, 1]; least probability of a token, relative to the likeliest one's
    min_p: float = 0.0
    #: None: the engine decides
    seed: int | None = None
    #: strings that end generation; kept as a list
    stop: str | list[str] | None = None
    #: token ids that end generation, besides the model's own
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    #: None: until the context is full
    max_tokens: int | None = DEFAULT_MAX_TOKENS
    min_tokens: int = 0
    #: alternatives reported per generated token; -1: the vocabulary
    logprobs: int | None = None
    #: alternatives reported per prompt token, as `logprobs`; the prefix cache is not read then
    prompt_logprobs: int | None = None
    #: report exactly these, and the sampled token, in place of the most likely ones
    logprob_token_ids: list[int] | None = None
    #: return `jaxllm.api.logprobs.FlatLogprobs`, which is quicker for many alternatives
    flat_logprobs: bool = False
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    #: tokens between two streamed outputs
    stream_interval: int | None = None
    #: a dict of its fields will do
    structured_outputs: StructuredOutputsParams | dict[str, Any] | None = None
    #: token id -> added to its logit; values are held within [-100, 100]
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    #: words that are never generated; kept as a list
    bad_words: list[str] | None = None
    #: -1 or None: unlimited
    thinking_token_budget: int | None = None
    #: the outputs, where they are known: these are written, and ``logprobs`` tells what the model thinks of them. They
    #: are all written, whatever the default of ``max_tokens``; another one that is too small for them is refused.
    trace_decode_token_ids: list[int] | None = None
    #: a dict of its fields will do
    repetition_detection: RepetitionDetectionParams | dict[str, Any] | None = None
    #: True: compute the whole prompt even where the prefix cache has it
    skip_reading_prefix_cache: bool | None = None
    #: name -> number, for the engine's logits processors (`jaxllm.LogitsProcessor`)
    extra_args: dict[str, Any] | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> SamplingParams:
        for name, value in kwargs.items():
            if name in _REMOVED:
                if value is None or value == _INERT.get(name):
                    continue
                raise TypeError(f"SamplingParams has no argument {name!r} any more: {_REMOVED[name]}.")
            if name not in cls.__dataclass_fields__:
                close = difflib.get_close_matches(name, cls.__dataclass_fields__, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else "."
                if name.startswith("guided_"):
                    hint = f": use structured_outputs=StructuredOutputsParams({name.removeprefix('guided_')}=...)."
                raise TypeError(f"SamplingParams has no argument {name!r}{hint}")
        # `super()` would mean the class without slots
        return object.__new__(cls)

    def __post_init__(self) -> None:
        self._check_counts()
        self._check_distribution()
        self._check_lists()
        for name in (
            "ignore_eos",
            "flat_logprobs",
            "detokenize",
            "skip_special_tokens",
            "spaces_between_special_tokens",
            "include_stop_str_in_output",
        ):
            setattr(self, name, checks.boolean(name, getattr(self, name)))
        if self.skip_reading_prefix_cache is not None:
            self.skip_reading_prefix_cache = checks.boolean("skip_reading_prefix_cache", self.skip_reading_prefix_cache)
        self.structured_outputs = _from_fields("structured_outputs", StructuredOutputsParams, self.structured_outputs)
        self.repetition_detection = _from_fields(
            "repetition_detection", RepetitionDetectionParams, self.repetition_detection
        )
        if self.prompt_logprobs is not None and self.skip_reading_prefix_cache is False:
            raise ValidationError(
                f"prompt_logprobs={self.prompt_logprobs} needs the whole prompt to be computed, so "
                "skip_reading_prefix_cache cannot be False; leave it None."
            )
        for name, kind in (
            ("output_kind", RequestOutputKind),
            ("structured_outputs", StructuredOutputsParams | None),
            ("repetition_detection", RepetitionDetectionParams | None),
            ("extra_args", dict | None),
        ):
            value = getattr(self, name)
            if not isinstance(value, kind):
                wanted = str(getattr(kind, "__name__", kind)).replace("jaxllm.api.constraints.", "")
                raise ValidationError(f"{name} must be {wanted}, got {value!r} of type {type(value).__name__}.")
        if self.stop and not self.detokenize:
            raise ValidationError(
                "stop strings are only supported when detokenize is True. Set detokenize=True to use stop."
            )

    def _check_counts(self) -> None:
        self.n = checks.integer("n", self.n)
        if self.n < 1:
            raise ValidationError(f"n must be at least 1, got {self.n}.")
        if self.n > MOST_COMPLETIONS:
            raise ValidationError(
                f"n must be at most {MOST_COMPLETIONS}, got {self.n}. Ask for more by several requests of the prompt."
            )
        if self.max_tokens is not None:
            self.max_tokens = checks.integer("max_tokens", self.max_tokens)
            if self.max_tokens < 1:
                raise ValidationError(f"max_tokens must be at least 1, got {self.max_tokens}.")
        self.min_tokens = checks.integer("min_tokens", self.min_tokens)
        if self.min_tokens < 0:
            raise ValidationError(f"min_tokens must be greater than or equal to 0, got {self.min_tokens}.")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValidationError(
                f"min_tokens must be less than or equal to max_tokens={self.max_tokens}, got {self.min_tokens}."
            )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if isinstance(value, bool):
                value = 1 if value else None
            if value is not None:
                value = checks.integer(name, value)
                if value < -1:
                    raise ValidationError(f"{name} must be non-negative or -1, got {value}.")
            setattr(self, name, value)
        if self.stream_interval is not None:
            self.stream_interval = checks.integer("stream_interval", self.stream_interval)
            if self.stream_interval < 1:
                raise ValidationError(f"stream_interval must be at least 1, got {self.stream_interval}.")
        if self.thinking_token_budget is not None:
            budget = self.thinking_token_budget
            if isinstance(budget, bool) or not isinstance(budget, numbers.Integral) or budget < -1:
                raise ValidationError(
                    "`thinking_token_budget` must be a non-negative integer or -1 for unlimited, "
                    f"got {budget!r} of type {type(budget).__name__}."
                )
            self.thinking_token_budget = None if budget == -1 else int(budget)
        if self.trace_decode_token_ids is not None:
            self._check_trace()
        if self.seed is not None:
            self.seed = checks.integer("seed", self.seed)
            if not -(2**63) <= self.seed < 2**64:
                raise ValidationError(f"seed must fit 64 bits, got {self.seed}.")
            if self.seed == -1:
                self.seed = None

    def _check_trace(self) -> None:
        """A trace decides on every token, and its length on the end."""
        self.trace_decode_token_ids = checks.token_ids("trace_decode_token_ids", self.trace_decode_token_ids)
        if not self.trace_decode_token_ids:
            raise ValidationError("trace_decode_token_ids must not be empty; leave it None to generate.")
        decides = ("structured_outputs", "repetition_detection", "thinking_token_budget", "bad_words", "stop")
        decides = (*decides, "allowed_token_ids", "stop_token_ids")
        given = [name for name in decides if getattr(self, name)] + (["n"] if self.n > 1 else [])
        if given:
            raise ValidationError(
                f"trace_decode_token_ids says what is written, and {given[0]}={getattr(self, given[0])!r:.60} cannot "
                "change it. Leave one of them out."
            )
        length = len(self.trace_decode_token_ids)
        if self.max_tokens not in (None, DEFAULT_MAX_TOKENS) and self.max_tokens < length:
            raise ValidationError(
                f"trace_decode_token_ids has {length} tokens, which are what is written, and max_tokens="
                f"{self.max_tokens} allows fewer. Leave max_tokens out, or cut the trace."
            )
        if self.min_tokens > length:
            raise ValidationError(
                f"trace_decode_token_ids has {length} tokens, which are what is written, and min_tokens="
                f"{self.min_tokens} asks for more. Leave min_tokens out."
            )
        self.max_tokens, self.min_tokens, self.ignore_eos = length, 0, True

    def _check_distribution(self) -> None:
        for name in ("presence_penalty", "frequency_penalty"):
            value = checks.real(name, getattr(self, name))
            if not -2.0 <= value <= 2.0:
                raise ValidationError(f"{name} must be in [-2, 2], got {value}.")
            setattr(self, name, value)
        self.repetition_penalty = checks.real("repetition_penalty", self.repetition_penalty)
        if self.repetition_penalty <= 0.0:
            raise ValidationError(f"repetition_penalty must be greater than zero, got {self.repetition_penalty}.")
        most = MOST_REPETITION_PENALTY
        if not 1 / most <= self.repetition_penalty <= most:
            raise ValidationError(
                f"repetition_penalty must be from {1 / most:g} to {most:g}, beyond which logits are no numbers of "
                f"float32 any more, got {self.repetition_penalty:g}."
            )
        self.temperature = checks.real("temperature", self.temperature)
        if not 0.0 <= self.temperature <= 2.0:
            raise ValidationError(f"temperature must be in [0, 2], got {self.temperature}.")
        self.top_p = checks.real("top_p", self.top_p)
        if not 0.0 < self.top_p <= 1.0:
            raise ValidationError(f"top_p must be in (0, 1], got {self.top_p}.")
        self.top_k = checks.integer("top_k", self.top_k)
        if self.top_k < -1:
            raise ValidationError(f"top_k must be 0 or -1 (disable), or at least 1, got {self.top_k}.")
        self.top_k = max(self.top_k, 0)
        self.min_p = checks.real("min_p", self.min_p)
        if not 0.0 <= self.min_p <= 1.0:
            raise ValidationError(f"min_p must be in [0, 1], got {self.min_p}.")
        if self.is_greedy:
            if self.n > 1:
                raise ValidationError(
                    f"n must be 1 when using greedy sampling, got {self.n}. Completions differ with a "
                    "temperature above 0, such as 0.8."
                )
            self.temperature, self.top_p, self.top_k, self.min_p = 0.0, 1.0, 0, 0.0
        elif self.temperature < LOWEST_TEMPERATURE:
            logger.warning(
                "temperature %s is below %s, where logits overflow; it is raised to %s. Use temperature=0 for greedy.",
                self.temperature,
                LOWEST_TEMPERATURE,
                LOWEST_TEMPERATURE,
            )
            self.temperature = LOWEST_TEMPERATURE

    def _check_lists(self) -> None:
        self.stop = [] if self.stop is None else checks.strings("stop", self.stop)
        self.bad_words = [] if self.bad_words is None else checks.strings("bad_words", self.bad_words)
        ids = [] if self.stop_token_ids is None else checks.token_ids("stop_token_ids", self.stop_token_ids)
        self.stop_token_ids = list(dict.fromkeys(ids))
        if self.allowed_token_ids is not None:
            self.allowed_token_ids = checks.token_ids("allowed_token_ids", self.allowed_token_ids)
            if not self.allowed_token_ids:
                raise ValidationError("allowed_token_ids must not be empty; leave it None to allow every token.")
        if self.logprob_token_ids is not None:
            self.logprob_token_ids = checks.token_ids("logprob_token_ids", self.logprob_token_ids)
            if len(self.logprob_token_ids) > MAX_LOGPROB_TOKEN_IDS:
                raise ValidationError(
                    f"logprob_token_ids can hold at most {MAX_LOGPROB_TOKEN_IDS} ids, "
                    f"got {len(self.logprob_token_ids)}."
                )
            if self.logprobs is not None and self.logprobs != len(self.logprob_token_ids):
                raise ValidationError(
                    "When both logprobs and logprob_token_ids are set, logprobs must equal len(logprob_token_ids), "
                    f"got logprobs={self.logprobs} and {len(self.logprob_token_ids)} ids. Leave logprobs out: only "
                    "the ids are reported."
                )
        if self.logit_bias is not None:
            self.logit_bias = _checked_bias(self.logit_bias)

    @classmethod
    def from_optional(cls, **fields: Any) -> SamplingParams:
        """Parameters as vLLM makes them of a request's: None stands for the default, but in ``max_tokens``, where it
        is none. Raises what the constructor does.
        """
        given: dict[str, Any] = {k: value for k, value in fields.items() if value is not None or k == "max_tokens"}
        return cls(**given)

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives reported per generated token, by likelihood or by id; -1: the vocabulary; None: no report."""
        if self.logprobs is not None:
            return self.logprobs
        return len(self.logprob_token_ids) if self.logprob_token_ids else None

    @property
    def stop_strings(self) -> list[str]:
        """`stop` as the list that construction made of it."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def has_penalties(self) -> bool:
        """Whether the tokens so far change the logits."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def clone(self) -> SamplingParams:
        """An independent copy, checked again. Raises `ValidationError` when a field was set to a bad value."""
        return dataclasses.replace(
            self,
            extra_args=None if self.extra_args is None else dict(self.extra_args),
        )

    def check_against(self, *, vocab_size: int, max_logprobs: int) -> None:
        """Check what depends on the model and the engine.

        Args:
            vocab_size: number of token ids.
            max_logprobs: the engine's limit for `logprobs`; -1: the vocabulary.

        Raises:
            ValidationError: a token id is outside the vocabulary, or too many logprobs are asked for.
        """
        limit = vocab_size if max_logprobs == -1 else max_logprobs
        for name, what in (("logprobs", "sample"), ("prompt_logprobs", "prompt")):
            count = getattr(self, name)
            if count is None:
                continue
            count = vocab_size if count == -1 else count
            if count > limit:
                raise ValidationError(
                    f"Requested {what} logprobs of {count}, which is greater than max allowed: {limit}. "
                    f"Ask for fewer, or set max_logprobs={count} (-1: the vocabulary) when building the engine."
                )
        for name in (
            "stop_token_ids",
            "allowed_token_ids",
            "logprob_token_ids",
            "logit_bias",
            "trace_decode_token_ids",
        ):
            outside = [i for i in getattr(self, name) or () if i >= vocab_size]
            if outside:
                raise ValidationError(
                    f"{name} contains out-of-vocabulary token ids {outside[:8]}; "
                    f"the vocabulary has {vocab_size} tokens."
                )


_init = SamplingParams.__init__


@functools.wraps(_init)
def _init_without_removed(self: SamplingParams, **kwargs: Any) -> None:
    """Libraries hand on what older versions had, mostly as None."""
    _init(self, **{name: value for name, value in kwargs.items() if name not in _REMOVED})


SamplingParams.__init__ = _init_without_removed
# which `__new__` hides
SamplingParams.__signature__ = inspect.signature(functools.partial(_init, None))  # pyright: ignore
# what vLLM's class, a struct of msgspec's, tells of its fields
SamplingParams.__struct_fields__ = tuple(field.name for field in dataclasses.fields(SamplingParams))


def _from_fields(name: str, kind: type[_Part], value: Any) -> _Part | None:
    """`value`, or what a dict of the fields makes."""
    if not isinstance(value, dict):
        return value
    names = [field.name for field in dataclasses.fields(kind)]  # pyright: ignore[reportArgumentType]
    wrong = next((key for key in value if key not in names), None)
    if wrong is not None:
        raise ValidationError(f"{name} has no field {wrong!r}; its fields are {', '.join(names)}.")
    return kind(**value)


def _checked_bias(bias: Any) -> dict[int, float]:
    if not isinstance(bias, dict):
        raise ValidationError(f"logit_bias must map token ids to numbers, got {bias!r} of type {type(bias).__name__}.")
    checked: dict[int, float] = {}
    for key, value in bias.items():
        # JSON knows only string keys, and logit_bias often comes from JSON.
        if isinstance(key, str) and key.isdecimal():
            key = int(key)
        (token_id,) = checks.token_ids("logit_bias", [key])
        number = checks.real_or_infinite(f"logit_bias[{token_id}]", value)
        checked[token_id] = min(max(number, -LOGIT_BIAS_LIMIT), LOGIT_BIAS_LIMIT)
    return checked
