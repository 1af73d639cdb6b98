"""Calls of tools and reasoning, read from what models write: whole, and in pieces, which must add up to the same."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_model import byte_tokenizer

from jaxllm.entrypoints.openai.messages import Dialect, MessageStream, whole_message
from jaxllm.entrypoints.openai.reasoning import ReasoningParser
from jaxllm.entrypoints.openai.tools import forced
from jaxllm.entrypoints.openai.tools.options import TOOL_CALL_PARSERS
from jaxllm.entrypoints.openai.tools.parsers import PARSERS

SCHEMAS: dict[str, Any] = {
    "weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "hourly": {"type": "boolean"},
            "tags": {"type": "array"},
            "near": {"anyOf": [{"type": "object"}, {"type": "null"}]},
        },
    },
    "anything": {"properties": None},
}
ONE = [("weather", {"city": "Paris", "days": 3})]
TWO = [("weather", {"city": 'a "b" {c} [d] é'}), ("weather", {"city": "Rome", "tags": ["x"]})]
V3 = "<｜tool▁calls▁begin｜>{}<｜tool▁calls▁end｜>"
V3_CALL = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{}\n```<｜tool▁call▁end｜>"
A, B = json.dumps(TWO[0][1], ensure_ascii=False), json.dumps(TWO[1][1])

#: parser, text, content, calls
CASES: list[tuple[str, str, str, list[Any]]] = [
    ("hermes", 'Let me see.<tool_call>\n{"name": "weather", "arguments": {"city": "Paris", "days": 3}}\n</tool_call>',
     "Let me see.", ONE),
    ("hermes", f'<tool_call>{{"name": "weather", "arguments": {A}}}</tool_call>\n'
     f'<tool_call>{{"arguments": {B}, "name": "weather"}}</tool_call>\n', "", TWO),
    ("hermes", "no <tool_cal at all <", "no <tool_cal at all <", []),
    ("hermes", "<tool_call>{oops</tool_call> then", "<tool_call>{oops</tool_call> then", []),
    # the mark of the end may be the token that ended the answer
    ("hermes", '<tool_call>{"name": "weather", "arguments": {"city": "Paris", "days": 3}}', "", ONE),
    ("hermes", '<tool_call>{"name": "weather", "argu', '<tool_call>{"name": "weather", "argu', []),
    ("qwen3_coder", "Sure.\n<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n"
     "3\n</parameter>\n</function>\n</tool_call>", "Sure.\n", ONE),
    ("qwen3_coder", "<tool_call><function=weather><parameter=city>3</parameter><parameter=hourly>True</parameter>"
     '<parameter=tags>["x", 1]</parameter><parameter=near>null</parameter><parameter=other>a\nb</parameter></function>'
     "</tool_call>", "",
     [("weather", {"city": "3", "hourly": True, "tags": ["x", 1], "near": None, "other": "a\nb"})]),
    ("qwen3_coder", "<tool_call><function=anything><parameter=days>3</parameter></function></tool_call>", "",
     [("anything", {"days": "3"})]),
    ("qwen3_coder", "<tool_call>none</tool_call>", "<tool_call>none</tool_call>", []),
    ("deepseek_v3", "Well. " + V3.format(V3_CALL.format(A) + "\n" + V3_CALL.format(B)), "Well. ", TWO),
    ("deepseek_v3", "1 < 2 <｜tool", "1 < 2 <｜tool", []),
    ("mistral", f'[TOOL_CALLS] [{{"name": "weather", "arguments": {A}}}, {{"name": "weather", "arguments": {B}}}]',
     "", TWO),
    ("mistral", f"I ask.[TOOL_CALLS]weather[ARGS]{A}[TOOL_CALLS]weather{B}", "I ask.", TWO),
    ("mistral", "[TOOL_CALLS] oops", "[TOOL_CALLS] oops", []),
    ("mistral", "a [TOOL", "a [TOOL", []),
    ("llama3_json", '{"name": "weather", "parameters": {"city": "Paris", "days": 3}}', "", ONE),
    ("llama3_json", f'<|python_tag|>{{"name": "weather", "parameters": {A}}}; {{"name": "weather", "parameters": {B}}}',
     "", TWO),
    ("llama3_json", '{"city": "Paris"} is JSON', '{"city": "Paris"} is JSON', []),
    ("llama3_json", "plain {text}", "plain {text}", []),
    ("llama3_json", '{"name": "weather", "par', '{"name": "weather", "par', []),
    ("pythonic", '[weather(city="Paris", days=3)]', "", ONE),
    ("pythonic", "[weather(city='a \"b\" {c} [d] é'), weather(city=\"Rome\", tags=['x'])]\n", "", TWO),
    ("pythonic", "[1] is a list", "[1] is a list", []),
    ("pythonic", "[weather(city=open('x'))]", "[weather(city=open('x'))]", []),
    ("pythonic", "plain", "plain", []),
]  # fmt: skip


def told(deltas: list[dict[str, Any]]) -> tuple[str, str, list[Any]]:
    """Reasoning, content and calls that a client puts together."""
    calls: list[list[str]] = []
    for delta in deltas:
        for call in delta.get("tool_calls", ()):
            if call["index"] == len(calls):
                assert call["id"] and call["type"] == "function"
                calls.append([call["function"]["name"], ""])
            calls[call["index"]][1] += call["function"]["arguments"]
    joined = ("".join(delta.get(name, "") for delta in deltas) for name in ("reasoning_content", "content"))
    reasoning, content = joined
    return reasoning, content, [(name, json.loads(arguments)) for name, arguments in calls]


def streamed(dialect: Dialect, text: str, cuts: list[int], prompt: str = "") -> tuple[str, str, list[Any]]:
    stream, places = MessageStream(dialect, prompt), sorted({0, *cuts, len(text)})
    pieces = [text[a:b] for a, b in zip(places, places[1:], strict=False)]
    deltas = [delta for piece in pieces for delta in stream.push(piece, False)]
    return told(deltas + stream.push("", True))


@pytest.mark.parametrize(("name", "text", "content", "calls"), CASES)
def test_calls_whole_and_in_pieces(name: str, text: str, content: str, calls: list[Any]):
    dialect = Dialect(tools=PARSERS[name], schemas=SCHEMAS)
    message, _ = whole_message(text, "", dialect)
    found = [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in message.get("tool_calls", ())]
    assert ((message["content"] or "").strip(), found) == (content.strip(), calls)
    for cuts in (list(range(len(text))), [len(text) // 2], []):
        _, streamed_content, streamed_calls = streamed(dialect, text, cuts)
        assert (streamed_content, streamed_calls) == (content, calls)


@given(st.sampled_from(CASES), st.sampled_from(CASES), st.data())
def test_pieces_add_up_whatever_the_text(one: Any, two: Any, data: st.DataObject):
    """Also for texts that no model was taught to write."""
    text = one[1][: data.draw(st.integers(0, len(one[1])))] + two[1][data.draw(st.integers(0, len(two[1]))) :]
    dialect = Dialect(tools=PARSERS[data.draw(st.sampled_from(sorted(PARSERS)))], schemas=SCHEMAS)
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8))
    assert streamed(dialect, text, cuts) == streamed(dialect, text, [])


LONG = "word, " * 2000
WAITS: list[tuple[str | None, str, str]] = [
    *((name, LONG, LONG) for name in sorted(PARSERS)),
    ("hermes", '<tool_call>{"name": "weather", "arguments": {"city": "' + LONG, ""),
    ("mistral", '[TOOL_CALLS]weather[ARGS]{"city": "' + LONG, ""),
    ("llama3_json", '{"name": "weather", "parameters": {"city": "' + LONG, ""),
    ("pythonic", '[weather(city="' + LONG, ""),
    ("required", '[{"name": "weather", "parameters": {"city": "' + LONG, ""),
    (None, "<think>" + LONG, LONG),
    ("hermes", "<think>Hm.</think>" + LONG, "Hm." + LONG),
]


@pytest.mark.parametrize(("name", "text", "told_of_it"), WAITS)
def test_a_long_text_is_not_read_for_each_piece(name: str | None, text: str, told_of_it: str):
    """What it takes grows with the text's length, and not with its square."""
    read: list[int] = []
    tools = None if name is None else forced.REQUIRED if name == "required" else PARSERS[name]
    if tools is not None:
        parse = tools.parse
        tools = dataclasses.replace(
            tools, parse=lambda text, done, schemas: read.append(len(text)) or parse(text, done, schemas)
        )
    reasoning = ReasoningParser.of("qwen3", byte_tokenizer) if "<think>" in text else None
    stream = MessageStream(Dialect(tools=tools, reasoning=reasoning, schemas=SCHEMAS), "")
    split = ReasoningParser.split
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReasoningParser, "split", lambda self, *all_: read.append(len(all_[0])) or split(self, *all_))
        deltas = [delta for at in range(0, len(text), 4) for delta in stream.push(text[at : at + 4], False)]
    reasons, content, calls = told(deltas)
    assert reasons + content == told_of_it and not calls
    assert sum(read) < 2 * len(text)


def test_ids_are_of_the_kind_that_templates_take():
    mistral = Dialect(tools=PARSERS["mistral"]).new_call_id()
    assert len(mistral) == 9 and mistral.isalnum()
    assert Dialect(tools=PARSERS["hermes"]).new_call_id().startswith("chatcmpl-tool-")
    assert tuple(sorted(PARSERS)) == TOOL_CALL_PARSERS


def test_what_is_forced():
    required = Dialect(tools=forced.REQUIRED, schemas=SCHEMAS)
    text = f'[{{"name": "weather", "parameters": {A}}}, {{"name": "weather", "parameters": {B}}}]'
    named = Dialect(tools=forced.named("weather"), schemas=SCHEMAS)
    for cuts in ([], list(range(len(text)))):
        assert streamed(required, text, cuts) == ("", "", TWO)
        assert streamed(named, A, cuts[: len(A)]) == ("", "", TWO[:1])
    # of what its length has cut off, the complete calls are there, and nothing is lost
    cut = text[:-10]
    assert streamed(required, cut, [])[2] == TWO[:1] and streamed(required, cut, [])[1] in cut


def test_one_call_of_several():
    for name, text, content, calls in CASES:
        dialect = Dialect(tools=PARSERS[name], schemas=SCHEMAS, several=False)
        message, _ = whole_message(text, "", dialect)
        assert len(message.get("tool_calls", ())) == min(len(calls), 1)
        for cuts in (list(range(len(text))), []):
            assert streamed(dialect, text, cuts)[1:] == (content, calls[:1])


def test_schemas_with_definitions_of_their_own():
    """Nested pydantic models, in the grammar of a list of calls: each tool's references lead to its own."""
    pydantic, lark = pytest.importorskip("pydantic"), pytest.importorskip("llguidance")

    def schema(kind: type) -> dict[str, Any]:
        place: Any = pydantic.create_model("Place", at=(kind, ...), near=("Place | None", None))
        return pydantic.create_model("Arguments", place=(place, ...)).model_json_schema()

    schemas = {"one": schema(int), "two": schema(str)}
    schemas["tree"] = {"type": "object", "properties": {"$ref": {"$ref": "#"}}, "additionalProperties": False}
    before = json.dumps(schemas)
    grammar = lark.LLMatcher.grammar_from_json_schema(json.dumps(forced.required_schema(schemas, several=True)))
    assert json.dumps(schemas) == before
    for name, arguments, fits in (
        ("one", {"place": {"at": 1, "near": {"at": 2}}}, True),
        ("one", {"place": {"at": 1, "near": {"at": "x"}}}, False),
        ("two", {"place": {"at": "x"}}, True),
        ("two", {"place": {"at": 1}}, False),
        ("tree", {"$ref": {"$ref": {}}}, True),
        ("tree", {"$ref": 1}, False),
    ):
        matcher = lark.LLMatcher(lark.LLTokenizer("byte"), grammar)
        assert not matcher.get_error()
        text = json.dumps([{"name": name, "parameters": arguments}]).encode()
        matcher.try_consume_tokens(list(text))
        assert matcher.is_accepting() == fits, (name, arguments)


@pytest.mark.parametrize(
    ("name", "prompt", "text", "reasoning", "content"),
    [
        ("qwen3", "", "<think>\nHm.\n</think>\n\nYes.", "Hm.", "Yes."),
        ("qwen3", "<think>\n\n</think>\n\n", "Yes.", "", "Yes."),
        ("qwen3", "...<think>\n", "Hm.</think>Yes.", "Hm.", "Yes."),
        ("qwen3", "", "<thin ice", "", "<thin ice"),
        ("qwen3", "", "<thi", "", "<thi"),
        ("qwen3", "<think>", "Hm. </th", "Hm. </th", ""),
        ("deepseek_r1", "", "Hm.\n\n</think>\n\nYes.", "Hm.", "Yes."),
        ("deepseek_r1", "", "<think>Hm.</think>Yes.", "Hm.", "Yes."),
        ("mistral", "", "[THINK]Hm.[/THINK]Yes.", "Hm.", "Yes."),
    ],
)
def test_reasoning(name: str, prompt: str, text: str, reasoning: str, content: str):
    dialect = Dialect(reasoning=ReasoningParser.of(name, byte_tokenizer))
    message, _ = whole_message(text, prompt, dialect)
    assert (message["reasoning_content"] or "", message["content"]) == (reasoning, content)
    for cuts in (list(range(len(text))), [3], []):
        assert streamed(dialect, text, cuts, prompt) == (reasoning, content, [])
    end = "[/THINK]" if name == "mistral" else "</think>"
    count = text.find(end) + len(end) if end in text else len(text) if reasoning else 0
    # a token is a byte
    assert dialect.reasoning_tokens(byte_tokenizer().encode(text).ids, prompt) == count
    silent = Dialect(reasoning=ReasoningParser.of(name, byte_tokenizer), tells_reasoning=False)
    assert streamed(silent, text, [], prompt) == ("", content, [])


def test_reasoning_before_calls():
    dialect = Dialect(reasoning=ReasoningParser.of("qwen3", byte_tokenizer), tools=PARSERS["hermes"], schemas=SCHEMAS)
    text = "<think>a <tool_call> perhaps</think>" + CASES[0][1]
    for cuts in ([], list(range(len(text)))):
        assert streamed(dialect, text, cuts) == ("a <tool_call> perhaps", "Let me see.", ONE)
