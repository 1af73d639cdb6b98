"""The bodies of API calls: OpenAI's parameters, and vLLM's beside them. The server and batches read the same ones.

A body says what it is: whatever is not a field is refused by name, as is what asks for something that is not there.
Values of another type are refused and not converted. What a number may be is `SamplingParams`' to say.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)

from jaxllm.api.constraints import nested_beyond
from jaxllm.entrypoints.openai.errors import APIError

#: of objects and arrays inside each other; templates and others that read them call themselves for each
MAX_LEVELS = 128
#: characters: every piece of a streamed answer has them
MAX_REQUEST_ID = 256
Object = dict[str, Any]
Read = TypeVar("Read", bound="Body")


def _prompts(value: Any, info: ValidationInfo) -> list[Any]:
    """Return text, token ids, or a list of either, as a list of prompts."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(_is_token_id(item) for item in value):
            return [{"prompt_token_ids": value}]
        if all(isinstance(item, str) for item in value):
            return list(value)
        if all(isinstance(item, list) and item and all(map(_is_token_id, item)) for item in value):
            return [{"prompt_token_ids": item} for item in value]
    name = info.field_name
    raise APIError(
        f"{name} must be text, a list of token ids, or a non-empty list of either; got {value!r:.80}", param=name
    )


def _is_token_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_IDS = {"type": "array", "items": {"type": "integer"}, "minItems": 1}
_TEXTS = {"type": "array", "items": {"type": "string"}, "minItems": 1}
#: what the engine takes, from text, token ids, or several of either
Prompts = Annotated[
    list[Any],
    BeforeValidator(_prompts),
    WithJsonSchema({"anyOf": [{"type": "string"}, _TEXTS, _IDS, {"type": "array", "items": _IDS, "minItems": 1}]}),
]


class Body(BaseModel):
    """A body's parameters; None stands for one that is not given, or is JSON's null."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    #: parameter -> values that ask for nothing; others are refused
    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    model: str | None = None
    #: the caller's own note, which no answer depends on
    user: str | None = None

    @classmethod
    def read(cls: type[Read], body: Any) -> Read:
        """Return the body. Raises APIError for what is none."""
        if not isinstance(body, Mapping):
            raise APIError(f"The body must be an object, got {body!r:.80}.", param="body")
        try:
            return cls.model_validate(body)
        except ValidationError as error:
            raise refusal(error.errors(include_url=False, include_context=False)) from None

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, body: Any) -> Any:
        if not isinstance(body, Mapping):
            return body
        if nested_beyond(dict(body), MAX_LEVELS):
            raise APIError(f"The body is nested too deeply: objects and arrays may nest at most {MAX_LEVELS} levels.")
        kept = {}
        for name, value in body.items():
            if name in cls.refused:
                if value is not None and value not in cls.refused[name]:
                    raise APIError(f"{name}={value!r:.80} is refused: it is not supported yet.", param=name)
            elif name in cls.model_fields:
                kept[name] = value
            else:
                known = sorted(cls.model_fields.keys() | cls.refused.keys())
                close = difflib.get_close_matches(str(name), known, n=1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                if str(name).startswith("guided_"):
                    # names that vLLM had, which are in many scripts
                    hint = f" structured_outputs={{{str(name).removeprefix('guided_')!r:.80}: ...}} takes its place."
                raise APIError(f"The parameter {name!r:.80} does not exist.{hint}", param=str(name))
        return kept


def refusal(errors: Sequence[Mapping[str, Any]]) -> APIError:
    """Return what pydantic found wrong with a body as the refusal of one parameter.

    Args:
        errors: as `pydantic.ValidationError.errors` gives them; places begin at the body.
    """
    error = errors[0]
    place = [str(part) for part in error["loc"]]
    if not place:
        return APIError(f"The body must be an object, got {error['input']!r:.80}.", param="body")
    name = place[0]
    if error["type"] == "missing":
        return APIError(f"The parameter {name!r} is required.", param=name)
    if len({each["loc"][:1] for each in errors}) == 1 and len(errors) > 1:
        # one that may have several types has none of them, and an error for each
        expected = " or ".join(dict.fromkeys(str(each["msg"]).removeprefix("Input should be ") for each in errors))
        return APIError(f"{name} should be {expected}; got {error['input']!r:.80}.", param=name)
    told = str(error["msg"])
    told = told.replace("Input", name, 1) if told.startswith("Input") else f"{name}: {told}"
    return APIError(f"{told}; got {error['input']!r:.80}.", param=name)


class SamplingFields(BaseModel):
    """What `SamplingParams` has under the same name."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    prompt_logprobs: int | None = None
    thinking_token_budget: int | None = None


class StreamOptions(BaseModel):
    """What a stream tells besides its pieces."""

    model_config = ConfigDict(extra="ignore", strict=True)

    #: a last piece has the usage
    include_usage: bool = False
    #: every piece has it
    continuous_usage_stats: bool = False


_REFUSED: dict[str, tuple[Any, ...]] = {
    "service_tier": ("auto", "default"),
    "best_of": (1,),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "truncate_prompt_tokens": (),
    "kv_transfer_params": (),
    "logits_processors": (),
}


class GenerationBody(SamplingFields, Body):
    """What completions of both kinds take."""

    max_tokens: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: Object | None = None
    structured_outputs: Object | None = None
    repetition_detection: Object | None = None
    #: vLLM's name for what logits processors read
    vllm_xargs: Object | None = None
    priority: int = 0
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    cache_salt: str | None = None
    #: labels, as `user`
    metadata: Object | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    #: the end of the answer's id
    request_id: str | None = Field(default=None, max_length=MAX_REQUEST_ID)
    store: bool | None = None

    @model_validator(mode="after")
    def _check_stream(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise APIError("Stream options can only be defined when `stream=True`.", param="stream_options")
        return self


class ConversationFields(BaseModel):
    """How a conversation is written as a prompt."""

    tools: list[Object] | None = None
    tool_choice: str | Object | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: Object | None = None
    documents: list[Object] | None = None
    reasoning_effort: str | None = None
    #: how pictures are prepared
    mm_processor_kwargs: Object | None = None
    cache_salt: str | None = None


class ChatBody(ConversationFields, GenerationBody):
    """``/v1/chat/completions``."""

    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **_REFUSED,
        "echo": (False,),
        "add_special_tokens": (False,),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "web_search_options": (),
        "functions": (),
        "function_call": ("none",),
        "verbosity": ("medium",),
        "moderation": (),
        "prompt_cache_options": (),
        "prompt_cache_retention": (),
    }

    messages: list[Object] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    parallel_tool_calls: bool | None = None
    #: whether the reasoning comes back; it is thought in any case
    include_reasoning: bool | None = None


class CompletionBody(GenerationBody):
    """``/v1/completions``."""

    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **_REFUSED,
        "suffix": ("",),
        "prompt_embeds": (),
        "add_special_tokens": (True,),
    }

    prompt: Prompts
    echo: bool | None = None
    logprobs: int | None = None


class PoolingFields(Body):
    """What all calls that pool prompts take."""

    dimensions: int | None = None
    #: normalise an embedding; make probabilities of scores
    use_activation: bool | None = None
    #: an older name of it, of embeddings
    normalize: bool | None = None
    truncate_prompt_tokens: int | None = None
    priority: int = 0


class EmbeddingBody(PoolingFields):
    """``/v1/embeddings``."""

    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None


class PoolingBody(EmbeddingBody):
    """``/pooling``."""

    #: embed, classify, token_embed or token_classify; None: what the model does
    task: str | None = None


class ClassifyBody(PoolingFields):
    """``/classify``."""

    input: Prompts


class ScoreBody(PoolingFields):
    """``/score``. Texts of one side and of the other are 1:1, 1:N or N:N."""

    text_1: str | list[str]
    text_2: str | list[str]


class RerankBody(PoolingFields):
    """``/v1/rerank``."""

    query: str
    documents: list[str] = Field(min_length=1)
    #: of the best documents; None: all
    top_n: int | None = Field(default=None, ge=0)


class TokenizeBody(ConversationFields, Body):
    """``/tokenize``: a text, or a conversation."""

    prompt: str | None = None
    messages: list[Object] | None = Field(default=None, min_length=1)
    #: None: yes, except where a chat template has written them
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _check_one(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise APIError("Give prompt or messages, one of them.", param="prompt")
        return self


class LoadAdapterBody(Body):
    """``/v1/load_lora_adapter``."""

    lora_name: str = Field(min_length=1)
    lora_path: str = Field(min_length=1)
    #: replace what has the name
    load_inplace: bool | None = None


class UnloadAdapterBody(Body):
    """``/v1/unload_lora_adapter``."""

    lora_name: str = Field(min_length=1)
    #: nobody else's than that of the name
    lora_int_id: int | None = None


class DetokenizeBody(Body):
    """``/detokenize``."""

    tokens: list[int]


#: of objects in a body of ``/v1/responses``: their parameters, and those values that ask for nothing; None: any is read
_INNER: dict[str, dict[str, tuple[Any, ...] | None]] = {
    "stream_options": {"include_obfuscation": (False,)},
    "text": {"format": None, "verbosity": ("medium",)},
    "reasoning": {"effort": None, "summary": (), "generate_summary": ()},
}


class ResponsesBody(SamplingFields, Body):
    """``/v1/responses``, as far as it needs no memory of earlier ones."""

    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "previous_response_id": (),
        "conversation": (),
        "background": (False,),
        "prompt": (),
        "max_tool_calls": (),
        "service_tier": ("auto", "default"),
        "truncation": ("disabled",),
        "include": ([],),
        "n": (1,),
        "prompt_logprobs": (),
        "moderation": (),
        "context_management": (),
        "prompt_cache_options": (),
        "prompt_cache_retention": (),
    }

    input: str | list[Object]
    instructions: str | None = None
    max_output_tokens: int | None = None
    stream: bool | None = None
    stream_options: Object | None = None
    text: Object | None = None
    reasoning: Object | None = None
    tools: list[Object] | None = None
    tool_choice: str | Object | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: Object | None = None
    structured_outputs: Object | None = None
    priority: int = 0
    cache_salt: str | None = None
    #: labels, as `user`; nothing is kept
    store: bool | None = None
    metadata: Object | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="after")
    def _check_inner(self) -> ResponsesBody:
        if self.stream_options is not None and not self.stream:
            raise APIError("Stream options can only be defined when `stream=True`.", param="stream_options")
        for name, known in _INNER.items():
            for key, value in (getattr(self, name) or {}).items():
                if key not in known or (known[key] is not None and value is not None and value not in known[key]):
                    raise APIError(f"{name}.{key:.80}={value!r:.80} is refused: it is not supported yet.", param=name)
        return self
