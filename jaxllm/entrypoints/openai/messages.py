"""An answer's text becomes a message: reasoning, content and calls of tools."""

from __future__ import annotations

import dataclasses
import secrets
import string
from collections.abc import Sequence
from typing import Any, Literal

from jaxllm.entrypoints.openai.reasoning import ReasoningParser
from jaxllm.entrypoints.openai.tools.calls import Schemas, ToolCall, ToolParser

_LETTERS = string.ascii_letters + string.digits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dialect:
    """How the texts of one call are read."""

    #: None: calls of tools stay text
    tools: ToolParser | None = None
    schemas: Schemas = dataclasses.field(default_factory=dict)
    #: whether there may be more calls than one; all but the first are dropped otherwise
    several: bool = True
    #: None: reasoning is part of the content
    reasoning: ReasoningParser | None = None
    #: whether the reasoning comes back
    tells_reasoning: bool = True
    #: whether an answer of calls ends with "tool_calls"; that of a tool that was named ends as its text does
    finishes_with_calls: bool = True

    @property
    def is_plain(self) -> bool:
        """Whether a text is its content."""
        return self.tools is None and self.reasoning is None

    def read(self, text: str, done: bool, prompt: str | None) -> Message:
        """Return what is certain of an answer so far.

        Args:
            done: whether the text is all.
            prompt: what it answers.
        """
        reasoning = ""
        if self.reasoning is not None:
            reasoning, text, until = self.reasoning.split(text, done, self.reasoning.begins_inside(prompt))
            if not text:
                return Message(reasoning, "", (), until, "reasoning")
        if self.tools is None:
            return Message(reasoning, text, (), "", "content")
        parsed = self.tools.parse(text, done, self.schemas)
        calls = parsed.calls if self.several else parsed.calls[:1]
        return Message(reasoning, parsed.content, tuple(calls), parsed.until, "content" if parsed.goes_on else None)

    def reasoning_tokens(self, token_ids: Sequence[int], prompt: str | None) -> int | None:
        """Return how many tokens of an answer are its reasoning; None: nobody tells it from the rest."""
        if self.reasoning is None:
            return None
        return self.reasoning.count(list(token_ids), self.reasoning.begins_inside(prompt))

    def new_call_id(self) -> str:
        """Return an id for a call of a tool."""
        length = self.tools.id_length if self.tools else None
        if length is not None:
            return "".join(secrets.choice(_LETTERS) for _ in range(length))
        return f"chatcmpl-tool-{secrets.token_hex(16)}"

    def finish_reason(self, finish_reason: str | None, message: Message) -> str | None:
        """Return the reason in OpenAI's words."""
        if message.calls and finish_reason == "stop" and self.finishes_with_calls:
            return "tool_calls"
        return finish_reason


@dataclasses.dataclass(frozen=True, slots=True)
class Message:
    """An answer's parts."""

    reasoning: str
    content: str
    calls: tuple[ToolCall, ...]
    #: characters without which more text changes nothing but one part, which goes on with it; None: any may
    until: str | None = None
    #: that part; None: none does
    part: Literal["reasoning", "content"] | None = None


def whole_message(text: str, prompt: str | None, dialect: Dialect) -> tuple[dict[str, Any], Message]:
    """Return OpenAI's message of an answer, and its parts."""
    message = dialect.read(text, True, prompt)
    content = message.content if message.content.strip() or not message.calls else None
    told: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if dialect.reasoning is not None and dialect.tells_reasoning:
        told["reasoning_content"] = message.reasoning or None
    if message.calls:
        told["tool_calls"] = [
            {"id": dialect.new_call_id(), "type": "function", "function": dataclasses.asdict(call)}
            for call in message.calls
        ]
    return told, message


class MessageStream:
    """Tells an answer piece by piece: what is certain of it and was not before."""

    def __init__(self, dialect: Dialect, prompt: str | None):
        self._dialect, self._prompt = dialect, prompt
        self._text = ""
        #: pieces since the text was read, none of which changed what was read
        self._since: list[str] = []
        #: characters that were told
        self._told = {"reasoning": 0, "content": 0}
        self.message = Message("", "", ())

    def push(self, text: str, done: bool) -> list[dict[str, Any]]:
        """Return the deltas that `text`, the next piece of the answer, makes certain."""
        if self._dialect.is_plain:
            return [{"content": text}] if text else []
        self._since.append(text)
        until, part = self.message.until, self.message.part
        # reading all of a long text for each of its pieces would take longer and longer
        if not done and until is not None and not any(character in text for character in until):
            return [] if part is None else self._more(part, text)
        self._text += "".join(self._since)
        self._since = []
        before, now = self.message, self._dialect.read(self._text, done, self._prompt)
        self.message = now
        deltas = self._more("reasoning", now.reasoning[self._told["reasoning"] :])
        deltas += self._more("content", now.content[self._told["content"] :])
        calls = [self._call(before, index, call) for index, call in enumerate(now.calls)]
        if calls := [call for call in calls if call is not None]:
            deltas.append({"tool_calls": calls})
        return deltas

    def _more(self, part: Literal["reasoning", "content"], text: str) -> list[dict[str, Any]]:
        self._told[part] += len(text)
        if not text or (part == "reasoning" and not self._dialect.tells_reasoning):
            return []
        return [{"content" if part == "content" else "reasoning_content": text}]

    def _call(self, before: Message, index: int, call: ToolCall) -> dict[str, Any] | None:
        if index >= len(before.calls):
            function = {"name": call.name, "arguments": call.arguments}
            return {"index": index, "id": self._dialect.new_call_id(), "type": "function", "function": function}
        more = call.arguments[len(before.calls[index].arguments) :]
        return {"index": index, "function": {"arguments": more}} if more else None
