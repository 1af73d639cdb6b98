"""Text as it is streamed: pieces add up to the whole, and stop strings end it where they first appear."""

from __future__ import annotations

import codecs
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE, WordPiece
from transformers.convert_slow_tokenizer import bytes_to_unicode

from jaxllm.api.sampling_params import SamplingParams
from jaxllm.engine.io.detokenizer import Detokenizer
from jaxllm.tokenization.load import load_tokenizer

TEXTS = [
    "plain words, and more of them",
    "emoji 😀👩‍👩‍👧‍👦🏳️‍🌈 between words 🎉",
    "漢字とひらがなとカタカナ、그리고 한국어",
    "naïve café – “quotes” … ½",
    "العربية हिन्दी ไทย",
    "  leading and   inner   spaces\n\ttabs\r\nlines\n",
    "zero width \u200b joiner \u200d and \ufffd itself",
]


def byte_fallback() -> Tokenizer:
    """As Llama 2's and Gemma's: words of a few letters, everything else as bytes."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁"] + [chr(c) for c in range(97, 123)]
    tokenizer = Tokenizer(BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


@pytest.fixture(scope="module")
def byte_level(smollm2_gguf: Path) -> Tokenizer:
    return load_tokenizer(smollm2_gguf).backend_tokenizer  # pyright: ignore[reportReturnType]


def stream(tokenizer: Tokenizer, prompt: str, ids: list[int], params: SamplingParams) -> tuple[list[str], str]:
    """The pieces as they are delivered, and the stop string that was found."""
    detokenizer = Detokenizer(tokenizer, tokenizer.encode(prompt).ids, params)
    pieces: list[str] = []
    for position, token in enumerate(ids):
        stop = detokenizer.append(token)
        finished = stop is not None or position == len(ids) - 1
        pieces.append(detokenizer.delta(finished))
        if stop is not None:
            return pieces, stop
    return pieces, ""


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
def test_pieces_add_up_to_the_text(byte_level: Tokenizer, kind: str, text: str):
    tokenizer = byte_level if kind == "byte level" else byte_fallback()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    pieces, _ = stream(tokenizer, "a prompt", ids, SamplingParams())
    whole = tokenizer.decode(tokenizer.encode("a prompt").ids + ids)
    assert "".join(pieces) == whole[len(tokenizer.decode(tokenizer.encode("a prompt").ids)) :]
    assert "".join(pieces).strip() == text.strip()
    if max(text) < "\u2e80":
        return
    assert any(not piece for piece in pieces), "some token is only a part of a character"
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(WordPiece({"ab": 0, "##c": 1, ",": 2, "[UNK]": 3}, unk_token="[UNK]"))  # pyright: ignore[reportCallIssue]
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    tokenizer.add_special_tokens(["[A]", "[B]"])
    return tokenizer


@pytest.mark.parametrize("kind", ["byte level", "byte fallback", "word piece"])
@given(data=st.data())
def test_the_text_of_all_tokens_is_that_of_one_by_one(byte_level: Tokenizer, kind: str, data: st.DataObject):
    """Of whatever tokens: halves of characters, bytes that are none, special ones, in the prompt and behind it."""
    tokenizer = {"byte level": lambda: byte_level, "byte fallback": byte_fallback, "word piece": word_piece}[kind]()
    texts = st.sampled_from(TEXTS).map(lambda text: tokenizer.encode(text, add_special_tokens=False).ids)
    cut = st.tuples(texts, st.integers(0, 30), st.integers(0, 30)).map(lambda drawn: drawn[0][drawn[1] :][: drawn[2]])
    anything = st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=12)
    ids = st.lists(cut | anything, max_size=4).map(lambda parts: sum(parts, []))
    prompt, answer = data.draw(ids), data.draw(ids)
    params = SamplingParams(skip_special_tokens=data.draw(st.booleans()))
    together, by_one = (Detokenizer(tokenizer, prompt, params) for _ in range(2))
    together.extend(answer, last=True)
    for token_id in answer:
        by_one.append(token_id)
    assert together.text == by_one.text


def bytes_only() -> Tokenizer:
    """Every byte is a token, and its own id."""
    tokenizer = Tokenizer(BPE({f"<0x{byte:02X}>": byte for byte in range(256)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def test_a_prompt_that_ends_inside_a_character_stays_out_of_the_output(byte_level: Tokenizer):
    prompt = [byte_level.encode(letter).ids[0] for letter in "my secret "]
    halves = byte_level.encode("😀").ids
    assert len(halves) > 1, "the character is several tokens"
    params = SamplingParams(stop=["secret", "cret"])
    for ids, text in (
        (halves[1:], "😀"),
        (byte_level.encode("a plan").ids, "a plan"),
        (halves[1:] + halves[:1], "😀"),
    ):
        detokenizer = Detokenizer(byte_level, [*prompt, halves[0]], params)
        assert [detokenizer.append(token_id) for token_id in ids] == [None] * len(ids)
        assert detokenizer.text == text
        detokenizer = Detokenizer(byte_level, [*prompt, halves[0]], SamplingParams())
        detokenizer.extend(ids, last=True)
        assert detokenizer.text == text


@given(text=st.text(alphabet="a b😀é漢", max_size=12), data=st.data())
@pytest.mark.parametrize("kind", ["byte level", "bytes"])
def test_wherever_the_prompt_ends_the_output_is_what_it_adds(
    byte_level: Tokenizer, kind: str, text: str, data: st.DataObject
):
    """The oracle is Python's decoder: the output is the text of both without that of the prompt, whose unfinished
    character belongs to the output that finishes it.
    """
    text += "."
    spelled = text.encode()
    if kind == "bytes":
        tokenizer, ids = bytes_only(), list(spelled)
        cut = data.draw(st.integers(0, len(ids)))
        before = spelled[:cut]
    else:
        tokenizer, ids = byte_level, byte_level.encode(text, add_special_tokens=False).ids
        cut = data.draw(st.integers(0, len(ids)))
        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
        before = bytes(byte_of[character] for i in ids[:cut] for character in tokenizer.id_to_token(i) or "")
    finished = codecs.getincrementaldecoder("utf-8")().decode(before)
    detokenizer = Detokenizer(tokenizer, ids[:cut], SamplingParams())
    for token_id in ids[cut:]:
        detokenizer.append(token_id)
    assert detokenizer.text == text[len(finished) :]


@given(
    text=st.text(alphabet="ab😀é ", max_size=40),
    stops=st.lists(st.text(alphabet="ab😀é ", min_size=1, max_size=4), max_size=3),
    include=st.booleans(),
    min_tokens=st.integers(0, 6),
)
def test_stop_strings_end_the_text_where_they_first_end(text: str, stops: list[str], include: bool, min_tokens: int):
    ids = list(text.encode())
    params = SamplingParams(stop=stops, include_stop_str_in_output=include, min_tokens=min_tokens)
    pieces, found = stream(bytes_only(), "", ids, params) if ids else ([], "")
    # the oracle: characters come one at a time, and after each the text ends if it ends with a stop string, the first
    # of the list, unless one of the first `min_tokens` tokens (bytes) has completed it
    expected, stopped = text, ""
    for end in range(1, len(text) + 1):
        ending = next((stop for stop in stops if text[:end].endswith(stop)), "")
        if ending and len(text[:end].encode()) > min_tokens:
            expected, stopped = text[: end if include else end - len(ending)], ending
            break
    assert ("".join(pieces), found) == (expected, stopped)


@pytest.mark.parametrize(("stops", "text", "reason"), [(["b", "ab"], "a", "b"), (["ab", "b"], "", "ab")])
def test_of_stop_strings_that_end_together_the_first_counts(stops: list[str], text: str, reason: str):
    pieces, found = stream(bytes_only(), "", list(b"ab"), SamplingParams(stop=stops))
    assert ("".join(pieces), found) == (text, reason)


@given(text=st.text(alphabet="abc", max_size=30), stop=st.text(alphabet="abc", min_size=1, max_size=5))
def test_nothing_is_delivered_that_a_stop_string_takes_back(text: str, stop: str):
    detokenizer = Detokenizer(bytes_only(), [], SamplingParams(stop=[stop]))
    delivered = ""
    for token in text.encode():
        if detokenizer.append(token) is not None:
            break
        delivered += detokenizer.delta(False)
        assert delivered == detokenizer.visible(False)
    assert detokenizer.text.startswith(delivered)


@pytest.mark.parametrize(("spaces", "text"), [(True, "[A] [B] ab [A]"), (False, "[A][B] ab [A]")])
def test_spaces_between_special_tokens(spaces: bool, text: str):
    tokenizer = Tokenizer(WordPiece({"ab": 0, "[UNK]": 1}, unk_token="[UNK]"))  # pyright: ignore[reportCallIssue]
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.add_special_tokens(["[A]", "[B]"])
    ids = [2, 3, 0, 2]
    params = SamplingParams(skip_special_tokens=False, spaces_between_special_tokens=spaces)
    pieces, _ = stream(tokenizer, "", ids, params)
    assert "".join(pieces) == text
    assert tokenizer.decode(ids, skip_special_tokens=False) == "[A] [B] ab [A]"
