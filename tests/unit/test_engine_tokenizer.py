"""The tokenizer that an engine begins with does what transformers' one does, and does not import it."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.tiny_model import write_tiny_model
from tokenizers import normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jaxllm.engine.io.pooling_inputs import PoolingReader, TextPair
from jaxllm.engine.io.prompts import PromptReader
from jaxllm.tokenization.chat import ChatRenderer
from jaxllm.tokenization.engine_tokenizer import EngineTokenizer
from jaxllm.tokenization.gguf import backend_from_gguf, described_tokenizer
from jaxllm.tokenization.kept import KeptTokenizer
from jaxllm.tokenization.load import load_engine_tokenizer
from jaxllm.tokenization.pool import encode
from jaxllm.weights.errors import WeightsError
from jaxllm.weights.formats.gguf import read_metadata

TEXTS = ["The capital of France is", " a  b\n\n\tc", "naïve 日本語 🙂", "<|im_start|>user\nhi<|im_end|>", "it 's , x ."]
DATA = Path(__file__).parents[1] / "data"


def small_metadata() -> dict[str, Any]:
    recorded = json.loads(gzip.decompress((DATA / "llama_cpp_pre_tokenizers.json.gz").read_bytes()))
    return recorded["metadata"] | {"tokenizer.ggml.pre": "smollm"}


def by_transformers(metadata: dict[str, Any], **added: bool) -> Any:
    """What transformers makes of a backend that has no tokens around texts, and of the names of special tokens."""
    tokens = metadata["tokenizer.ggml.tokens"]
    ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "unknown", "padding")}
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    special = {names[name]: tokens[token_id] for name, token_id in ids.items() if token_id is not None}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend_from_gguf(metadata),
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **special,
        **added,
    )


@pytest.mark.parametrize(
    ("bos", "eos"), [(None, None), (3, None), (None, 5), (3, 5), (3, 3)], ids=["none", "bos", "eos", "both", "the same"]
)
@pytest.mark.parametrize("named", [False, True])
def test_a_gguf_files_backend_is_what_transformers_makes_of_it(bos: int | None, eos: int | None, named: bool):
    """Tokens 3 and 5 are ordinary ones by their kind, and become special by their part."""
    metadata = small_metadata() | {"tokenizer.ggml.unknown_token_id": 0}
    begins, ends = bos is not None and not named, eos is not None and not named
    for name, token in (("bos", bos), ("eos", eos)):
        if token is not None:
            metadata[f"tokenizer.ggml.{name}_token_id"] = token
    metadata |= {"tokenizer.ggml.add_bos_token": begins, "tokenizer.ggml.add_eos_token": ends}
    expected = by_transformers(metadata, add_bos_token=begins, add_eos_token=ends)
    backend, options = described_tokenizer(metadata)
    assert json.loads(backend.to_str()) == json.loads(expected.backend_tokenizer.to_str())
    assert (options.get("bos_token"), options.get("eos_token")) == (expected.bos_token, expected.eos_token)
    for text in TEXTS:
        assert backend.encode(text).ids == expected.encode(text)
        assert backend.encode(text, "hi").ids == expected(text, "hi")["input_ids"]


def test_smollm2s_backend_is_what_transformers_makes_of_it(smollm2_gguf: Path):
    metadata = read_metadata(smollm2_gguf)
    expected = by_transformers(metadata, add_bos_token=False, add_eos_token=False)
    found: Any = load_engine_tokenizer(smollm2_gguf)
    assert isinstance(found, EngineTokenizer)
    assert json.loads(found.backend_tokenizer.to_str()) == json.loads(expected.backend_tokenizer.to_str())
    assert found.eos_token_id == expected.eos_token_id
    check_alike(found, expected)


def check_alike(found: EngineTokenizer, expected: Any) -> None:
    """Before and after transformers' one is there."""
    for _ in range(2):
        for special in (False, True):
            assert encode(found, TEXTS, special_tokens=special) == [  # pyright: ignore[reportArgumentType]
                expected.encode(text, add_special_tokens=special) for text in TEXTS
            ]
            for text in TEXTS:
                ids = encode(found, [text], special_tokens=special)[0]  # pyright: ignore[reportArgumentType]
                assert ids == expected.encode(text, add_special_tokens=special)
                assert found.decode(ids) == expected.decode(ids)
                assert found.decode(ids, skip_special_tokens=True) == expected.decode(ids, skip_special_tokens=True)
        assert found.eos_token_id == expected.eos_token_id
        assert found.all_special_ids == expected.all_special_ids and len(found) == len(expected)
        assert found.chat_template == expected.chat_template
        assert found.backend_tokenizer is found.whole.backend_tokenizer  # pyright: ignore


@pytest.mark.parametrize("form", ["plain", "with a beginning", "SmolLM2's", "MiniLM's"])
def test_a_folders_tokenizer_is_kept_as_transformers_makes_it(tmp_path: Path, form: str, request: Any):
    folder, kept = tmp_path / "model", tmp_path / "kept"
    folder.mkdir()
    if form == "MiniLM's":
        folder = request.getfixturevalue("minilm")
    elif form == "SmolLM2's":
        load_engine_tokenizer(request.getfixturevalue("smollm2_gguf")).whole.save_pretrained(folder)  # pyright: ignore
    else:
        write_tiny_model(folder)
    if form == "with a beginning":
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config |= {"bos_token": "<begin>", "add_bos_token": True, "extra_special_tokens": ["<|im_start|>"]}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    expected = AutoTokenizer.from_pretrained(folder)
    first = load_engine_tokenizer(folder, kept=kept)
    assert isinstance(first, PreTrainedTokenizerFast) and len(list(kept.iterdir())) == 1
    found = load_engine_tokenizer(folder, kept=kept)
    assert isinstance(found, EngineTokenizer)
    check_alike(found, expected)


def test_what_has_changed_or_is_damaged_is_made_anew(tmp_path: Path):
    folder, kept = write_tiny_model(tmp_path), tmp_path / "kept"
    load_engine_tokenizer(folder, kept=kept)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "a"}))
    assert isinstance(load_engine_tokenizer(folder, kept=kept), PreTrainedTokenizerFast)
    found = load_engine_tokenizer(folder, kept=kept)
    assert isinstance(found, EngineTokenizer) and found.eos_token_id == found.encode("a")[0]
    for file in kept.iterdir():
        file.write_bytes(file.read_bytes()[:-9])
    assert isinstance(load_engine_tokenizer(folder, kept=kept), PreTrainedTokenizerFast)
    assert isinstance(load_engine_tokenizer(folder, kept=kept), EngineTokenizer)


@pytest.mark.parametrize("setting", ["split_special_tokens", "clean_up_tokenization_spaces"])
def test_what_a_backend_does_not_say_is_not_kept(tmp_path: Path, setting: str):
    folder = write_tiny_model(tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, setting: True}))
    for _ in range(2):
        assert isinstance(load_engine_tokenizer(folder, kept=tmp_path / "kept"), PreTrainedTokenizerFast)


def test_transformers_is_not_imported(smollm2_gguf: Path, tmp_path: Path):
    folder, kept = write_tiny_model(tmp_path), tmp_path / "kept"
    load_engine_tokenizer(folder, kept=kept)
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from jaxllm.tokenization.load import load_engine_tokenizer\n"
        "for path in sys.argv[1:3]:\n"
        "    tokenizer = load_engine_tokenizer(path, kept=Path(sys.argv[3]))\n"
        "    print(tokenizer.decode(tokenizer.encode('a b')))\n"
        "print('transformers' in sys.modules)\n"
    )
    command = [sys.executable, "-c", code, str(smollm2_gguf), str(folder), str(kept)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["a b", "a b", "False"], done.stderr


@pytest.mark.parametrize("is_kept", [False, True])
def test_what_a_users_call_has_set_does_not_change_prompts(tmp_path: Path, is_kept: bool):
    """`LLM.get_tokenizer()` is the engine's own, and transformers' calls leave their options behind."""
    folder, kept = write_tiny_model(tmp_path), tmp_path / "kept"
    tokenizer: Any = load_engine_tokenizer(folder, kept=kept)
    if is_kept:
        tokenizer = load_engine_tokenizer(folder, kept=kept)
    reader = PromptReader(tokenizer, ChatRenderer(tokenizer, None), 257)
    pairs = PoolingReader(reader, tokenizer, lower_case=False)
    texts = ["a b c <eos>", "d"]

    def ids() -> list[list[int]]:
        found: list[Any] = [*reader.read([*texts]), *pairs.read([TextPair(*texts)])]
        return [prompt.token_ids for prompt in found]

    before = ids()
    assert [len(each) for each in before] == [7, 1, 8]
    users = tokenizer.whole if is_kept else tokenizer
    for options in ({"truncation": True, "max_length": 2}, {"padding": True}, {"split_special_tokens": True}):
        users.pad_token = "a"
        users(texts, **options)
        assert ids() == before
    users.backend_tokenizer.normalizer = normalizers.Replace("d", "dd")
    assert [len(each) for each in ids()] == [7, 2, 9]


def test_the_folder_is_the_same_wherever_the_process_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "model"
    folder.mkdir()
    write_tiny_model(folder)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        found = load_engine_tokenizer("model", kept=tmp_path / "kept")
    monkeypatch.chdir(folder)
    assert isinstance(found, EngineTokenizer) and len(found) == 257


@pytest.mark.parametrize("form", ["plain", "SmolLM2's", "MiniLM's"])
def test_a_folder_that_is_gone_after_the_start_is_not_missed(tmp_path: Path, form: str, request: Any):
    """By conversations and special tokens, which are of its files."""
    folder, kept = tmp_path / "model", tmp_path / "kept"
    folder.mkdir()
    if form == "MiniLM's":
        for file in request.getfixturevalue("minilm").iterdir():
            if file.suffix in (".json", ".txt"):
                shutil.copy(file, folder)
    elif form == "SmolLM2's":
        load_engine_tokenizer(request.getfixturevalue("smollm2_gguf")).whole.save_pretrained(folder)  # pyright: ignore
    else:
        write_tiny_model(folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "short.jinja").write_text("{{ messages[0].content }}")
    expected: Any = load_engine_tokenizer(folder, kept=kept)
    assert set(expected.chat_template) >= {"short"}
    found: Any = load_engine_tokenizer(folder, kept=kept)
    assert isinstance(found, EngineTokenizer)
    shutil.rmtree(folder)
    check_alike(found, expected)
    assert found.name_or_path == str(folder) and type(found.whole) is type(expected)
    hi = [{"role": "user", "content": "hi"}]
    rendered = found.apply_chat_template(hi, chat_template="short", tokenize=False)
    assert rendered == expected.apply_chat_template(hi, chat_template="short", tokenize=False) == "hi"


def test_a_folder_that_has_become_another_models_is_not_read(tmp_path: Path):
    """A link that was moved, before the first conversation."""
    folder, kept = write_tiny_model(tmp_path), tmp_path / "kept"
    expected: Any = load_engine_tokenizer(folder, kept=kept)
    found: Any = load_engine_tokenizer(folder, kept=kept)
    assert isinstance(found, EngineTokenizer)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocab: dict[str, int] = content["model"]["vocab"]
    content["model"]["vocab"] = {text: (number + 1) % 250 if number < 250 else number for text, number in vocab.items()}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "chat_template.jinja").write_text("another one")
    other: Any = load_engine_tokenizer(folder)
    assert other.encode(TEXTS[0]) != expected.encode(TEXTS[0]) and other.chat_template == "another one"
    check_alike(found, expected)
    assert found.whole.encode(TEXTS[0]) == expected.encode(TEXTS[0]) and found.chat_template == expected.chat_template


def test_a_folder_that_has_become_useless_is_named_with_what_to_do(tmp_path: Path):
    """Where what was read of it makes another tokenizer than it did: of a class that reads more, for one."""
    folder, kept = write_tiny_model(tmp_path), tmp_path / "kept"
    expected = load_engine_tokenizer(folder, kept=kept)

    def make(path: Path) -> Any:
        if not (path / "more.bin").exists():
            raise WeightsError("more.bin is missing")
        return expected

    found: Any = KeptTokenizer(folder, "auto", kept).find(make)
    told = f"{folder} has changed since .*Put them back; or .* more.bin is missing"
    for _ in range(2):
        with pytest.raises(WeightsError, match=told):
            found.whole  # noqa: B018
    (folder / "more.bin").touch()
    assert found.whole is expected


def test_an_import_is_not_interrupted_inside(tmp_path: Path):
    """The caller has Ctrl-C when it is over, and may ask again."""
    folder, kept = write_tiny_model(tmp_path), tmp_path / "kept"
    expected: Any = load_engine_tokenizer(folder, kept=kept)
    done = []

    def make() -> Any:
        if not done:
            os.kill(os.getpid(), signal.SIGINT)
        done.append("imported")
        return expected

    tokenizer = EngineTokenizer(expected.backend_tokenizer, None, make)
    with pytest.raises(KeyboardInterrupt):
        tokenizer.whole  # noqa: B018
    assert done == ["imported"] and tokenizer.whole is expected
