"""``/v1/responses``: its items become a conversation, and answers become items.

https://platform.openai.com/docs/api-reference/responses; what needs a memory of earlier responses is refused.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from jaxllm.api.outputs import CompletionOutput, RequestOutput
from jaxllm.entrypoints.openai.bodies import ChatBody, ResponsesBody
from jaxllm.entrypoints.openai.errors import APIError
from jaxllm.entrypoints.openai.messages import Message, MessageStream
from jaxllm.entrypoints.openai.parameters import SAMPLING
from jaxllm.entrypoints.openai.requests import Call
from jaxllm.entrypoints.openai.responses import new_id

RESPONSES = "/v1/responses"
_SAME = ("model", "user", "stream", "parallel_tool_calls", "chat_template_kwargs", "structured_outputs", "priority")


def chat_body(body: ResponsesBody) -> ChatBody:
    """Return the chat that a body asks for. Raises APIError for what is no chat."""
    chat: dict[str, Any] = {name: getattr(body, name) for name in (*_SAME, *sorted(SAMPLING), "cache_salt")}
    messages = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
    if isinstance(body.input, str):
        messages.append({"role": "user", "content": body.input})
    else:
        messages += [message for item in body.input if (message := _message(item)) is not None]
    chat |= {"messages": messages, "max_completion_tokens": body.max_output_tokens, "tools": _tools(body.tools)}
    chat["tool_choice"] = body.tool_choice
    if isinstance(body.tool_choice, dict) and "name" in body.tool_choice:
        chat["tool_choice"] = {"type": "function", "function": {"name": body.tool_choice["name"]}}
    if body.tool_choice == "auto" and not body.tools:  # OpenAI's client sends it so
        chat["tool_choice"] = None
    form = (body.text or {}).get("format") or {"type": "text"}
    if isinstance(form, dict) and form.get("type") == "json_schema":
        form = {"type": "json_schema", "json_schema": {name: form.get(name) for name in ("name", "schema")}}
    if form != {"type": "text"}:
        chat["response_format"] = form
    chat["reasoning_effort"] = (body.reasoning or {}).get("effort")
    return ChatBody.read({name: value for name, value in chat.items() if value is not None})


def _message(item: dict[str, Any]) -> dict[str, Any] | None:
    """Return the message that an item stands for; None: it is for nobody."""
    kind = item.get("type", "message")
    if kind == "message":
        content = item.get("content")
        if isinstance(content, list):
            content = [_part(part) for part in content]
        return {"role": item.get("role"), "content": content}
    if kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments") or "{}"}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        return {"role": "assistant", "content": "", "tool_calls": [call]}
    if kind == "function_call_output":
        return {"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")}
    if kind == "reasoning":
        return None
    raise APIError(f"input has an item of type {kind!r:.80}, which is not supported.", param="input")


def _part(part: Any) -> Any:
    if isinstance(part, dict) and part.get("type") in ("input_text", "output_text"):
        return {"type": "text", "text": part.get("text")}
    return part


def _tools(tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    if tools is None:
        return None
    return [
        {"type": "function", "function": {key: value for key, value in tool.items() if key not in ("type", "strict")}}
        if tool.get("type") == "function"
        else tool
        for tool in tools
    ]


class ResponseItems:
    """Makes the items of one answer, and the events of its stream.

    Args:
        call: a chat with one completion.
    """

    def __init__(self, body: ResponsesBody, call: Call):
        self._body, self._call = body, call
        self._id, self._created = f"resp_{new_id()}", int(time.time())
        self._number = 0
        self._items: list[dict[str, Any]] = []
        self._messages: MessageStream | None = None
        self._token_ids: list[int] = []

    def whole(self, output: RequestOutput) -> dict[str, Any]:
        """Return the answer."""
        completion = output.outputs[0]
        message = self._call.dialect.read(completion.text, True, output.prompt)
        self._token_ids = list(completion.token_ids)
        return self._response(output, completion, _items(message, self._call))

    def begin(self) -> Iterator[dict[str, Any]]:
        """Make the events before the first output."""
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self._response(None, None, []))

    def take(self, output: RequestOutput) -> Iterator[dict[str, Any]]:
        """Make the events of what is new; the output has ``output_kind=DELTA``."""
        completion = output.outputs[0]
        self._token_ids += completion.token_ids
        if self._messages is None:
            self._messages = MessageStream(self._call.dialect, output.prompt)
        for delta in self._messages.push(completion.text, completion.finish_reason is not None):
            if "reasoning_content" in delta:
                yield from self._text("reasoning", delta["reasoning_content"])
            if "content" in delta:
                yield from self._text("message", delta["content"])
            for call in delta.get("tool_calls", ()):
                yield from self._arguments(call)
        if completion.finish_reason is not None:
            yield from self._close()
            response = self._response(output, completion, self._items)
            yield self._event(f"response.{response['status']}", response=response)

    def _text(self, kind: str, more: str) -> Iterator[dict[str, Any]]:
        if not self._items or self._items[-1]["type"] != kind or self._items[-1]["status"] != "in_progress":
            yield from self._open(_text_item(kind, ""))
        item = self._items[-1]
        if not item["content"]:
            item["content"].append(_content(kind, ""))
            yield self._event("response.content_part.added", **self._place(part=_content(kind, "")))
        item["content"][0]["text"] += more
        logprobs = {"logprobs": []} if kind == "message" else {}
        yield self._event(f"response.{item['content'][0]['type']}.delta", **self._place(delta=more), **logprobs)

    def _arguments(self, call: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if "id" in call:
            yield from self._open(_call_item(call["id"], call["function"]["name"], ""))
        item = self._items[-1]
        item["arguments"] += call["function"]["arguments"]
        place = {"item_id": item["id"], "output_index": len(self._items) - 1}
        yield self._event("response.function_call_arguments.delta", **place, delta=call["function"]["arguments"])

    def _open(self, item: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from self._close()
        self._items.append({**item, "status": "in_progress"})
        yield self._event("response.output_item.added", output_index=len(self._items) - 1, item=_copy(self._items[-1]))

    def _close(self) -> Iterator[dict[str, Any]]:
        if not self._items or self._items[-1]["status"] != "in_progress":
            return
        item, index = self._items[-1], len(self._items) - 1
        item["status"] = "completed"
        if item["type"] == "function_call":
            told = {"item_id": item["id"], "output_index": index}
            told |= {"name": item["name"], "arguments": item["arguments"]}
            yield self._event("response.function_call_arguments.done", **told)
        else:
            part = item["content"][0]
            logprobs = {"logprobs": []} if item["type"] == "message" else {}
            yield self._event(f"response.{part['type']}.done", **self._place(text=part["text"]), **logprobs)
            yield self._event("response.content_part.done", **self._place(part=dict(part)))
        yield self._event("response.output_item.done", output_index=index, item=_copy(item))

    def _place(self, **more: Any) -> dict[str, Any]:
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1, "content_index": 0, **more}

    def _event(self, kind: str, **more: Any) -> dict[str, Any]:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **more}

    def _response(
        self, output: RequestOutput | None, completion: CompletionOutput | None, items: list[dict[str, Any]]
    ) -> dict[str, Any]:
        body, params = self._body, self._call.params
        status, details, usage = "in_progress", None, None
        if output is not None and completion is not None:
            status = "completed" if completion.finish_reason == "stop" else "incomplete"
            if completion.finish_reason == "length":
                details = {"reason": "max_output_tokens"}
            prompt, generated = len(output.prompt_token_ids), len(self._token_ids)
            reasoning = self._call.dialect.reasoning_tokens(self._token_ids, output.prompt)
            usage = {
                "input_tokens": prompt,
                "input_tokens_details": {"cached_tokens": output.num_cached_tokens, "cache_write_tokens": 0},
                "output_tokens": generated,
                "output_tokens_details": {"reasoning_tokens": reasoning or 0},
                "total_tokens": prompt + generated,
            }
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": details,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self._call.model,
            "output": [_copy(item) for item in items],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": body.reasoning,
            "store": False,
            "temperature": params.temperature if params else None,
            "text": body.text or {"format": {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": params.top_p if params else None,
            "truncation": "disabled",
            "usage": usage,
        }


def _items(message: Message, call: Call) -> list[dict[str, Any]]:
    items = []
    if message.reasoning and call.dialect.tells_reasoning:
        items.append(_text_item("reasoning", message.reasoning))
    if message.content or not message.calls:
        items.append(_text_item("message", message.content))
    items += [_call_item(call.dialect.new_call_id(), one.name, one.arguments) for one in message.calls]
    return items


def _text_item(kind: str, text: str) -> dict[str, Any]:
    content = [_content(kind, text)] if text else []
    if kind == "reasoning":
        return {"id": f"rs_{new_id()}", "type": kind, "summary": [], "content": content, "status": "completed"}
    return {"id": f"msg_{new_id()}", "type": kind, "role": "assistant", "content": content, "status": "completed"}


def _content(kind: str, text: str) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _call_item(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    item = {"id": f"fc_{new_id()}", "type": "function_call", "call_id": call_id, "name": name}
    return {**item, "arguments": arguments, "status": "completed"}


def _copy(item: dict[str, Any]) -> dict[str, Any]:
    return {**item, "content": [dict(part) for part in item["content"]]} if "content" in item else dict(item)
