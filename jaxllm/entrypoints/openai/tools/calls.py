"""Calls of tools, as they are read from what a model writes.

A parser is one function from the text so far to what is certain of it. A stream asks it again at each piece that may
change that and passes on what is new, so that streamed and whole answers cannot differ.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

#: the name of a tool -> the JSON schema of its arguments
Schemas = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool, and its arguments as JSON."""

    name: str
    arguments: str


@dataclasses.dataclass(frozen=True, slots=True)
class Parsed:
    """What is certain of a text: more text makes the content, the list of calls, and the last call's arguments longer,
    and changes nothing else.
    """

    content: str
    calls: list[ToolCall]
    #: characters without which more text changes nothing but `content`, and that as `goes_on` says; None: any may
    until: str | None = None
    #: whether the content goes on with the text, or waits
    goes_on: bool = False


#: text so far, whether it is all, the tools' schemas -> what is certain of it
Parse = Callable[[str, bool, Schemas], Parsed]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToolParser:
    """How one family of models writes calls."""

    name: str
    parse: Parse
    #: whether the marks are special tokens, which a text otherwise lacks
    special: bool = False
    #: digits of a call's id, where the model's template is particular about it
    id_length: int | None = None


def marked(text: str, done: bool, begin: str, end: str, read: Callable[[str], list[ToolCall] | None]) -> Parsed:
    """Read calls that stand between two marks; what is outside of them is content.

    Args:
        read: from what is between the marks to its calls; None: it is none, and stays content.
    """
    content, calls, place = "", [], 0
    while True:
        start = text.find(begin, place)
        if start < 0:
            held = 0 if done else overlap(text[place:], begin)
            rest = text[place : len(text) - held]
            if held or (calls and not rest.strip()):
                return Parsed(_joined(content, rest, calls), calls)
            return Parsed(content + rest, calls, until=begin[0], goes_on=True)
        content = _joined(content, text[place:start], calls)
        stop = text.find(end, start + len(begin))
        if stop < 0 and not done:
            return Parsed(content, calls, until=end[-1])
        # the end may be a token that ended the answer, and is not in its text
        inner = text[start + len(begin) :] if stop < 0 else text[start + len(begin) : stop]
        place = len(text) if stop < 0 else stop + len(end)
        found = read(inner)
        if found is None:
            content += text[start:place]
        else:
            calls += found


def _joined(content: str, more: str, calls: Sequence[ToolCall]) -> str:
    """Spaces between calls are no content."""
    return content if calls and not more.strip() else content + more


def overlap(text: str, mark: str) -> int:
    """Return how many of the last characters of `text` may be the beginning of `mark`."""
    for length in range(min(len(text), len(mark) - 1), 0, -1):
        if mark.startswith(text[-length:]):
            return length
    return 0


def from_object(value: Any, *names: str) -> ToolCall | None:
    """Return the call in a JSON object with a name and its arguments; None: it is none.

    Args:
        names: what the arguments may be called.
    """
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = next((value[name] for name in names if name in value), {})
    if isinstance(arguments, str):
        arguments = loads(arguments)
    return ToolCall(value["name"], dumps(arguments)) if isinstance(arguments, dict) else None


def dumps(value: Any) -> str:
    """Return JSON as models write it."""
    return json.dumps(value, ensure_ascii=False)


def loads(text: str) -> Any:
    """Return what a JSON text says; None also for what is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def first_value(text: str, place: int) -> tuple[Any, int] | None:
    """Return the JSON value that begins at `place` and the place behind it; None: it is none, or not complete."""
    try:
        return json.JSONDecoder().raw_decode(text, place)
    except (ValueError, RecursionError):
        return None
