"""Hermes' form, which Qwen 2.5 and 3 have as well: JSON between marks.

``<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>``

https://github.com/NousResearch/Hermes-Function-Calling
"""

from __future__ import annotations

from jaxllm.entrypoints.openai.tools.calls import Parsed, Schemas, ToolCall, ToolParser, from_object, loads, marked


def parse(text: str, done: bool, schemas: Schemas) -> Parsed:
    """Read calls as `calls.Parse` says."""
    return marked(text, done, "<tool_call>", "</tool_call>", _read)


def _read(inner: str) -> list[ToolCall] | None:
    call = from_object(loads(inner), "arguments", "parameters")
    return None if call is None else [call]


PARSER = ToolParser(name="hermes", parse=parse, special=True)
