"""Tokenizers from Mistral's own files, `tekken.json` and `tokenizer.model.v*`, and conversations as Mistral has them.

Texts are tokenized and read by the tokenizers library, as everybody's are: its tokenizer is built from the file, and
gives mistral_common's ids. Marks of a conversation, such as [INST], are tokens only where mistral_common puts them,
which turns whole conversations into ids: a text that spells them stays a text.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from jaxllm.api.errors import ValidationError
from jaxllm.api.extras import how_to_install
from jaxllm.tokenization.gguf import Given, tokenizer_from_gguf
from jaxllm.weights.errors import WeightsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

#: options of a conversation that mistral_common takes besides
_CHAT_OPTIONS = ("reasoning_effort",)
#: kinds of pieces, as GGUF files number them
_NORMAL, _UNKNOWN, _CONTROL, _UNUSED, _BYTE = 1, 2, 3, 5, 6


def mistral_file(folder: Path) -> Path | None:
    """The tokenizer's file in a model's folder: `tekken.json`, or the newest `tokenizer.model.v*`; None: neither."""
    tekken = folder / "tekken.json"
    if tekken.is_file():
        return tekken
    versions = [(int(found[1]), file) for file in folder.iterdir() if (found := _VERSION.fullmatch(file.name))]
    return max(versions)[1] if versions else None


_VERSION = re.compile(r"tokenizer\.model\.v(\d+)(?:m\d+)?")


def load_mistral_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a model's folder; its `mistral_chat` is a `MistralChat`. Nothing is fetched.

    Raises:
        ValidationError: mistral_common is not installed.
        WeightsError: there is no such file, or it cannot be read.
    """
    file = mistral_file(folder)
    if file is None:
        raise WeightsError(
            f"{folder}: tokenizer_mode='mistral' reads tekken.json or tokenizer.model.v*, and there is neither; leave "
            "it out to read Hugging Face's tokenizer.json"
        )
    try:
        from mistral_common.protocol.instruct.validator import ValidationMode
        from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

        common: Any = MistralTokenizer.from_file(str(file), mode=ValidationMode.test)
    except ImportError as error:
        raise ValidationError(
            f"tokenizer_mode='mistral' needs mistral_common, which cannot be imported ({error}): "
            f"{how_to_install('mistral')}"
        ) from error
    except Exception as error:  # of many kinds, bare assertions among them
        raise WeightsError(f"{file}: mistral_common cannot read it: {error}") from error
    inner = common.instruct_tokenizer.tokenizer
    tokenizer: Any = _tekken(file, inner) if file.suffix == ".json" else _sentencepiece(file)
    # what spells a special token is text
    tokenizer.split_special_tokens = tokenizer.backend_tokenizer.encode_special_tokens = True
    tokenizer.mistral_chat = MistralChat(common)
    return tokenizer


class MistralChat:
    """Turns conversations into token ids, by mistral_common's tokenizer of the model."""

    def __init__(self, common: Any):
        self._common = common

    def encode(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **options: Any,
    ) -> list[int]:
        """The ids of a conversation in OpenAI's form, special ones included.

        Raises:
            ValidationError: mistral_common refuses it; the text says why.
        """
        from mistral_common.exceptions import MistralCommonException
        from mistral_common.protocol.instruct.request import ChatCompletionRequest

        unknown = [name for name in options if name not in _CHAT_OPTIONS]
        if unknown:
            raise ValidationError(
                f"chat_template_kwargs has {unknown[0]!r}, which Mistral's tokenizers do not take; they take "
                f"{', '.join(_CHAT_OPTIONS)}"
            )
        ends_with_assistant = messages[-1]["role"] == "assistant"
        if add_generation_prompt and ends_with_assistant:
            raise ValidationError(
                "Cannot set `add_generation_prompt` to True when the last message is from the assistant. Consider "
                "using `continue_final_message` instead."
            )
        if continue_final_message and not ends_with_assistant:
            raise ValidationError(
                "Cannot set `continue_final_message` to True when the last message is not from the assistant."
            )
        try:
            request: Any = ChatCompletionRequest.from_openai(
                messages=list(messages),  # pyright: ignore[reportArgumentType]
                tools=None if tools is None else list(tools),  # pyright: ignore[reportArgumentType]
                continue_final_message=continue_final_message,
                **options,
            )
            return list(self._common.encode_chat_completion(request).tokens)
        except (MistralCommonException, TypeError, ValueError, AssertionError) as error:
            raise ValidationError(f"mistral_common cannot tokenize the conversation: {error}") from error


def _tekken(file: Path, inner: Any) -> PreTrainedTokenizerFast:
    """Of a file whose tokens are bytes with ranks, special ones first."""
    from transformers import PreTrainedTokenizerFast

    content = json.loads(file.read_text(encoding="utf-8"))
    first = inner.num_special_tokens
    entries = content["vocab"][: inner.n_words - first]
    ranks = {base64.b64decode(entry["token_bytes"]): rank for rank, entry in enumerate(entries)}
    letters = _letters()

    def text(token: bytes) -> str:
        return "".join([letters[byte] for byte in token])

    special = [str(inner.id_to_piece(i)) for i in range(first)]
    vocabulary = {text(token): first + rank for token, rank in ranks.items()}
    vocabulary |= {token: i for i, token in enumerate(special)}
    merges = [(text(token[:cut]), text(token[cut:])) for token in ranks for cut in _cuts(token, ranks)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    pieces = pre_tokenizers.Split(Regex(content["config"]["pattern"]), "isolated")
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, in_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=Given(tokenizer),
        bos_token=special[inner.bos_id],
        eos_token=special[inner.eos_id],
        add_bos_token=True,
        clean_up_tokenization_spaces=False,
    )


def _cuts(token: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Where a token may have been put together from two others, the likeliest first: of the lowest ranks."""
    cuts = [cut for cut in range(1, len(token)) if token[:cut] in ranks and token[cut:] in ranks]
    return sorted(cuts, key=lambda cut: (ranks[token[:cut]], ranks[token[cut:]]))


def _letters() -> dict[int, str]:
    """The character that stands for each byte in a vocabulary of bytes, as in GPT-2's: its own where that shows."""
    shown = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def _sentencepiece(file: Path) -> PreTrainedTokenizerFast:
    """Of a SentencePiece model, which is what GGUF files describe, too."""
    from sentencepiece import SentencePieceProcessor

    model: Any = SentencePieceProcessor(model_file=str(file))
    special = {_UNKNOWN: model.is_unknown, _CONTROL: model.is_control, _UNUSED: model.is_unused, _BYTE: model.is_byte}

    def kind(i: int) -> int:
        return next((number for number, is_one in special.items() if is_one(i)), _NORMAL)

    pieces = range(model.get_piece_size())
    named = {"bos": model.bos_id(), "eos": model.eos_id(), "unknown": model.unk_id(), "padding": model.pad_id()}
    return tokenizer_from_gguf(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in pieces],
            "tokenizer.ggml.scores": [model.get_score(i) for i in pieces],
            "tokenizer.ggml.token_type": [kind(i) for i in pieces],
            **{f"tokenizer.ggml.{name}_token_id": i for name, i in named.items() if i >= 0},
        }
    )
