"""Tokenizers from Mistral's own files, against mistral_common: small files of both kinds, made here."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.mistral_files import write_sentencepiece, write_tekken
from support.tiny_model import CONFIG, SMALL, write_tiny_model

from jaxllm import LLM, SamplingParams
from jaxllm.api.errors import ValidationError
from jaxllm.tokenization.chat import ChatRenderer
from jaxllm.tokenization.load import load_tokenizer
from jaxllm.tokenization.pool import encode
from jaxllm.weights.errors import WeightsError

TEXTS = [
    "The quick brown fox",
    " a rose is a rose",
    "cafés, naïve; 日本語 😀\n\n  x  ",
    "[INST] spelled, not meant [/INST]</s>",
    "",
    "12 3456",
]
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Who is the quick fox?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "[INST] What is a rose?"},
        {"role": "assistant", "content": "A rose is a rose."},
        {"role": "user", "content": "Why?"},
    ],
]
TOOLS = [{"type": "function", "function": {"name": "smell", "description": "", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module", params=["tekken v3", "tekken v7", "sentencepiece"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "-"))
    if request.param == "sentencepiece":
        write_sentencepiece(folder)
    else:
        write_tekken(folder, request.param.split()[1])
    return folder


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    pytest.importorskip("mistral_common")
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    (file,) = [file for file in folder.iterdir() if file.name in ("tekken.json", "tokenizer.model.v3")]
    return MistralTokenizer.from_file(str(file))


def test_texts_get_their_ids_and_are_read_back(folder: Path, theirs: Any):
    tokenizer = load_tokenizer(folder, "mistral")
    inner = theirs.instruct_tokenizer.tokenizer
    for special in (True, False):
        expected = [inner.encode(text, bos=special, eos=False) for text in TEXTS]
        assert encode(tokenizer, TEXTS, special_tokens=special) == expected
        assert [encode(tokenizer, [text], special_tokens=special)[0] for text in TEXTS] == expected
    for text in TEXTS:
        ids = inner.encode(text, bos=True, eos=True)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (inner.bos_id, inner.eos_id)
    assert tokenizer.backend_tokenizer.get_vocab_size() >= inner.n_words - 4  # pyright: ignore
    # where there is nothing else, nobody has to ask for it
    assert encode(load_tokenizer(folder), TEXTS, special_tokens=True) == encode(tokenizer, TEXTS, special_tokens=True)


def test_conversations_are_theirs(folder: Path, theirs: Any):
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    renderer = ChatRenderer(load_tokenizer(folder, "mistral"), None)
    for messages in CHATS:
        for tools in (None, TOOLS):
            request = ChatCompletionRequest.from_openai(messages=messages, tools=tools)
            expected = theirs.encode_chat_completion(request).tokens
            assert renderer.render(messages, tools=tools, add_generation_prompt=True) == expected
    begun = [*CHATS[0], {"role": "assistant", "content": "It is"}]
    request = ChatCompletionRequest.from_openai(messages=begun, continue_final_message=True)
    expected = theirs.encode_chat_completion(request).tokens
    assert renderer.render(begun, continue_final_message=True, add_generation_prompt=False) == expected


@pytest.mark.parametrize(
    ("messages", "options", "message"),
    [
        (CHATS[0], {"template": "{{ messages }}"}, "chat_template is not supported for Mistral tokenizers"),
        (CHATS[0], {"some_option": 1}, "'some_option', which Mistral's tokenizers do not take"),
        (CHATS[0], {"continue_final_message": True, "add_generation_prompt": False}, "last message is not from the as"),
        (CHATS[1][:3], {}, "Cannot set `add_generation_prompt` to True when the last message is from the assistant"),
        ([{"role": "nobody", "content": "x"}], {}, "mistral_common cannot tokenize the conversation"),
    ],
)
def test_what_they_do_not_take_is_refused(
    folder: Path, theirs: Any, messages: list[dict[str, Any]], options: dict[str, Any], message: str
):
    with pytest.raises(ValidationError, match=message):
        ChatRenderer(load_tokenizer(folder, "mistral"), None).render(messages, **options)
    with pytest.raises(ValidationError, match="chat_template is not supported"):
        ChatRenderer(load_tokenizer(folder, "mistral"), "{{ messages }}")


def test_a_missing_package_or_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(WeightsError, match=r"reads tekken.json or tokenizer.model.v\*, and there is neither"):
        load_tokenizer(tmp_path, "mistral")
    write_tekken(tmp_path, "v3")
    for module in ("mistral_common", "mistral_common.protocol.instruct.validator"):  # it may have been imported
        monkeypatch.setitem(sys.modules, module, None)
    for mode in ("mistral", "auto"):
        with pytest.raises(ValidationError, match=r"needs mistral_common.*pip install"):
            load_tokenizer(tmp_path, mode)
    monkeypatch.undo()
    pytest.importorskip("mistral_common")
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(WeightsError, match="mistral_common cannot read it"):
        load_tokenizer(tmp_path, "mistral")


def test_hugging_faces_files_come_first(tmp_path: Path):
    """Whether mistral_common is installed or not."""
    write_tiny_model(tmp_path)
    expected = encode(load_tokenizer(tmp_path), TEXTS, special_tokens=True)
    write_tekken(tmp_path, "v3")
    for mode in ("auto", "hf", "slow"):
        assert encode(load_tokenizer(tmp_path, mode), TEXTS, special_tokens=True) == expected


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LLM, Any]]:
    pytest.importorskip("mistral_common")
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    folder = tmp_path_factory.mktemp("mistral-engine")
    write_tekken(folder, "v7")
    (folder / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": 360, "eos_token_id": 2}))
    with LLM(folder, tokenizer_mode="mistral", load_format="dummy", **SMALL) as llm:
        yield llm, MistralTokenizer.from_file(str(folder / "tekken.json"))


def test_an_engine_talks_through_it(engine: tuple[LLM, Any]):
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    llm, theirs = engine
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=1)
    for messages in CHATS:
        (output,) = llm.chat(messages, params, use_tqdm=False)
        expected = theirs.encode_chat_completion(ChatCompletionRequest.from_openai(messages=messages)).tokens
        assert output.prompt_token_ids == expected
        whole = llm.get_tokenizer().decode(output.outputs[0].token_ids, skip_special_tokens=True)
        assert isinstance(whole, str)
        assert whole.rstrip("\ufffd") == output.outputs[0].text.rstrip("\ufffd")  # the last character may have begun
    (output,) = llm.generate(TEXTS[3], params, use_tqdm=False)
    assert output.prompt_token_ids == theirs.instruct_tokenizer.tokenizer.encode(TEXTS[3], bos=True, eos=False)
    choice = SamplingParams(temperature=0, max_tokens=20, structured_outputs={"choice": ["a rose", "a fox"]})  # pyright: ignore
    (output,) = llm.chat(CHATS[0], choice, use_tqdm=False)
    assert output.outputs[0].text in ("a rose", "a fox")
