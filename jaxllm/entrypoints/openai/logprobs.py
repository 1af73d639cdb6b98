"""Log-probabilities have two forms in OpenAI's answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxllm.api.outputs import Logprob, PositionLogprobs

#: JSON has no infinities; vLLM's floor
LOWEST = -9999.0


def chat_logprobs(
    token_ids: Sequence[int], positions: Sequence[PositionLogprobs], top: int, *, as_ids: bool
) -> dict[str, Any]:
    """Return the form of chat completions: an entry a token, each with its `top` likeliest alternatives (-1: all)."""
    content = []
    for token_id, position in zip(token_ids, positions, strict=False):
        ranked = sorted(position.items(), key=lambda item: _rank(item[1]))
        kept = [item for item in ranked if top == -1 or _rank(item[1]) <= top]
        alternatives = [_entry(other, logprob, as_ids) for other, logprob in kept]
        content.append({**_entry(token_id, position[token_id], as_ids), "top_logprobs": alternatives})
    return {"content": content}


def completion_logprobs(
    token_ids: Sequence[int],
    positions: Sequence[PositionLogprobs | None],
    *,
    as_ids: bool,
    first: str = "",
    offset: int = 0,
) -> dict[str, Any]:
    """Return the form of completions: parallel lists. A position without log-probabilities (a prompt's first) has None.

    Args:
        first: text of a position without log-probabilities.
        offset: characters of the text before.
    """
    tokens: list[str] = []
    values: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    offsets: list[int] = []
    for token_id, position in zip(token_ids, positions, strict=False):
        if position is None:
            text, value, alternatives = _text(token_id, None, as_ids) or first, None, None
        else:
            text, value = _text(token_id, position[token_id], as_ids), _finite(position[token_id])
            alternatives = {_text(other, logprob, as_ids): _finite(logprob) for other, logprob in position.items()}
        tokens.append(text)
        values.append(value)
        tops.append(alternatives)
        offsets.append(offset)
        offset += len(text)
    return {"text_offset": offsets, "token_logprobs": values, "tokens": tokens, "top_logprobs": tops}


def first_text(prompt: str | None, token_ids: Sequence[int], positions: Sequence[PositionLogprobs | None]) -> str:
    """Return the text of a prompt's first token, which has no log-probability: what the others leave of the prompt."""
    rest = "".join(
        _text(token_id, position[token_id], False)
        for token_id, position in zip(token_ids, positions, strict=True)
        if position is not None
    )
    return prompt[: len(prompt) - len(rest)] if prompt is not None and prompt.endswith(rest) else ""


def raw_logprobs(positions: Sequence[PositionLogprobs | None]) -> list[dict[str, Any] | None]:
    """Return `prompt_logprobs` in vLLM's form: each token id has its logprob, rank and text."""
    return [
        None
        if position is None
        else {
            str(token_id): {"logprob": _finite(entry), "rank": entry.rank, "decoded_token": entry.decoded_token}
            for token_id, entry in position.items()
        }
        for position in positions
    ]


def _entry(token_id: int, logprob: Logprob, as_ids: bool) -> dict[str, Any]:
    text = _text(token_id, logprob, as_ids)
    return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode("utf-8", "replace"))}


def _text(token_id: int, logprob: Logprob | None, as_ids: bool) -> str:
    if as_ids:
        return f"token_id:{token_id}"
    return (logprob.decoded_token if logprob else None) or ""


def _finite(logprob: Logprob) -> float:
    return max(logprob.logprob, LOWEST)


def _rank(logprob: Logprob) -> int:
    return logprob.rank or 1
