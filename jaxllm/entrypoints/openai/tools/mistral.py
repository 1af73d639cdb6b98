"""Mistral's two forms: a list of JSON objects behind one mark, or, since tokenizer v11, each call behind its own.

``[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Paris"}}]`` and
``[TOOL_CALLS]weather[ARGS]{"city": "Paris"}``

https://docs.mistral.ai/cookbooks/concept-deep-dive-tokenization-tool_calling
"""

from __future__ import annotations

from jaxllm.entrypoints.openai.tools.calls import (
    Parsed,
    Schemas,
    ToolCall,
    ToolParser,
    dumps,
    first_value,
    from_object,
    overlap,
)

MARK, ARGUMENTS = "[TOOL_CALLS]", "[ARGS]"


def parse(text: str, done: bool, schemas: Schemas) -> Parsed:
    """Read calls as `calls.Parse` says."""
    content, *parts = text.split(MARK)
    if not parts:
        held = 0 if done else overlap(text, MARK)
        return Parsed(text[: len(text) - held], [], until=None if held else MARK[0], goes_on=True)
    calls: list[ToolCall] = []
    for number, part in enumerate(parts):
        found = _calls(part)
        if found is None:
            if done or number + 1 < len(parts):
                # it is none, and will be none
                content += MARK + part
                continue
            break
        calls += found
    # an object, a list or another mark has to be complete
    return Parsed(content, calls, until="}]")


def _calls(part: str) -> list[ToolCall] | None:
    """Return the calls behind a mark; None: there is none, or it is not complete."""
    start = len(part) - len(part.lstrip())
    if part[start : start + 1] == "[":
        listed = first_value(part, start)
        if listed is None or not isinstance(listed[0], list):
            return None
        calls = [from_object(value, "arguments", "parameters") for value in listed[0]]
        return [call for call in calls if call is not None] if all(calls) else None
    brace = part.find("{")
    name = part[:brace].strip().removesuffix(ARGUMENTS).strip()
    found = first_value(part, brace) if brace >= 0 else None
    if not name or found is None or not isinstance(found[0], dict):
        return None
    return [ToolCall(name, dumps(found[0]))]


PARSER = ToolParser(name="mistral", parse=parse, special=True, id_length=9)
