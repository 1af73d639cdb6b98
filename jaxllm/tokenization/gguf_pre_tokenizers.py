"""Each ``tokenizer.ggml.pre`` names a way to split text before byte-level BPE, and implies more.

The patterns are those of the models' own ``tokenizer.json``; where llama.cpp differs from them, the model is right
(Qwen 2 normalises to NFC, llama.cpp does not).
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers

from jaxllm.weights.errors import WeightsError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WHITESPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_WHITESPACE}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_WHITESPACE}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_WHITESPACE}"
)
# llama.cpp's own splits for files that name no pre-tokenizer, applied one after the other with GPT-2's between.
_DEFAULT_FIRST = r"[\p{P}\$\+<=>\^~\|]+"
_DEFAULT_LAST = (r"\p{N}+", r"[0-9][0-9][0-9]")
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, kw_only=True)
class PreTokenization:
    """``patterns`` split the text in turn, matches and gaps alike becoming pieces of their own.

    ``ignore_merges``: a piece that is a token is that token, whatever the merges say. ``add_bos``: whether a
    beginning-of-sequence token is added when the file does not say.
    """

    patterns: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False

    def normalizer(self) -> normalizers.Normalizer | None:
        """Unicode normalisation before splitting; ``None`` when the model has none."""
        return normalizers.NFC() if self.nfc else None

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        """Return the splits, then bytes written as printable characters (GPT-2's byte-level alphabet)."""
        splits: list[pre_tokenizers.PreTokenizer] = [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in self.patterns
        ]
        return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_DIGIT_BY_DIGIT = PreTokenization(patterns=(r"\p{N}", _GPT2))
_LLAMA3_SPLIT = PreTokenization(patterns=(_LLAMA3,), ignore_merges=True, add_bos=True)

PRE_TOKENIZATIONS: dict[str, PreTokenization] = {
    "default": PreTokenization(patterns=(_DEFAULT_FIRST, _GPT2, *_DEFAULT_LAST)),
    "gpt-2": PreTokenization(patterns=(_GPT2,)),
    "smollm": _DIGIT_BY_DIGIT,
    "starcoder": _DIGIT_BY_DIGIT,
    "refact": _DIGIT_BY_DIGIT,
    "llama-bpe": _LLAMA3_SPLIT,
    "llama3": _LLAMA3_SPLIT,
    "llama-v3": _LLAMA3_SPLIT,
    "qwen2": PreTokenization(patterns=(_QWEN2,), nfc=True),
    "tekken": PreTokenization(patterns=(_TEKKEN,), ignore_merges=True, add_bos=True),
}


def pre_tokenization(name: str) -> PreTokenization:
    """Return the pre-tokenization that ``tokenizer.ggml.pre`` names. Raises ``WeightsError`` for an unknown name."""
    if name not in PRE_TOKENIZATIONS:
        raise WeightsError(
            f"the pre-tokenizer tokenizer.ggml.pre = {name!r} is not known; known are {', '.join(PRE_TOKENIZATIONS)}"
        )
    return PRE_TOKENIZATIONS[name]
