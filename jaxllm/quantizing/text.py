"""Text to calibrate with and text to measure with: other parts of the same."""

from __future__ import annotations

import dataclasses
import json
import logging
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.api.errors import ValidationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("jaxllm")

#: tokens at the beginning of a text that perplexity is measured on, unless that is more than a quarter of it
HELD_OUT = 8192
#: tokens of a sequence that an error would propose
SHORTEST = 16


def own_text() -> str:
    """What Python says of itself (``help("topics")``), which every installation has."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples:
    """Sequences of tokens, all of one length."""

    calibration: list[list[int]]
    held_out: list[list[int]]


def read_samples(
    path: Path | None, tokenizer: PreTrainedTokenizerBase, *, length: int, count: int, seed: int
) -> Samples:
    """Sequences of a file, or of `own_text`: those at its beginning are held out, and of the others some are drawn.

    Args:
        path: a text, or a .jsonl file with a text, ``{"text": ...}``, ``{"prompt": ...}`` or ``{"messages": [...]}``
            (in the tokenizer's chat template) in each line.
        length: tokens of a sequence.
        count: sequences to calibrate with; a text that has fewer gives all.
        seed: of what is drawn.

    Raises:
        ValidationError: the file cannot be read, or has less than two sequences.
    """
    text = own_text() if path is None else _read(path, tokenizer)
    # without a warning that the whole text is longer than the model's context
    ids: list[Any] = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    start: Any = tokenizer.bos_token_id
    # models that were trained with a token in front of every text foresee little without it
    first = [start] if start is not None and tokenizer.encode("a")[:1] == [start] else []
    step = length - len(first)
    found = [first + ids[at : at + step] for at in range(0, len(ids) - step + 1, step)]
    if len(found) < 2:
        shorter = len(ids) // 4
        raise ValidationError(
            f"{path or 'The text'} has {len(ids)} tokens, and a sequence to calibrate and one to measure with take "
            f"{step} each: give a text of at least {2 * step}"
            + (f", or sequence_length={shorter}." if shorter >= SHORTEST else ".")
        )
    held = max(1, min(HELD_OUT // length, len(found) // 4))
    others = found[held:]
    if len(others) < count:
        logger.warning("The text has %d sequences of %d tokens to calibrate with, not %d", len(others), length, count)
    drawn = random.Random(seed).sample(others, min(count, len(others)))
    return Samples(calibration=drawn, held_out=found[:held])


def _read(path: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        # a mark at the beginning is no part of the text
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ValidationError(
            f"calibration: there is no file {path} (in {Path.cwd()}). Name a text or a .jsonl file, or leave it out: "
            "then it is Python's documentation."
        ) from None
    except OSError as error:
        raise ValidationError(f"calibration: {path} cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError as error:
        line, found = error.object[: error.start].count(b"\n") + 1, error.object[error.start]
        raise ValidationError(
            f"calibration: {path} is not UTF-8: line {line} has the byte 0x{found:02X}. Convert it, such as by: "
            f"iconv -f latin1 -t utf-8 {path} > {path.stem}-utf8{path.suffix}"
        ) from None
    if not text.strip():
        raise ValidationError(
            f"calibration: {path} is empty. Give a text like what the model will see, or leave it out: then it is "
            "Python's documentation."
        )
    if path.suffix.lower() != ".jsonl":
        return text
    texts = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            texts.append(_of_line(line, tokenizer, f"{path}, line {number}"))
    return "\n\n".join(texts)


def _of_line(line: str, tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise ValidationError(f"{where} is not JSON: {error}") from None
    if isinstance(row, dict) and isinstance(row.get("messages"), list):
        return str(tokenizer.apply_chat_template(row["messages"], tokenize=False))
    text = next((row[name] for name in ("text", "prompt") if name in row), None) if isinstance(row, dict) else row
    if not isinstance(text, str):
        raise ValidationError(f'{where}: expected a text, {{"text": ...}}, {{"prompt": ...}} or {{"messages": [...]}}.')
    return text
