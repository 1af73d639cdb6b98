"""A tool that has to be called: a grammar makes the model write its arguments, or a list of calls, as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.entrypoints.openai.tools.calls import (
    Parsed,
    Schemas,
    ToolCall,
    ToolParser,
    first_value,
    from_object,
)


def named_schema(schemas: Schemas, name: str) -> dict[str, Any]:
    """Return the schema of the arguments of one tool, which are the whole answer."""
    return dict(schemas[name]) or {"type": "object"}


def required_schema(schemas: Schemas, *, several: bool) -> dict[str, Any]:
    """Return the schema of a list with a call or more, each of the form ``{"name": ..., "parameters": {...}}``."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": name},
                "parameters": _moved(schema, f"#/items/anyOf/{number}/properties/parameters") or {"type": "object"},
            },
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for number, (name, schema) in enumerate(schemas.items())
    ]
    listed: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    return listed if several else {**listed, "maxItems": 1}


#: keywords of JSON schema whose value maps names to schemas, and those whose value is data
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies")
_DATA = ("const", "enum", "default", "examples")


def _moved(schema: Any, place: str) -> Any:
    """Return a schema that is to stand at `place` of another, with its references to its own parts (``#/$defs/City``)
    leading there.
    """
    if isinstance(schema, list):
        return [_moved(item, place) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "$ref" and isinstance(value, str) and (value == "#" or value.startswith("#/")):
            moved[key] = place + value[1:]
        elif key in _MAPS and isinstance(value, Mapping):
            moved[key] = {name: _moved(item, place) for name, item in value.items()}
        else:
            moved[key] = value if key in _DATA else _moved(value, place)
    return moved


def _list(text: str, done: bool, schemas: Schemas) -> Parsed:
    place = len(text) - len(text.lstrip())
    begun = text[place:] != ""
    if text[place : place + 1] not in ("[", ""):
        return Parsed(text, [], until="", goes_on=True)
    calls: list[ToolCall] = []
    place += 1
    while True:
        while text[place : place + 1] in (" ", "\n", "\r", "\t", ","):
            place += 1
        found = first_value(text, place)
        call = None if found is None else from_object(found[0], "parameters", "arguments")
        if found is None or call is None:
            # a call that the answer's length has cut off is none
            rest = text[place:].strip()
            return Parsed(rest if done and rest != "]" else "", calls, until="}" if begun else None)
        calls.append(call)
        place = found[1]


#: of the answer that `required_schema` makes
REQUIRED = ToolParser(name="required", parse=_list)


def named(name: str) -> ToolParser:
    """Return the parser of the answer that `named_schema` makes."""
    return ToolParser(name="named", parse=lambda text, done, schemas: Parsed("", [ToolCall(name, text)]))
