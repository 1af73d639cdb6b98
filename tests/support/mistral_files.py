"""Tokenizers in Mistral's own files, small ones that are made here."""

from __future__ import annotations

import base64
import collections
import io
import json
from pathlib import Path

PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CONTROLS = """<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS]
[TOOL_CALLS] [IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [SYSTEM_PROMPT] [/SYSTEM_PROMPT]
[TOOL_CONTENT]""".split()
#: special tokens of the file, some of which it does not name
NUM_SPECIAL = 24
CORPUS = "The quick brown fox jumps over the lazy dog. A rose is a rose is a rose; naïve résumés of 12 cafés.\n" * 3


def byte_tokens(corpus: bytes, count: int) -> list[bytes]:
    """All bytes, then pairs of tokens, the most frequent first: ranks as a tekken file has them."""
    tokens, words = [bytes([i]) for i in range(256)], [[bytes([b]) for b in word] for word in corpus.split(b" ")]
    while len(tokens) < count:
        pairs = collections.Counter(pair for word in words for pair in zip(word, word[1:], strict=False))
        left, right = min(pairs, key=lambda pair: (-pairs[pair], pair))
        tokens.append(left + right)
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == (left, right):
                    word[i : i + 2] = [left + right]
                i += 1
    return tokens


def write_tekken(folder: Path, version: str) -> None:
    tokens = byte_tokens(CORPUS.encode(), 290)
    content = {
        "config": {
            "pattern": PATTERN,
            "num_vocab_tokens": len(tokens),
            "default_vocab_size": len(tokens) + NUM_SPECIAL - 4,
            "default_num_special_tokens": NUM_SPECIAL,
            "version": version,
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
            for rank, token in enumerate(tokens)
        ],
        "special_tokens": [
            {"rank": rank, "token_str": token, "is_control": True} for rank, token in enumerate(CONTROLS)
        ],
    }
    (folder / "tekken.json").write_text(json.dumps(content))


def write_sentencepiece(folder: Path) -> None:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=iter(CORPUS.splitlines() * 5),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        control_symbols=CONTROLS[3:10],
        minloglevel=2,
    )
    (folder / "tokenizer.model.v3").write_bytes(model.getvalue())
    (folder / "tokenizer.model.v2").write_bytes(b"an older one, which is not read")
