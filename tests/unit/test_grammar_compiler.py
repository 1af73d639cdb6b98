"""Compiled grammars without a model: random walks under the masks, judged by other libraries."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import jsonschema
import lark
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_model import EOS, VOCAB_SIZE, write_tiny_model
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from jaxllm.api.errors import ValidationError
from jaxllm.api.sampling_params import StructuredOutputsParams
from jaxllm.config.structured_outputs import StructuredOutputsConfig
from jaxllm.structured.compiler import CACHE_SIZE, GrammarCompiler
from jaxllm.structured.matcher import GrammarMatcher
from jaxllm.tokenization.load import load_tokenizer

#: tokens that a walk prefers, where they are allowed: texts stay short and readable
LIKELY = [ord(c) for c in '"abc019{}[],:']


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """Single bytes."""
    return load_tokenizer(write_tiny_model(tmp_path_factory.mktemp("tiny")))  # pyright: ignore[reportReturnType]


@pytest.fixture(scope="module")
def compiler(tokenizer: PreTrainedTokenizerFast) -> GrammarCompiler:
    return make_compiler(tokenizer)


def make_compiler(tokenizer: Any, vocab_size: int = VOCAB_SIZE, eos: int = EOS, **config: Any) -> GrammarCompiler:
    return GrammarCompiler(
        tokenizer, vocab_size=vocab_size, eos_token_ids=frozenset([eos]), config=StructuredOutputsConfig(**config)
    )


def matcher_of(compiler: GrammarCompiler, **params: Any) -> GrammarMatcher:
    return compiler.compile(StructuredOutputsParams(**params)).result().matcher()


def allowed(matcher: GrammarMatcher, vocab_size: int = VOCAB_SIZE) -> list[int]:
    mask = np.full(-(-vocab_size // 32), -1, np.int32)
    assert matcher.fill_mask(mask) is None
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    assert not bits[vocab_size:].any()
    return np.flatnonzero(bits).tolist()


def walk(
    tokenizer: Any, matcher: GrammarMatcher, seed: int, eos: int = EOS, vocab_size: int = VOCAB_SIZE
) -> str | None:
    """Random tokens under the masks until the end, as text; None when it has not come after 300 tokens."""
    generator = random.Random(seed)
    ids: list[int] = []
    likely = {tokenizer.convert_tokens_to_ids(tokenizer.tokenize(chr(c)))[0] for c in LIKELY}
    for _ in range(300):
        options = allowed(matcher, vocab_size)
        assert options
        if eos in options and (options == [eos] or generator.random() < 0.5):
            assert matcher.advance(eos) is None and matcher.is_complete
            return tokenizer.decode(ids)
        options = [i for i in options if i != eos]
        token = generator.choice([i for i in options if i in likely] or options)
        assert matcher.advance(token) is None
        ids.append(token)
    return None


TABLE = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "array", "items": {"enum": ["x", None, 2]}, "maxItems": 3}},
    "required": ["a"],
}


def schemas() -> st.SearchStrategy[dict[str, Any]]:
    """Small JSON schemas whose texts are short."""
    leaves = st.one_of(
        st.just({"type": "boolean"}),
        st.just({"type": "null"}),
        st.builds(
            lambda a, b: {"type": "integer", "minimum": a, "maximum": a + b}, st.integers(-9, 9), st.integers(0, 99)
        ),
        st.builds(lambda n: {"type": "string", "maxLength": n}, st.integers(0, 4)),
        st.builds(
            lambda v: {"enum": v}, st.lists(st.sampled_from(["x", 'y"\n', 1, None, "é"]), min_size=1, unique=True)
        ),
        st.just({"type": "string", "pattern": "^[a-c]{1,3}[0-9]?$"}),
        st.builds(lambda v: {"const": v}, st.sampled_from([{"k": [1, 2]}, [], "c", 0.5])),
    )

    def inner(schema: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
        objects = st.builds(
            lambda properties, required: {
                "type": "object",
                "properties": properties,
                "required": [name for name in properties if required],
                "additionalProperties": False,
            },
            st.dictionaries(st.sampled_from(["a", "b c", "ü", '"']), schema, max_size=3),
            st.booleans(),
        )
        arrays = st.builds(
            lambda items, least, more: {"type": "array", "items": items, "minItems": least, "maxItems": least + more},
            schema,
            st.integers(0, 2),
            st.integers(0, 2),
        )
        return st.one_of(objects, arrays, st.builds(lambda a: {"anyOf": a}, st.lists(schema, min_size=1, max_size=2)))

    return st.recursive(leaves, inner, max_leaves=5)


@settings(max_examples=60)
@given(schema=schemas(), seed=st.integers(0, 2**32))
def test_every_text_that_ends_validates(tokenizer, compiler, schema: dict[str, Any], seed: int):
    text = walk(tokenizer, matcher_of(compiler, json=schema, disable_any_whitespace=True), seed)
    assert text is not None
    jsonschema.validate(json.loads(text), schema)


@pytest.mark.parametrize("regex", [r"[a-c]+\d{2}(\.com|\.org)?", r"^(ab|ba)*$", r"é{1,3}[^x]", r"(?i:yes|no)!", ""])
@pytest.mark.parametrize("seed", range(5))
def test_regex(tokenizer, compiler: GrammarCompiler, regex: str, seed: int):
    text = walk(tokenizer, matcher_of(compiler, regex=regex), seed)
    assert text is not None and re.fullmatch(regex, text)


@pytest.mark.parametrize("seed", range(8))
def test_choice(tokenizer, compiler: GrammarCompiler, seed: int):
    choice = ["yes", "yes sir", 'say "no"\n\\', "もちろん", "🙂", ""]
    assert walk(tokenizer, matcher_of(compiler, choice=choice), seed) in choice


def test_choice_of_thousands(tokenizer, compiler: GrammarCompiler):
    choice = [f"{i} (of 4000)." for i in range(4000)]
    assert walk(tokenizer, matcher_of(compiler, choice=choice), 0) in choice


LARK = """
start: sum
sum: term (("+" | "-") term)*
term: NUMBER | "(" sum ")"
NUMBER: /[0-9]{1,3}/
"""
GBNF = """
root ::= term (("+" | "-") term)*
term ::= [0-9] [0-9]? [0-9]? | "(" root ")"
"""


@pytest.mark.parametrize("grammar", [LARK, GBNF])
def test_grammars_of_both_forms(tokenizer, compiler: GrammarCompiler, grammar: str):
    parser = lark.Lark(LARK)
    texts = [walk(tokenizer, matcher_of(compiler, grammar=grammar), seed) for seed in range(10)]
    ended = {text for text in texts if text is not None}
    assert len(ended) > 3
    for text in ended:
        parser.parse(text)


def test_json_object_and_whitespace(tokenizer, compiler: GrammarCompiler):
    for seed in range(5):
        text = walk(tokenizer, matcher_of(compiler, json_object=True, disable_any_whitespace=True), seed)
        if text is not None:
            assert isinstance(json.loads(text), dict)
    space, brace = ord(" "), ord("{")
    byte = tokenizer.convert_tokens_to_ids
    start = {
        True: matcher_of(compiler, json=TABLE, disable_any_whitespace=True),
        False: matcher_of(compiler, json=TABLE),
    }
    for tight, matcher in start.items():
        matcher.advance(byte(chr(brace)))
        assert (byte("Ġ") in allowed(matcher)) is not tight
    spaced = matcher_of(compiler, json=TABLE, whitespace_pattern="_*")
    spaced.advance(byte("{"))
    assert byte("_") in allowed(spaced) and byte("Ġ") not in allowed(spaced) and space


def test_additional_properties(tokenizer):
    byte = tokenizer.convert_tokens_to_ids
    given = json.dumps(TABLE)
    for compiler, params, taken in (
        (make_compiler(tokenizer), {}, True),
        (make_compiler(tokenizer), {"disable_additional_properties": True}, False),
        (make_compiler(tokenizer, disable_additional_properties=True), {}, False),
    ):
        for schema in (TABLE, given):
            matcher = matcher_of(compiler, json=schema, disable_any_whitespace=True, **params)
            for character in '{"a":1,"':
                matcher.advance(byte(character))
            assert (byte("z") in allowed(matcher)) is taken
    assert json.dumps(TABLE) == given


@pytest.mark.parametrize("in_vocabulary", [False, True])
def test_structural_tags(compiler: GrammarCompiler, tokenizer, in_vocabulary: bool):
    tag = {
        "structures": [
            {"begin": "<f>", "schema": {"type": "object", "properties": {"a": {"const": 1}}}, "end": "</f>"}
        ],
        "triggers": ["<f>"],
    }
    vocab_size = VOCAB_SIZE
    if in_vocabulary:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), eos_token="<eos>"
        )
        tokenizer.add_special_tokens({"additional_special_tokens": ["<f>"]})
        vocab_size += 1
        compiler = make_compiler(tokenizer, vocab_size)
    matcher = matcher_of(compiler, structural_tag=json.dumps(tag))
    ids = tokenizer.encode('any text <f>{"a":1', add_special_tokens=False)
    assert (len(ids) == 16) is in_vocabulary
    assert [matcher.advance(i) for i in ids] == [None] * len(ids)
    # in the schema: neither text nor the end of the sequence
    inside = allowed(matcher, vocab_size)
    assert EOS not in inside and tokenizer.convert_tokens_to_ids("z") not in inside
    for token in tokenizer.encode("}</f>", add_special_tokens=False):
        matcher.advance(token)
    assert EOS in allowed(matcher, vocab_size)


def byte_fallback() -> PreTrainedTokenizerFast:
    """A sentencepiece tokenizer's like: pieces with a visible space, and all bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abc019", '"', "▁a", "ab", "▁ab"]
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b")]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("padding", [0, 37])
def test_byte_fallback_and_a_model_with_more_ids_than_the_tokenizer(padding: int):
    tokenizer = byte_fallback()
    vocab_size = len(tokenizer) + padding
    compiler = make_compiler(tokenizer, vocab_size, eos=2)
    for seed in range(5):
        text = walk(tokenizer, matcher_of(compiler, regex="é[ab ]{4} ab🙂"), seed, 2, vocab_size)
        assert text is not None and re.fullmatch("é[ab ]{4} ab🙂", text)


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({"regex": "(a"}, "unclosed group"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": r"[^\s\S]"}, "no text matches it"),
        ({"grammar": "start: x"}, 'unknown name: "x"'),
        ({"grammar": "root ::= ("}, "Failed to convert the grammar from GBNF to Lark"),
        ({"json": {"type": "foo"}}, "Invalid type: foo"),
        ({"json": {"not": {"type": "null"}}}, 'Unimplemented keys: ["not"]'),
        ({"json": {"type": "string", "minLength": 3, "maxLength": 2}}, "Unsatisfiable schema"),
        ({"json": {"$ref": "#/nowhere"}}, "nowhere"),
        ({"choice": ["\ud800"]}, "lone surrogate"),
        ({"json_object": True, "whitespace_pattern": "(("}, "unclosed group"),
        ({"structural_tag": {"type": "structural_tag", "format": {}}}, "the form with 'format' is xgrammar's"),
        ({"structural_tag": {"structures": [], "triggers": ["a"]}}, "No structural tags found"),
        ({"structural_tag": {"structures": [{"begin": "b"}], "triggers": ["a"]}}, "Trigger b not found in triggers"),
        (
            {"structural_tag": {"structures": [{"begin": "ab"}], "triggers": ["a"]}},
            "a structure lacks or misuses 'schema'",
        ),
    ],
)
def test_bad_grammars(compiler: GrammarCompiler, params: dict[str, Any], text: str):
    with pytest.raises(ValidationError) as refusal:
        compiler.compile(StructuredOutputsParams(**params)).result()
    assert text in str(refusal.value)
    assert len(str(refusal.value)) < 700
    # remembered: now it is refused at once
    with pytest.raises(ValidationError):
        compiler.check(StructuredOutputsParams(**params))


def test_what_is_checked_at_once(tokenizer):
    compiler = make_compiler(tokenizer)
    with pytest.raises(ValidationError, match="unclosed group"):
        compiler.check(StructuredOutputsParams(regex="(a"))
    # too long for that, and with a name that only the tokenizer knows
    compiler.check(StructuredOutputsParams(regex="a" * 5000 + "("))
    compiler.check(StructuredOutputsParams(grammar='start: "a" <eos>'))
    assert matcher_of(compiler, grammar='start: "a" <eos>')


def test_a_grammar_is_compiled_once_and_not_kept_for_ever(tokenizer):
    compiler = make_compiler(tokenizer)
    first = compiler.compile(StructuredOutputsParams(json=TABLE))
    assert compiler.compile(StructuredOutputsParams(json=dict(TABLE))) is first
    assert compiler.compile(StructuredOutputsParams(json=TABLE, disable_any_whitespace=True)) is not first
    assert compiler.compile(StructuredOutputsParams(json=TABLE)) is first
    for i in range(CACHE_SIZE):
        compiler.compile(StructuredOutputsParams(regex=f"a{i}"))
    assert compiler.compile(StructuredOutputsParams(json=TABLE)) is not first
    compiler.shutdown()
    compiler.shutdown()


def test_matchers_of_one_grammar_do_not_disturb_each_other(compiler: GrammarCompiler, tokenizer):
    grammar = compiler.compile(StructuredOutputsParams(regex="ab|cd")).result()
    a, c = (tokenizer.convert_tokens_to_ids(character) for character in "ac")
    first, second = grammar.matcher(), grammar.matcher()
    first.advance(a)
    assert set(allowed(second)) == {a, c}
    assert "does not allow token" in str(first.advance(a))
    assert set(allowed(second)) == {a, c}


def test_masks_computed_together_are_those_computed_alone(compiler: GrammarCompiler, tokenizer):
    grammars = [compiler.compile(StructuredOutputsParams(regex=regex)).result() for regex in ("a+", "[0-9]b", "x|yz")]
    alone, together = ([grammar.matcher() for grammar in grammars] for _ in range(2))
    for text in ("a0y", "ab\0"):
        compiler.fill_together(together)
        for first, second, character in zip(alone, together, text, strict=True):
            assert allowed(first) == allowed(second)
            if character != "\0":
                for matcher in (first, second):
                    assert matcher.advance(tokenizer.convert_tokens_to_ids(character)) is None


def test_a_slow_tokenizer_is_refused():
    class Slow:
        all_special_tokens: list[str] = []

    with pytest.raises(ValidationError, match="need a fast tokenizer .*Slow"):
        make_compiler(Slow()).compile(StructuredOutputsParams(regex="a")).result()


def test_the_gguf_tokenizer(smollm2_gguf: Path):
    tokenizer = load_tokenizer(smollm2_gguf)
    compiler = make_compiler(tokenizer, len(tokenizer), tokenizer.eos_token_id)  # pyright: ignore[reportArgumentType]
    text = json.dumps({"a": 36, "b": ["x", 2]})
    matcher = matcher_of(compiler, json=TABLE)
    for token in tokenizer.encode(text, add_special_tokens=False):
        assert token in allowed(matcher, len(tokenizer))
        assert matcher.advance(token) is None
    assert allowed(matcher, len(tokenizer)).count(tokenizer.eos_token_id) == 1  # pyright: ignore[reportArgumentType]
