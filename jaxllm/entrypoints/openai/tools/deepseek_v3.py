"""DeepSeek V3's and R1's form: marks around all calls and around each, JSON in a block of code.

``<ｌcalls begin><ｌcall begin>function<ｌsep>weather\\n```json\\n{"city": "Paris"}\\n```<ｌcall end><ｌcalls end>``

https://huggingface.co/deepseek-ai/DeepSeek-V3-0324, its chat template
"""

from __future__ import annotations

import dataclasses
import re

from jaxllm.entrypoints.openai.tools.calls import Parsed, Schemas, ToolCall, ToolParser, dumps, loads, marked, overlap

ALL_BEGIN, ALL_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
BEGIN, END, SEPARATOR = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
_CALL = re.compile(rf"\s*function{re.escape(SEPARATOR)}([^\n]+)\n```json\n(.*?)\n?```\s*", re.DOTALL)


def parse(text: str, done: bool, schemas: Schemas) -> Parsed:
    """Read calls as `calls.Parse` says."""
    held = 0 if done else max(overlap(text, mark) for mark in (ALL_BEGIN, ALL_END))
    text = text[: len(text) - held].replace(ALL_BEGIN, "").replace(ALL_END, "")
    parsed = marked(text, done, BEGIN, END, _read)
    return dataclasses.replace(parsed, until=None) if held else parsed


def _read(inner: str) -> list[ToolCall] | None:
    found = _CALL.fullmatch(inner)
    arguments = None if found is None else loads(found[2])
    if found is None or not isinstance(arguments, dict):
        return None
    return [ToolCall(found[1].strip(), dumps(arguments))]


PARSER = ToolParser(name="deepseek_v3", parse=parse, special=True)
