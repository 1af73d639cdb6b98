"""Tokenizers are built from the metadata of a GGUF file, and give the ids that the model was trained on.

Two kinds exist in the supported architectures: byte-level BPE (``tokenizer.ggml.model`` ``gpt2``) with merges and
one of several ways to split the text first, and SentencePiece BPE (``llama``) whose merges are ordered by the scores
of their results and whose unknown characters fall back to bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from jaxllm.tokenization.gguf_pre_tokenizers import pre_tokenization
from jaxllm.weights.errors import WeightsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_MODELS = ("gpt2", "llama")
# SentencePiece's mark for a space.
_SPACE = "\u2581"


class _Vocabulary:
    """The checked ``tokenizer.ggml.*`` entries that both kinds share."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self.metadata = metadata
        self.tokens = self._list("tokens", str)
        # An added token may not be empty, and llama.cpp names such entries this way.
        self.tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(self.tokens)]
        self.ids = {token: index for index, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            double = next(token for index, token in enumerate(self.tokens) if self.ids[token] != index)
            raise WeightsError(f"tokenizer.ggml.tokens holds {double!r} twice; every token must have one id")
        self.types = self._list("token_type", int) if self._has("token_type") else [_NORMAL] * len(self.tokens)
        if len(self.types) != len(self.tokens):
            raise WeightsError(f"tokenizer.ggml.token_type has {len(self.types)} entries for {len(self.tokens)} tokens")

    def value(self, name: str, kind: type, default: Any) -> Any:
        """``tokenizer.ggml.name``, which must be a ``kind`` if it is there."""
        value = self.metadata.get(f"tokenizer.ggml.{name}", default)
        if value is not default and type(value) is not kind:
            raise WeightsError(f"tokenizer.ggml.{name} is {value!r:.80}, expected a value of type {kind.__name__}")
        return value

    def special(self, name: str) -> str | None:
        """Return the token whose id is ``tokenizer.ggml.name_token_id``, or ``None`` where the file names none."""
        index = self.value(f"{name}_token_id", int, None)
        if index is None:
            return None
        if not 0 <= index < len(self.tokens):
            raise WeightsError(f"tokenizer.ggml.{name}_token_id is {index}, outside the {len(self.tokens)} tokens")
        return self.tokens[index]

    def merges(self) -> list[tuple[str, str]]:
        """Return the merges of byte-level BPE, best first, stored as two parts around a space."""
        pairs = []
        for line in self._list("merges", str):
            split = line.find(" ", 1)
            left, right = line[:split], line[split + 1 :]
            if split < 1 or not right:
                raise WeightsError(f"tokenizer.ggml.merges holds {line!r}, expected two parts separated by a space")
            pairs.append((left, right))
        return pairs

    def scores(self) -> list[float]:
        """Return one score per token: SentencePiece merges the pair with the highest-scored result first."""
        scores = self._list("scores", float)
        if len(scores) != len(self.tokens):
            raise WeightsError(f"tokenizer.ggml.scores has {len(scores)} entries for {len(self.tokens)} tokens")
        return scores

    def added_tokens(self) -> list[AddedToken]:
        """Return what is recognised in a text first: control and unknown tokens, which are special, and users' own."""
        return [
            AddedToken(token, special=kind != _USER_DEFINED, normalized=False)
            for token, kind in zip(self.tokens, self.types, strict=True)
            if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ]

    def _has(self, name: str) -> bool:
        return f"tokenizer.ggml.{name}" in self.metadata

    def _list(self, name: str, kind: type) -> list[Any]:
        value = self.metadata.get(f"tokenizer.ggml.{name}")
        if not isinstance(value, list) or not set(map(type, value)) <= {kind}:
            seen = "is missing" if value is None else f"is {type(value).__name__}"
            raise WeightsError(f"tokenizer.ggml.{name} {seen}, expected a list of {kind.__name__}")
        return value


def backend_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """Return the ``tokenizers.Tokenizer`` that the metadata describes, without beginning or end tokens added.

    Raises ``WeightsError`` for an unknown tokenizer model or pre-tokenizer, and for malformed entries.
    """
    return _backend(_Vocabulary(metadata))


def _backend(vocabulary: _Vocabulary) -> Tokenizer:
    model = vocabulary.value("model", str, None)
    if model not in _MODELS:
        raise WeightsError(f"the tokenizer model tokenizer.ggml.model = {model!r} is not known; known are gpt2, llama")
    tokenizer = _byte_level_bpe(vocabulary) if model == "gpt2" else _sentencepiece_bpe(vocabulary)
    tokenizer.add_tokens(vocabulary.added_tokens())
    return tokenizer


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """Return the transformers tokenizer that the metadata describes, with special tokens and chat template.

    ``model_max_length`` is the model's context length. Raises ``WeightsError`` as ``described_tokenizer`` does.
    """
    tokenizer, options = described_tokenizer(metadata)
    return in_transformers(Given(tokenizer), options)


def in_transformers(tokenizer: Tokenizer | Given, options: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Of what ``described_tokenizer`` returns, transformers' tokenizer: with a copy, or with the one that is given."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **options)


def described_tokenizer(metadata: Mapping[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    """Return the ``tokenizers.Tokenizer`` that the metadata describes, which adds what it says to begin and to end
    texts with, and what transformers' class has to be told besides.

    Raises ``WeightsError`` as ``backend_from_gguf`` does, and when a beginning or end token is to be added that the
    file does not name.
    """
    vocabulary = _Vocabulary(metadata)
    tokenizer = _backend(vocabulary)
    is_bpe = vocabulary.value("model", str, None) == "gpt2"
    add_bos = pre_tokenization(_pre(vocabulary)).add_bos if is_bpe else True
    special = {
        "bos_token": vocabulary.special("bos"),
        "eos_token": vocabulary.special("eos"),
        "unk_token": vocabulary.special("unknown"),
        "pad_token": vocabulary.special("padding"),
    }
    added = {
        "add_bos_token": vocabulary.value("add_bos_token", bool, add_bos),
        "add_eos_token": vocabulary.value("add_eos_token", bool, False),
    }
    for flag, token in (("add_bos_token", "bos_token"), ("add_eos_token", "eos_token")):
        if added[flag] and special[token] is None:
            raise WeightsError(f"tokenizer.ggml.{flag} is on but the file names no {token}_id")
    architecture = metadata.get("general.architecture")
    context = metadata.get(f"{architecture}.context_length")
    extra = {"model_max_length": context} if type(context) is int else {}
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise WeightsError(f"tokenizer.chat_template is of type {type(template).__name__}, expected a string")
    named = {name: token for name, token in special.items() if token is not None}
    # those that have a part of their own are recognised in texts, whatever kind the file says that they are
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    others = [token for token in dict.fromkeys(named.values()) if token not in known]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in others])
    begin = [special["bos_token"]] if added["add_bos_token"] else []
    end = [special["eos_token"]] if added["add_eos_token"] else []
    tokenizer.post_processor = _around(vocabulary, begin, end)
    return tokenizer, {"chat_template": template, **named, **added, **extra}


def _around(vocabulary: _Vocabulary, begin: list[Any], end: list[Any]) -> processors.TemplateProcessing:
    """What begins and ends a text, and each of a pair."""

    def one(name: str, kind: int) -> list[str]:
        return [f"{token}:{kind}" for token in begin] + [f"${name}:{kind}"] + [f"{token}:{kind}" for token in end]

    ids = [(token, vocabulary.ids[token]) for token in (*begin, *end)]
    return processors.TemplateProcessing(single=one("A", 0), pair=one("A", 0) + one("B", 1), special_tokens=ids)


class Given:
    """A tokenizer that is given away: transformers copies what it gets, which takes longer than all else here."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __deepcopy__(self, memo: dict[int, Any]) -> Tokenizer:
        return self._tokenizer


def _pre(vocabulary: _Vocabulary) -> str:
    return vocabulary.value("pre", str, "default")


def _byte_level_bpe(vocabulary: _Vocabulary) -> Tokenizer:
    pre = pre_tokenization(_pre(vocabulary))
    tokenizer = Tokenizer(_bpe(vocabulary, vocabulary.merges(), ignore_merges=pre.ignore_merges))
    normalizer = pre.normalizer()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece_bpe(vocabulary: _Vocabulary) -> Tokenizer:
    has_bytes = _BYTE in vocabulary.types
    unknown = vocabulary.special("unknown")
    merges = _merges_by_score(vocabulary)
    tokenizer = Tokenizer(_bpe(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=has_bytes))
    add_space = vocabulary.value("add_space_prefix", bool, True)
    # Prepending acts on every stretch of text between added tokens, which is where llama.cpp adds the space too.
    steps: list[normalizers.Normalizer] = [normalizers.Prepend(_SPACE)] if add_space else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    parts: list[decoders.Decoder] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if add_space:
        parts.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer


def _merges_by_score(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """Return every way to put a token together from two others, best-scored result first.

    Control, unknown and byte tokens are never the result or part of a merge.
    """
    mergeable = {
        token
        for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
        if kind in (_NORMAL, _USER_DEFINED, _UNUSED)
    }
    found: list[tuple[float, tuple[str, str]]] = []
    for token, score in zip(vocabulary.tokens, vocabulary.scores(), strict=True):
        if token not in mergeable:
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in mergeable and right in mergeable:
                found.append((-score, (left, right)))
    found.sort(key=lambda entry: entry[0])
    return [pair for _, pair in found]


def _bpe(vocabulary: _Vocabulary, merges: list[tuple[str, str]], **options: Any) -> models.BPE:
    try:
        return models.BPE(vocab=vocabulary.ids, merges=merges, **options)
    except Exception as error:  # noqa: BLE001 - the library raises bare Exception
        raise WeightsError(f"tokenizer.ggml.merges do not fit tokenizer.ggml.tokens: {error}") from error
