"""Qwen3-Coder's form: an element for the function, and one for each argument, whose type the schema says.

``<tool_call><function=weather><parameter=city>Paris</parameter></function></tool_call>``

https://huggingface.co/Qwen/Qwen3-Coder-30B-A3B-Instruct, its chat template
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jaxllm.entrypoints.openai.tools.calls import Parsed, Schemas, ToolCall, ToolParser, dumps, loads, marked

_FUNCTION = re.compile(r"\s*<function=([^>]+)>(.*?)(?:</function>)?\s*", re.DOTALL)
#: an argument ends where the next one begins, if its end is forgotten
_ARGUMENT = re.compile(r"<parameter=([^>]+)>(.*?)(?:</parameter>|(?=<parameter=)|\Z)", re.DOTALL)


def parse(text: str, done: bool, schemas: Schemas) -> Parsed:
    """Read calls as `calls.Parse` says."""

    def read(inner: str) -> list[ToolCall] | None:
        found = _FUNCTION.fullmatch(inner)
        if found is None:
            return None
        name = found[1].strip()
        properties = schemas.get(name, {}).get("properties")
        if not isinstance(properties, Mapping):
            properties = {}
        arguments = {
            key.strip(): _typed(_without_breaks(value), properties.get(key.strip()))
            for key, value in _ARGUMENT.findall(found[2])
        }
        return [ToolCall(name, dumps(arguments))]

    return marked(text, done, "<tool_call>", "</tool_call>", read)


def _without_breaks(value: str) -> str:
    """The template puts a value on lines of its own."""
    return value.removeprefix("\n").removesuffix("\n")


def _typed(value: str, schema: Any) -> Any:
    """Return a value as its schema has it; text where that is allowed or nothing else fits."""
    kinds = schema.get("type", "string") if isinstance(schema, dict) else "string"
    if isinstance(schema, dict) and "type" not in schema and ("anyOf" in schema or "$ref" in schema):
        kinds = "object"
    if kinds == "string" or (isinstance(kinds, list) and "string" in kinds and value != "null"):
        return value
    if kinds == "boolean" and value.lower() in ("true", "false"):
        return value.lower() == "true"
    read = loads(value)
    return value if read is None and value.strip() != "null" else read


PARSER = ToolParser(name="qwen3_coder", parse=parse, special=True)
