"""The body of an OpenAI API call becomes prompts and `SamplingParams`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from jaxllm.api import checks
from jaxllm.api.errors import ValidationError
from jaxllm.api.sampling_params import SamplingParams
from jaxllm.entrypoints.openai.errors import APIError
from jaxllm.entrypoints.openai.parameters import SamplingReader, check_names

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
#: in OpenAI's API, where none is given
COMPLETION_MAX_TOKENS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """An API call, translated: what the engine runs, and what the answer has to look like."""

    url: str
    #: as it goes into the answer
    model: str
    #: at least one; the answer needs all of them
    prompts: list[Any]
    #: None for embeddings
    params: SamplingParams | None = None
    #: smaller runs first, with scheduling_policy="priority"
    priority: int = 0
    #: alternatives a token in the answer; None: no log-probabilities
    top_logprobs: int | None = None
    #: the prompt comes back before the completion
    echo: bool = False
    #: the prompt comes back and no completion (max_tokens=0)
    echo_only: bool = False
    return_token_ids: bool = False
    #: log-probabilities name tokens "token_id:7" instead of by their text
    tokens_as_ids: bool = False
    #: embeddings as base64 of float32, little-endian
    base64: bool = False


def translate(
    url: str, body: Any, *, model_names: Sequence[str], sampling: SamplingReader, any_model: bool = False
) -> Call:
    """Return the call to `url` with `body`.

    Args:
        model_names: what this engine's model is called; the first one is told where the body names none.
        any_model: whatever the body calls its model, it is this engine's; the answer says what the body says.
        sampling: knows the sampling parameters of the model.

    Raises APIError for whatever cannot be honoured.
    """
    if url not in _TRANSLATORS:
        raise APIError(f"URL {url!r} was used. Supported endpoints: {', '.join(_TRANSLATORS)}.", param="url")
    if not isinstance(body, Mapping):
        raise APIError(f"The body must be an object, got {body!r:.80}.", param="body")
    model = body.get("model")
    if model is None:
        model = model_names[0]
    elif model not in model_names and not (any_model and isinstance(model, str)):
        raise APIError(f"The model `{model}` does not exist.", status=HTTPStatus.NOT_FOUND, param="model")
    try:
        return _TRANSLATORS[url](body, model, sampling)
    except ValidationError as error:
        raise APIError(str(error)) from error


_OUTPUT_FORM = frozenset(("model", "priority", "return_token_ids", "return_tokens_as_token_ids", "cache_salt"))
_CHAT = _OUTPUT_FORM | frozenset(
    (
        *("messages", "max_tokens", "max_completion_tokens", "logprobs", "top_logprobs", "tools", "tool_choice"),
        *("add_generation_prompt", "continue_final_message", "chat_template", "chat_template_kwargs", "documents"),
        *("reasoning_effort", "parallel_tool_calls"),
    )
)
_CHAT_REFUSED: dict[str, tuple[Any, ...]] = {
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
#: arguments of the rendering itself
_NOT_FOR_TEMPLATES = frozenset(
    (
        *(
            "template",
            "chat_template",
            "conversation",
            "messages",
            "tools",
            "tokenize",
            "return_dict",
            "return_tensors",
        ),
        *("return_tensors", "add_generation_prompt", "continue_final_message", "content_format", "self"),
    )
)
_COMPLETION = _OUTPUT_FORM | frozenset(("prompt", "echo", "logprobs", "max_tokens"))
_COMPLETION_REFUSED: dict[str, tuple[Any, ...]] = {"suffix": ("",), "prompt_embeds": (), "add_special_tokens": (True,)}


def _chat(body: Mapping[str, Any], model: str, sampling: SamplingReader) -> Call:
    check_names(body, _CHAT, _CHAT_REFUSED)
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise APIError(f"messages must be a non-empty list, got {messages!r:.80}.", param="messages")
    if body.get("tool_choice") not in (None, "none"):
        raise APIError(
            f"tool_choice={body['tool_choice']!r:.80} is refused: calls of tools are not parsed yet. Leave it out: the "
            "tools go into the prompt, and a call comes back as text.",
            param="tool_choice",
        )
    max_tokens = body.get("max_completion_tokens")
    if max_tokens is None:
        max_tokens = body.get("max_tokens")
    top = _chat_logprobs(body)
    prompt: dict[str, Any] = {"messages": messages}
    for name in ("tools", "chat_template", "add_generation_prompt", "continue_final_message", "cache_salt"):
        if body.get(name) is not None:
            prompt[name] = body[name]
    if body.get("continue_final_message"):
        if body.get("add_generation_prompt"):
            raise APIError(
                "Cannot set both `continue_final_message` and `add_generation_prompt` to True.",
                param="continue_final_message",
            )
        prompt["add_generation_prompt"] = False
    if options := _template_options(body):
        prompt["chat_template_kwargs"] = options
    return Call(
        url=CHAT,
        model=model,
        prompts=[prompt],
        params=sampling.read(body, max_tokens=max_tokens, logprobs=top),
        top_logprobs=top,
        **_form(body),
    )


def _template_options(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the chat template gets besides the messages."""
    options = _or(body.get("chat_template_kwargs"), {})
    if not isinstance(options, Mapping):
        raise APIError(f"chat_template_kwargs must be an object, got {options!r:.80}.", param="chat_template_kwargs")
    for name in options:
        if name in _NOT_FOR_TEMPLATES:
            raise APIError(
                f"chat_template_kwargs cannot set {name!r}, which has a parameter of its own.",
                param="chat_template_kwargs",
            )
    # as in vLLM, these are for the template
    given = {name: body[name] for name in ("documents", "reasoning_effort") if body.get(name) is not None}
    return {**options, **given}


def _chat_logprobs(body: Mapping[str, Any]) -> int | None:
    """Return how many alternatives a token has; None: there are no log-probabilities."""
    asked = checks.boolean("logprobs", _or(body.get("logprobs"), False))
    top = checks.integer("top_logprobs", _or(body.get("top_logprobs"), 0))
    if top < 0 and top != -1:
        raise APIError(f"`top_logprobs` must be a positive value or -1, got {top}.", param="top_logprobs")
    if top and not asked:
        raise APIError("when using `top_logprobs`, `logprobs` must be set to true.", param="top_logprobs")
    return top if asked else None


def _completion(body: Mapping[str, Any], model: str, sampling: SamplingReader) -> Call:
    check_names(body, _COMPLETION, _COMPLETION_REFUSED)
    prompts = _prompts("prompt", body.get("prompt"))
    echo = checks.boolean("echo", _or(body.get("echo"), False))
    if echo and not all(isinstance(prompt, str) for prompt in prompts):
        raise APIError("echo needs prompts of text.", param="echo")
    top = body.get("logprobs")
    if top is not None:
        top = checks.integer("logprobs", top)
    max_tokens = _or(body.get("max_tokens"), COMPLETION_MAX_TOKENS)
    echo_only = echo and max_tokens == 0
    own = {"prompt_logprobs": top} if echo and top is not None else {}
    params = sampling.read(body, max_tokens=1 if echo_only else max_tokens, logprobs=top, **own)
    salt = body.get("cache_salt")
    if salt is not None:
        prompts = [{**({"prompt": p} if isinstance(p, str) else p), "cache_salt": salt} for p in prompts]
    return Call(
        url=COMPLETIONS,
        model=model,
        prompts=prompts,
        params=params,
        top_logprobs=top,
        echo=echo,
        echo_only=echo_only,
        **_form(body),
    )


def _embedding(body: Mapping[str, Any], model: str, sampling: SamplingReader) -> Call:
    known = ("model", "input", "user", "encoding_format")
    for name, value in body.items():
        if name not in known and value is not None:
            raise APIError(f"The parameter {name!r} is not supported for embeddings: {', '.join(known)}.", param=name)
    encoding = _or(body.get("encoding_format"), "float")
    if encoding not in ("float", "base64"):
        raise APIError(f"encoding_format must be float or base64, got {encoding!r}.", param="encoding_format")
    prompts = _prompts("input", body.get("input"))
    return Call(url=EMBEDDINGS, model=model, prompts=prompts, base64=encoding == "base64")


_TRANSLATORS: dict[str, Callable[[Mapping[str, Any], str, SamplingReader], Call]] = {
    CHAT: _chat,
    COMPLETIONS: _completion,
    EMBEDDINGS: _embedding,
}


def _form(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return what both kinds of completions say of the call itself."""
    names = {"return_token_ids": "return_token_ids", "return_tokens_as_token_ids": "tokens_as_ids"}
    form: dict[str, Any] = {ours: checks.boolean(name, _or(body.get(name), False)) for name, ours in names.items()}
    return form | {"priority": checks.integer("priority", _or(body.get("priority"), 0))}


def _prompts(name: str, value: Any) -> list[Any]:
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
    raise APIError(
        f"{name} must be text, a list of token ids, or a non-empty list of either; got {value!r:.80}.", param=name
    )


def _is_token_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
