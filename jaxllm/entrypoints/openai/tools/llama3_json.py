"""Llama 3's form: the whole answer is a JSON object, or several with semicolons between them.

``{"name": "weather", "parameters": {"city": "Paris"}}``, and ``<|python_tag|>`` may stand before it.

https://www.llama.com/docs/model-cards-and-prompt-formats/llama3_1
"""

from __future__ import annotations

from jaxllm.entrypoints.openai.tools.calls import (
    Parsed,
    Schemas,
    ToolCall,
    ToolParser,
    first_value,
    from_object,
)

TAG = "<|python_tag|>"


def parse(text: str, done: bool, schemas: Schemas) -> Parsed:
    """Read calls as `calls.Parse` says."""
    begun = text.lstrip()
    if not done and TAG.startswith(begun):
        return Parsed("", [])
    body = begun.removeprefix(TAG)
    if body is begun and not begun.startswith("{"):
        return Parsed(text, [], until="", goes_on=True)
    calls, is_whole = _objects(body)
    if calls:
        return Parsed("", calls, until="}")
    # it may be content in braces: that is known when its first object, or the answer, is complete
    if done or is_whole:
        return Parsed(text, [], until="", goes_on=True)
    return Parsed("", [], until="}" if body.startswith("{") else None)


def _objects(text: str) -> tuple[list[ToolCall], bool]:
    """Return the calls as far as they are complete, and whether something complete is none."""
    calls: list[ToolCall] = []
    place = 0
    while True:
        while text[place : place + 1] in (" ", "\n", "\r", "\t", ";"):
            place += 1
        found = first_value(text, place)
        if found is None:
            return calls, False
        call = from_object(found[0], "parameters", "arguments")
        if call is None:
            return calls, True
        calls.append(call)
        place = found[1]


PARSER = ToolParser(name="llama3_json", parse=parse, special=True)
