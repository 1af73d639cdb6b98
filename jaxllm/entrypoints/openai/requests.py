"""The body of an OpenAI API call becomes prompts and `SamplingParams`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from jaxllm.api.constraints import StructuredOutputsParams
from jaxllm.api.errors import ValidationError
from jaxllm.api.lora_request import LoRARequest
from jaxllm.api.pooling_params import PoolingParams
from jaxllm.api.sampling_params import RequestOutputKind, SamplingParams
from jaxllm.entrypoints.openai.adapters import NamedAdapters
from jaxllm.entrypoints.openai.bodies import (
    Body,
    ChatBody,
    CompletionBody,
    ConversationFields,
    EmbeddingBody,
    GenerationBody,
    PoolingFields,
)
from jaxllm.entrypoints.openai.errors import APIError
from jaxllm.entrypoints.openai.messages import Dialect
from jaxllm.entrypoints.openai.parameters import SamplingReader
from jaxllm.entrypoints.openai.reasoning import ReasoningParser
from jaxllm.entrypoints.openai.tools import forced
from jaxllm.entrypoints.openai.tools.calls import ToolParser

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
#: in OpenAI's API, where none is given
COMPLETION_MAX_TOKENS = 16
BODIES: dict[str, type[Body]] = {CHAT: ChatBody, COMPLETIONS: CompletionBody, EMBEDDINGS: EmbeddingBody}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """An API call, translated: what the engine runs, and what the answer has to look like."""

    url: str
    #: as it goes into the answer
    model: str
    #: at least one; the answer needs all of them
    prompts: list[Any]
    #: of a call that generates
    params: SamplingParams | None = None
    #: of a call that pools
    pooling: PoolingParams | None = None
    #: what the prompts go through the model with; None: the model alone
    lora_request: LoRARequest | None = None
    #: smaller runs first, with scheduling_policy="priority"
    priority: int = 0
    #: what the answer's id ends with; None: it is drawn
    request_id: str | None = None
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
    #: how the texts of a chat are read
    dialect: Dialect = dataclasses.field(default_factory=Dialect)
    #: the answer comes in pieces
    stream: bool = False
    #: of a stream: a last piece has the usage; and every piece
    include_usage: bool = False
    usage_in_all: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Translator:
    """Makes calls of bodies, for one model.

    Args:
        model_names: what this engine's model is called; the first one is told where the body names none.
        sampling: knows the sampling parameters of the model.
        adapters: what else a body may name as its model.
        any_model: whatever the body calls its model, it is this engine's; the answer says what the body says.
        tools: reads calls of tools that the model makes of its own accord; None: they are text.
        reasoning: tells reasoning from the answer; None: nobody does.
        streams: whether an answer can come in pieces.
        trusts_templates: whether a body may bring a chat template of its own.
        template_files: whether such a template may be a file.
        template_options: what chat templates get where a body says nothing.
    """

    model_names: Sequence[str]
    sampling: SamplingReader
    adapters: NamedAdapters = dataclasses.field(default_factory=lambda: NamedAdapters(None, ()))
    any_model: bool = False
    tools: ToolParser | None = None
    reasoning: ReasoningParser | None = None
    streams: bool = False
    trusts_templates: bool = True
    template_files: bool = True
    template_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def translate(self, url: str, body: Any) -> Call:
        """Return the call to `url` with `body`, one of its model or what JSON says. Raises APIError for whatever cannot
        be honoured.
        """
        if url not in BODIES:
            raise APIError(f"URL {url!r} was used. Supported endpoints: {', '.join(BODIES)}.", param="url")
        if not isinstance(body, Body):
            body = BODIES[url].read(body)
        model, lora_request = self.model_name(body), self.adapters.get(body.model)
        try:
            if isinstance(body, ChatBody):
                call = self._chat(body, model)
            elif isinstance(body, CompletionBody):
                call = self._completion(body, model)
            else:
                assert isinstance(body, EmbeddingBody)
                call = embedding_call(body, model)
            return dataclasses.replace(call, lora_request=lora_request)
        except ValidationError as error:
            raise APIError(str(error)) from error

    def model_name(self, body: Body) -> str:
        """Return what the answer calls the model. Raises APIError when the body means another one."""
        if body.model is None:
            return self.model_names[0]
        known = body.model in self.model_names or self.adapters.get(body.model) is not None
        if not known and not self.any_model:
            raise APIError(f"The model `{body.model}` does not exist.", status=HTTPStatus.NOT_FOUND, param="model")
        return body.model

    def _chat(self, body: ChatBody, model: str) -> Call:
        top = _chat_logprobs(body)
        dialect = self._dialect(body)
        max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        own: dict[str, Any] = {"logprobs": top, **self._kind(body), **_forced(body, dialect)}
        if dialect.tools is not None and dialect.tools.special and body.skip_special_tokens is None:
            own["skip_special_tokens"] = False
        return Call(
            url=CHAT,
            model=model,
            prompts=[self.chat_prompt(body.messages, body)],
            params=self.sampling.read(body, max_tokens=max_tokens, **own),
            top_logprobs=top,
            dialect=dialect,
            **self._form(body),
        )

    def chat_prompt(self, messages: Sequence[dict[str, Any]], body: ConversationFields) -> dict[str, Any]:
        """Return a conversation as a prompt. Raises APIError for one that cannot be written as the body says."""
        prompt: dict[str, Any] = {"messages": [_message(message) for message in messages]}
        if body.tool_choice != "none" and body.tools:
            prompt["tools"] = body.tools
        if body.chat_template is not None:
            prompt["chat_template"] = self._template(body.chat_template)
        for name in ("add_generation_prompt", "continue_final_message", "cache_salt", "mm_processor_kwargs"):
            if getattr(body, name) is not None:
                prompt[name] = getattr(body, name)
        if body.continue_final_message:
            if body.add_generation_prompt:
                raise APIError(
                    "Cannot set both `continue_final_message` and `add_generation_prompt` to True.",
                    param="continue_final_message",
                )
            prompt["add_generation_prompt"] = False
        if options := {**self.template_options, **_template_options(body)}:
            prompt["chat_template_kwargs"] = options
        return prompt

    def _template(self, template: str) -> str:
        if not self.trusts_templates:
            raise APIError(
                "Chat template is passed with request, but this server does not take one: start it with "
                "--trust-request-chat-template.",
                param="chat_template",
            )
        if not self.template_files and "{" not in template:
            raise APIError("chat_template must be a Jinja template, which holds a '{'.", param="chat_template")
        return template

    def _dialect(self, body: ChatBody) -> Dialect:
        tells = body.include_reasoning is not False
        plain = Dialect(reasoning=self.reasoning, tells_reasoning=tells)
        choice = body.tool_choice
        if choice == "none" or (choice is None and not body.tools):
            return plain
        if not body.tools:
            raise APIError("When using `tool_choice`, `tools` must be set.", param="tool_choice")
        schemas = _schemas(body.tools)
        if choice in (None, "auto"):
            if self.tools is None:
                if choice == "auto":
                    raise APIError(
                        "tool_choice='auto' needs to know how the model writes calls: --tool-call-parser NAME says so. "
                        "Leave it out: the tools go into the prompt, where the chat template writes them, and a "
                        "call comes back as text.",
                        param="tool_choice",
                    )
                return plain
            several = body.parallel_tool_calls is not False
            return dataclasses.replace(plain, tools=self.tools, schemas=schemas, several=several)
        if choice == "required":
            return dataclasses.replace(plain, tools=forced.REQUIRED, schemas=schemas)
        function = choice.get("function") if isinstance(choice, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or name not in schemas:
            raise APIError(
                f"tool_choice={choice!r:.80} is none of 'none', 'auto', 'required' and "
                f"{{'type': 'function', 'function': {{'name': ...}}}} with one of {', '.join(schemas)}.",
                param="tool_choice",
            )
        return dataclasses.replace(plain, tools=forced.named(name), schemas=schemas, finishes_with_calls=False)

    def _completion(self, body: CompletionBody, model: str) -> Call:
        prompts = body.prompt
        echo = bool(body.echo)
        if echo and not all(isinstance(prompt, str) for prompt in prompts):
            raise APIError("echo needs prompts of text.", param="echo")
        max_tokens = COMPLETION_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        echo_only = echo and max_tokens == 0
        own = self._kind(body)
        if echo and body.logprobs is not None:
            own["prompt_logprobs"] = body.logprobs
        if body.cache_salt is not None:
            prompts = [{**({"prompt": p} if isinstance(p, str) else p), "cache_salt": body.cache_salt} for p in prompts]
        return Call(
            url=COMPLETIONS,
            model=model,
            prompts=prompts,
            params=self.sampling.read(body, max_tokens=1 if echo_only else max_tokens, logprobs=body.logprobs, **own),
            top_logprobs=body.logprobs,
            echo=echo,
            echo_only=echo_only,
            **self._form(body),
        )

    def _kind(self, body: GenerationBody) -> dict[str, Any]:
        """Return which outputs the engine gives, where it can be asked for pieces."""
        if not self.streams:
            return {}
        return {"output_kind": RequestOutputKind.DELTA if body.stream else RequestOutputKind.FINAL_ONLY}

    def _form(self, body: GenerationBody) -> dict[str, Any]:
        """Return what both kinds of completions say of the call itself."""
        if body.stream and not self.streams:
            raise APIError("stream=True is refused: a batch is not streamed.", param="stream")
        options = body.stream_options
        return {
            "return_token_ids": bool(body.return_token_ids),
            "tokens_as_ids": bool(body.return_tokens_as_token_ids),
            "priority": body.priority,
            "request_id": body.request_id,
            "stream": bool(body.stream),
            "include_usage": options is not None and options.include_usage,
            "usage_in_all": options is not None and options.continuous_usage_stats,
        }


def embedding_call(body: EmbeddingBody, model: str) -> Call:
    """Return the call for embeddings."""
    return Call(
        url=EMBEDDINGS,
        model=model,
        prompts=body.input,
        pooling=pooling_params(body),
        priority=body.priority,
        base64=body.encoding_format == "base64",
    )


def pooling_params(body: PoolingFields) -> PoolingParams:
    """Return what a body asks of the pooled result. Raises ValidationError for a value out of range."""
    return PoolingParams(
        dimensions=body.dimensions,
        use_activation=body.use_activation,
        normalize=body.normalize,
        truncate_prompt_tokens=body.truncate_prompt_tokens,
    )


#: arguments of the rendering itself
NOT_FOR_TEMPLATES = frozenset(
    (
        *("template", "chat_template", "conversation", "messages", "tools", "tokenize", "return_dict"),
        *("return_tensors", "add_generation_prompt", "continue_final_message", "content_format", "self"),
    )
)


def _template_options(body: ConversationFields) -> dict[str, Any]:
    """Return what the chat template gets besides the messages."""
    options = body.chat_template_kwargs or {}
    for name in options:
        if name in NOT_FOR_TEMPLATES:
            raise APIError(
                f"chat_template_kwargs cannot set {name!r}, which has a parameter of its own.",
                param="chat_template_kwargs",
            )
    # as in vLLM, these are for the template
    given = {name: getattr(body, name) for name in ("documents", "reasoning_effort") if getattr(body, name) is not None}
    return {**options, **given}


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with the arguments of its calls as an object: clients send text, and templates write JSON."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return {**message, "tool_calls": [_call(call) for call in calls]}


def _call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        raise APIError(
            f"messages: the arguments of a tool call are not JSON: {function['arguments']!r:.80}", param="messages"
        ) from None
    return {**call, "function": {**function, "arguments": arguments}}


def _schemas(tools: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return the schemas of the tools' arguments by their names."""
    schemas: dict[str, Mapping[str, Any]] = {}
    for tool in tools:
        function = tool.get("function")
        if tool.get("type", "function") != "function" or not isinstance(function, Mapping):
            raise APIError(
                f"tools: a tool is {{'type': 'function', 'function': {{'name': ...}}}}, got {tool!r:.80}", param="tools"
            )
        name, schema = function.get("name"), function.get("parameters") or {}
        if not isinstance(name, str) or not isinstance(schema, Mapping):
            raise APIError(
                f"tools: a function has a name, and parameters that are a JSON schema; got {function!r:.80}",
                param="tools",
            )
        schemas[name] = schema
    return schemas


def _forced(body: ChatBody, dialect: Dialect) -> dict[str, Any]:
    """Return the sampling parameters that make the model call a tool."""
    if dialect.tools is None or body.tool_choice in (None, "auto"):
        return {}
    if body.structured_outputs is not None or (body.response_format or {}).get("type", "text") != "text":
        raise APIError(
            "tool_choice makes the answer a call: leave out response_format and structured_outputs.",
            param="tool_choice",
        )
    if isinstance(body.tool_choice, Mapping):
        schema = forced.named_schema(dialect.schemas, body.tool_choice["function"]["name"])
    else:
        schema = forced.required_schema(dialect.schemas, several=body.parallel_tool_calls is not False)
    return {"structured_outputs": StructuredOutputsParams(json=schema)}


def _chat_logprobs(body: ChatBody) -> int | None:
    """Return how many alternatives a token has; None: there are no log-probabilities."""
    top = body.top_logprobs or 0
    if top < 0 and top != -1:
        raise APIError(f"`top_logprobs` must be a positive value or -1, got {top}.", param="top_logprobs")
    if top and not body.logprobs:
        raise APIError("when using `top_logprobs`, `logprobs` must be set to true.", param="top_logprobs")
    return top if body.logprobs else None
