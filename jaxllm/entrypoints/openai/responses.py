"""What the engine returned becomes the body of OpenAI's answer."""

from __future__ import annotations

import base64
import random
import struct
import time
from collections.abc import Iterable, Sequence
from typing import Any

from jaxllm.api.outputs import CompletionOutput, RequestOutput
from jaxllm.entrypoints.openai.errors import APIError
from jaxllm.entrypoints.openai.logprobs import chat_logprobs, completion_logprobs, first_text, raw_logprobs
from jaxllm.entrypoints.openai.messages import whole_message
from jaxllm.entrypoints.openai.requests import CHAT, COMPLETIONS, EMBEDDINGS, Call


def response_body(call: Call, outputs: Sequence[Any]) -> dict[str, Any]:
    """Return the answer to `call`.

    Args:
        outputs: one for each of the call's prompts, in their order: `RequestOutput`, or what `LLM.embed` returns.

    Raises APIError when one of them was refused by the engine.
    """
    for position, output in enumerate(outputs):
        if getattr(output, "error", None) is not None:
            where = f"prompt {position}: " if len(outputs) > 1 else ""
            raise APIError(f"{where}{output.error}")
    if call.url == EMBEDDINGS:
        return _embeddings(call, outputs)
    choice = _chat_choice if call.url == CHAT else completion_choice
    per_prompt = max(len(output.outputs) for output in outputs)
    choices = [
        choice(call, output, completion) | {"index": position * per_prompt + completion.index}
        for position, output in enumerate(outputs)
        for completion in output.outputs
    ]
    body = {**head(call), "choices": choices, "usage": call_usage(call, outputs)}
    if call.url == CHAT:
        # in completions each choice has its own
        if call.return_token_ids:
            body["prompt_token_ids"] = outputs[0].prompt_token_ids
        if outputs[0].prompt_logprobs is not None:
            body["prompt_logprobs"] = raw_logprobs(outputs[0].prompt_logprobs)
    return body


def new_id() -> str:
    """Return 128 random bits, as 32 hexadecimal digits."""
    return f"{random.getrandbits(128):032x}"


_KINDS = {CHAT: ("chatcmpl", "chat.completion"), COMPLETIONS: ("cmpl", "text_completion"), EMBEDDINGS: ("embd", "list")}


def head(call: Call) -> dict[str, Any]:
    """Return how the answer begins."""
    prefix, kind = _KINDS[call.url]
    return {
        "id": f"{prefix}-{call.request_id or new_id()}",
        "object": kind,
        "created": int(time.time()),
        "model": call.model,
    }


def _chat_choice(call: Call, output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
    logprobs = None
    if call.top_logprobs is not None:
        logprobs = chat_logprobs(
            completion.token_ids, completion.logprobs or (), call.top_logprobs, as_ids=call.tokens_as_ids
        )
    told, message = whole_message(completion.text, output.prompt, call.dialect)
    choice: dict[str, Any] = {
        "index": completion.index,
        "message": told,
        "logprobs": logprobs,
        "finish_reason": call.dialect.finish_reason(completion.finish_reason, message),
        "stop_reason": completion.stop_reason,
    }
    if call.return_token_ids:
        choice["token_ids"] = list(completion.token_ids)
    return choice


def completion_choice(
    call: Call, output: RequestOutput, completion: CompletionOutput, offset: int = 0
) -> dict[str, Any]:
    token_ids = [] if call.echo_only else list(completion.token_ids)
    positions: list[Any] = [] if call.echo_only else list(completion.logprobs or ())
    text = "" if call.echo_only else completion.text
    if call.echo:
        text = (output.prompt or "") + text
        token_ids = [*output.prompt_token_ids, *token_ids]
        positions = [*(output.prompt_logprobs or ()), *positions]
    logprobs = None
    if call.top_logprobs is not None:
        first = (
            first_text(output.prompt, output.prompt_token_ids, output.prompt_logprobs)
            if (call.echo and output.prompt_logprobs)
            else ""
        )
        logprobs = completion_logprobs(token_ids, positions, as_ids=call.tokens_as_ids, first=first, offset=offset)
    choice: dict[str, Any] = {
        "index": completion.index,
        "text": text,
        "logprobs": logprobs,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }
    if output.prompt_logprobs is not None:
        choice["prompt_logprobs"] = raw_logprobs(output.prompt_logprobs)
    if call.return_token_ids:
        choice["token_ids"] = list(completion.token_ids)
        choice["prompt_token_ids"] = output.prompt_token_ids
    return choice


def call_usage(call: Call, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    answers = [] if call.echo_only else [(output, one) for output in outputs for one in output.outputs]
    reasoning = [call.dialect.reasoning_tokens(one.token_ids, output.prompt) for output, one in answers]
    return usage(
        prompt=sum(len(output.prompt_token_ids) for output in outputs),
        completion=sum(len(one.token_ids) for _, one in answers),
        cached=sum(output.num_cached_tokens for output in outputs),
        reasoning=added(reasoning),
    )


def added(reasoning: Iterable[int | None]) -> int | None:
    """Return the sum; None where nobody tells reasoning from the rest."""
    known = [count for count in reasoning if count is not None]
    return sum(known) if known else None


def usage(*, prompt: int, completion: int, cached: int, reasoning: int | None = None) -> dict[str, Any]:
    """Return what a call took, in tokens: prompts, what the prefix cache had of them, answers, and what of these was
    reasoning (None: nobody knows).
    """
    details = {} if reasoning is None else {"completion_tokens_details": {"reasoning_tokens": reasoning}}
    return {
        "prompt_tokens": prompt,
        "total_tokens": prompt + completion,
        "completion_tokens": completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        **details,
    }


def _embeddings(call: Call, outputs: Sequence[Any]) -> dict[str, Any]:
    data = []
    for position, output in enumerate(outputs):
        vector: Any = [float(value) for value in output.outputs.embedding]
        if call.base64:
            vector = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
        data.append({"index": position, "object": "embedding", "embedding": vector})
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    return {
        **head(call),
        "data": data,
        "usage": {"prompt_tokens": prompt, "total_tokens": prompt, "completion_tokens": 0},
    }
