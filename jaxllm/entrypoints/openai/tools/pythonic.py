"""The form of Llama 3.2 and others: the whole answer is a Python list of calls with keyword arguments.

``[weather(city="Paris"), weather(city="Rome")]``

https://www.llama.com/docs/model-cards-and-prompt-formats/llama3_2
"""

from __future__ import annotations

import ast

from jaxllm.entrypoints.openai.tools.calls import Parsed, Schemas, ToolCall, ToolParser, dumps


def parse(text: str, done: bool, schemas: Schemas) -> Parsed:
    """Read calls as `calls.Parse` says."""
    begun = text.strip()
    if begun and not begun.startswith("["):
        return Parsed(text, [], until="", goes_on=True)
    # what looks complete may go on, as text
    calls = _calls(begun) if done else []
    return Parsed("" if calls or not done else text, calls or [], until="" if begun else None)


def _calls(text: str) -> list[ToolCall] | None:
    """Return the calls in a list of Python; None: it is none. Nothing of it is run."""
    try:
        listed = ast.parse(text, mode="eval").body
        if not isinstance(listed, ast.List):
            return None
        return [_call(node) for node in listed.elts]
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


def _call(node: ast.expr) -> ToolCall:
    """Raises ValueError for what is no call with literal keyword arguments."""
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError("no call")
    name = ast.unparse(node.func)
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError("no name")
    arguments = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise ValueError("no name")
        arguments[keyword.arg] = ast.literal_eval(keyword.value)
    return ToolCall(name, dumps(arguments))


PARSER = ToolParser(name="pythonic", parse=parse)
