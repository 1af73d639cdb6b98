"""Token ids against llama.cpp's and SentencePiece's.

``data/llama_cpp_token_ids.json.gz`` holds 429 texts and what llama.cpp's ``/tokenize`` made of them for SmolLM2 and
Qwen2.5, with special tokens parsed and not; ``data/llama_cpp_pre_tokenizers.json.gz`` the same for every known
``tokenizer.ggml.pre`` over one small vocabulary whose merges cross every boundary that a pre-tokenizer could draw.
Their ``oracle`` key gives the version; the tests marked ``peer`` ask llama.cpp again.

Four things are the models' own tokenizers' and not llama.cpp's. It knows no NFC: Qwen's texts are compared after NFC.
It makes any token spelled ``</s>`` a control token: no text has one. Its ``tekken`` takes non-ASCII letters for
caseless: such texts are ``null`` there. Six control characters have no token in SmolLM2 and vanish in both, but
llama.cpp then does not merge their neighbours: recorded texts have them alone or between letters, random ones not.
"""

from __future__ import annotations

import functools
import gzip
import io
import json
import random
import subprocess
import sys
import unicodedata
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxllm.tokenization.gguf import backend_from_gguf, tokenizer_from_gguf
from jaxllm.tokenization.gguf_pre_tokenizers import PRE_TOKENIZATIONS
from jaxllm.tokenization.load import load_tokenizer
from jaxllm.weights.errors import WeightsError
from jaxllm.weights.formats.gguf import read_metadata

DATA = Path(__file__).parent.parent / "data"
WITHOUT_TOKEN_IN_SMOLLM2 = str.maketrans("", "", "\x04\x06\x13\x14\x16\x1d")
MODELS = {"smollm2_gguf": "smollm2-135m-instruct", "qwen25_gguf": "qwen2.5-coder-0.5b-instruct"}


def recorded(name: str) -> dict[str, Any]:
    return json.loads(gzip.decompress((DATA / name).read_bytes()))


def as_compared(fixture: str, text: str) -> str:
    return unicodedata.normalize("NFC", text) if fixture == "qwen25_gguf" else text


@functools.cache
def loaded(path: Path) -> Any:
    return load_tokenizer(path)


@pytest.fixture(scope="module", params=list(MODELS))
def model(request: pytest.FixtureRequest) -> tuple[str, Path, Any]:
    path = request.getfixturevalue(request.param)
    return request.param, path, loaded(path)


def test_ids_are_llama_cpps(model: tuple[str, Path, Any]) -> None:
    fixture, _, tokenizer = model
    oracle = recorded("llama_cpp_token_ids.json.gz")
    texts = [as_compared(fixture, text) for text in oracle["texts"]]
    assert len(texts) >= 400
    for mode, plain in (("special", False), ("plain", True)):
        ids = tokenizer(texts, add_special_tokens=False, split_special_tokens=plain)["input_ids"]
        wrong = [
            (text, seen, expected)
            for text, seen, expected in zip(texts, ids, oracle[MODELS[fixture]][mode], strict=True)
            if seen != expected
        ]
        assert not wrong, f"{len(wrong)} of {len(texts)} texts differ ({mode}); the first: {wrong[0]}"


def test_decoding_gives_the_text_back(model: tuple[str, Path, Any]) -> None:
    fixture, _, tokenizer = model
    for text in recorded("llama_cpp_token_ids.json.gz")["texts"]:
        # What the model's own tokenizer normalises or has no token for does not come back.
        expected = as_compared(fixture, text)
        if fixture == "smollm2_gguf":
            expected = expected.translate(WITHOUT_TOKEN_IN_SMOLLM2)
        assert tokenizer.decode(tokenizer.encode(text)) == expected


def test_special_ids_flags_and_template_are_the_files(model: tuple[str, Path, Any]) -> None:
    _, path, tokenizer = model
    metadata = read_metadata(path)
    for name, seen in (
        ("bos", tokenizer.bos_token_id),
        ("eos", tokenizer.eos_token_id),
        ("unknown", tokenizer.unk_token_id),
        ("padding", tokenizer.pad_token_id),
    ):
        assert seen == metadata.get(f"tokenizer.ggml.{name}_token_id")
    tokens = metadata["tokenizer.ggml.tokens"]
    assert len(tokenizer) == len(tokens)
    assert tokenizer.convert_ids_to_tokens(list(range(len(tokens)))) == tokens
    assert tokenizer.chat_template == metadata["tokenizer.chat_template"]
    assert tokenizer.encode("hi") == tokenizer.encode("hi", add_special_tokens=False)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(tokenizer.encode(chat), skip_special_tokens=True).count("<|") == 0
    control = [i for i, kind in enumerate(metadata["tokenizer.ggml.token_type"]) if kind == 3]
    assert control and set(control) <= set(tokenizer.added_tokens_decoder)
    assert all(tokenizer.added_tokens_decoder[i].special for i in control)


def test_smollm2_takes_digits_one_by_one(smollm2_gguf: Path) -> None:
    tokenizer = loaded(smollm2_gguf)
    assert tokenizer.tokenize("x 2026") == ["x", "Ġ", "2", "0", "2", "6"]


def test_qwen_normalises_to_nfc(qwen25_gguf: Path) -> None:
    tokenizer = loaded(qwen25_gguf)
    decomposed = "e\u0301 a\u030a \u1112\u1161\u11ab"
    composed = "\u00e9 \u00e5 \ud55c"
    assert tokenizer.encode(decomposed) == tokenizer.encode(composed)
    assert tokenizer.decode(tokenizer.encode(decomposed)) == composed


@pytest.mark.parametrize("pre", list(PRE_TOKENIZATIONS))
def test_every_pre_tokenizer_splits_as_llama_cpps(pre: str) -> None:
    oracle = recorded("llama_cpp_pre_tokenizers.json.gz")
    tokenizer = backend_from_gguf(oracle["metadata"] | {"tokenizer.ggml.pre": pre})
    compared = 0
    for text, expected in zip(oracle["texts"], oracle["ids"][pre], strict=True):
        if expected is not None:
            assert tokenizer.encode(text).ids == expected, text
            compared += 1
    assert compared > 100


def sentencepiece_metadata(processor: Any) -> dict[str, Any]:
    size = processor.vocab_size()
    kinds = [
        2 if processor.is_unknown(i) else 3 if processor.is_control(i) else 6 if processor.is_byte(i) else 1
        for i in range(size)
    ]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [processor.id_to_piece(i) for i in range(size)],
        "tokenizer.ggml.scores": [processor.get_score(i) for i in range(size)],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": processor.bos_id(),
        "tokenizer.ggml.eos_token_id": processor.eos_id(),
        "tokenizer.ggml.unknown_token_id": processor.unk_id(),
    }


@pytest.fixture(scope="module")
def sentencepiece() -> Any:
    """A SentencePiece BPE model with Llama 2's settings, trained on repetitive text: many ways to build each piece."""
    module = pytest.importorskip("sentencepiece")
    rng = random.Random(3)
    parts = ["a", "b", "ab", "ba", "aab", "  ", "    ", "the", "er", "-", "--", "==", "0", "12", "\u00e9"]
    lines = ["".join(rng.choice(parts) + rng.choice(["", "", " "]) for _ in range(40)) for _ in range(400)]
    stored = io.BytesIO()
    module.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=stored,
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return module.SentencePieceProcessor(model_proto=stored.getvalue())


@pytest.fixture(scope="module")
def sentencepiece_backend(sentencepiece: Any) -> Any:
    return backend_from_gguf(sentencepiece_metadata(sentencepiece))


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.one_of(
        st.text(),
        st.lists(
            st.sampled_from(["a", "b", " ", "-", "=", "the", "er", "0", "1", "2", "\u00e9", "\n"]), max_size=80
        ).map("".join),
    )
)
def test_sentencepiece_ids_and_text(sentencepiece: Any, sentencepiece_backend: Any, text: str) -> None:
    # The space mark itself reads as a space: to SentencePiece too, so it alone does not come back. Zero ends its input.
    text = text.replace("\u2581", "").replace("\0", "")
    ids = sentencepiece_backend.encode(text).ids
    assert ids == sentencepiece.encode(text)
    assert sentencepiece_backend.decode(ids) == text


def test_scores_not_ids_order_the_merges(sentencepiece: Any) -> None:
    metadata = sentencepiece_metadata(sentencepiece)
    order = list(range(len(metadata["tokenizer.ggml.tokens"])))
    random.Random(5).shuffle(order)
    per_token = ("tokens", "scores", "token_type")
    shuffled: dict[str, Any] = {
        f"tokenizer.ggml.{key}": [metadata[f"tokenizer.ggml.{key}"][i] for i in order] for key in per_token
    }
    shuffled["tokenizer.ggml.unknown_token_id"] = order.index(sentencepiece.unk_id())
    backend = backend_from_gguf(metadata | shuffled)
    for text in ("aabab  ba", "the the ab--==12", "baab    aab er\u00e9\u00e8", "aaaaabbbbb"):
        assert [order[i] for i in backend.encode(text).ids] == sentencepiece.encode(text)


def test_sentencepiece_specials_and_bos(sentencepiece: Any) -> None:
    metadata = sentencepiece_metadata(sentencepiece)
    tokenizer = tokenizer_from_gguf(metadata)
    # llama.cpp starts every stretch of text with a space, after a special token too; Llama 2's own tokenizer as well.
    first, second = sentencepiece.encode("ab the"), sentencepiece.encode("ba")
    assert tokenizer.encode("ab the</s>ba") == [1, *first, 2, *second]
    assert tokenizer.encode("ab the", add_special_tokens=False) == first
    ends = tokenizer_from_gguf(metadata | {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": True})
    assert ends.encode("ab the") == [*first, 2]
    bare = tokenizer_from_gguf(metadata | {"tokenizer.ggml.add_space_prefix": False})
    assert bare.decode(bare.encode(" the", add_special_tokens=False)) == " the"
    assert bare.encode("a", add_special_tokens=False) == [sentencepiece.piece_to_id("a")]


def test_what_cannot_be_built_is_refused(tmp_path: Path) -> None:
    good = recorded("llama_cpp_pre_tokenizers.json.gz")["metadata"]
    tokens = good["tokenizer.ggml.tokens"]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"pre": "never-heard"}, r"'never-heard' is not known; known are default, gpt-2, smollm"),
        ({"model": "bert"}, r"'bert' is not known; known are gpt2, llama"),
        ({"tokens": None}, r"tokens is missing, expected a list of str"),
        ({"tokens": [*tokens[:-1], tokens[0]]}, r"twice; every token must have one id"),
        ({"token_type": [1]}, r"token_type has 1 entries for"),
        ({"merges": ["nospace"]}, r"merges holds 'nospace'"),
        ({"merges": ["\u20ac \u20ac"]}, r"merges do not fit"),
        ({"eos_token_id": len(tokens)}, r"eos_token_id is \d+, outside"),
        ({"add_bos_token": True}, r"add_bos_token is on but the file names no bos_token_id"),
        ({"add_bos_token": "yes"}, r"add_bos_token is 'yes', expected a value of type bool"),
        ({"model": "llama"}, r"scores is missing"),
    ]
    for change, message in cases:
        metadata = good | {f"tokenizer.ggml.{key}": value for key, value in change.items()}
        with pytest.raises(WeightsError, match=message):
            tokenizer_from_gguf(metadata)
    with pytest.raises(WeightsError, match="no such file or directory"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(WeightsError, match=r"tokenizer.json is missing.* tokenizer=.*skip_tokenizer_init=True"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(WeightsError, match="its tokenizer cannot be loaded: .*skip_tokenizer_init=True"):
        load_tokenizer(tmp_path)


def test_a_hugging_face_directory_is_loaded_as_it_is(tmp_path: Path) -> None:
    good = recorded("llama_cpp_pre_tokenizers.json.gz")["metadata"]
    original = tokenizer_from_gguf(good | {"tokenizer.ggml.pre": "smollm", "tokenizer.ggml.eos_token_id": 5})
    original.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.eos_token_id == 5
    for text in recorded("llama_cpp_pre_tokenizers.json.gz")["texts"]:
        assert again.encode(text) == original.encode(text)


@pytest.fixture
def llama_cpp(model: tuple[str, Path, Any]) -> Callable[[str, bool], list[int]]:
    """llama.cpp's tokenizer, through its in-process server on the loopback interface."""
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(model[1])
    params.n_ctx = params.n_batch = params.n_ubatch = 64
    params.n_parallel = params.cpuparams.n_threads = 1
    params.warmup = params.fit_params = False
    params.verbosity, params.port = -1, 0
    server = xllamacpp.Server(params)

    def tokenize(text: str, special: bool) -> list[int]:
        body = json.dumps({"content": text, "add_special": False, "parse_special": special}).encode()
        request = urllib.request.Request(
            f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)["tokens"]

    return tokenize


@pytest.mark.peer
def test_ids_are_llama_cpps_live(model: tuple[str, Path, Any], llama_cpp: Callable[[str, bool], list[int]]) -> None:
    fixture, _, tokenizer = model
    texts = recorded("llama_cpp_token_ids.json.gz")["texts"]
    rng = random.Random(11)
    # New texts too: stretches of the recorded ones, cut anywhere and put together in another order.
    whole = "".join(texts).translate(WITHOUT_TOKEN_IN_SMOLLM2)
    for _ in range(600):
        starts = [rng.randrange(len(whole)) for _ in range(rng.randint(1, 5))]
        texts.append("".join(whole[at : at + rng.randint(1, 30)] for at in starts).replace("</s", ""))
    for text in (as_compared(fixture, text) for text in texts):
        for special in (True, False):
            seen = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=not special)
            assert seen == llama_cpp(text, special), text


def test_several_threads_may_load_one_in_a_new_process(smollm2_gguf: Path) -> None:
    code = (
        "import concurrent.futures, sys\n"
        "from jaxllm.tokenization.load import load_tokenizer\n"
        "with concurrent.futures.ThreadPoolExecutor(4) as pool:\n"
        "    print(*[len(tokenizer) for tokenizer in pool.map(load_tokenizer, 4 * sys.argv[1:])])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(smollm2_gguf)], capture_output=True, text=True, check=False)
    assert done.stdout.split() == 4 * ["49152"], done.stderr
