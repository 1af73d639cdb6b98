"""Outputs as a notebook shows them."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxllm.api.outputs import CompletionOutput, Logprob, RequestOutput

#: a notebook stays usable; the object has the rest
_MOST_TOKENS, _MOST_CHARACTERS, _MOST_ALTERNATIVES = 2000, 20_000, 5

# translucent colours suit light and dark themes
_BOX = "border-left:3px solid rgba(128,128,128,.4);padding:2px 10px;margin:4px 0"
_TEXT = "white-space:pre-wrap;overflow-wrap:anywhere"
_SMALL = "font-size:85%;opacity:.7"


def escape(text: str) -> str:
    """`text` for an element or an attribute in quotes; what UTF-8 cannot hold becomes a question mark."""
    return html.escape(text.encode("utf-8", "replace").decode("utf-8"), quote=True)


def request_html(output: RequestOutput) -> str:
    """The prompt and its completions. Where there are logprobs, tokens are the more coloured the less likely they were,
    and tell their probability and what else was likely under the pointer.
    """
    prompt = _short(output.prompt) if output.prompt is not None else escape(f"{len(output.prompt_token_ids)} token ids")
    parts = [f'<div style="{_TEXT};opacity:.7">{prompt}</div>']
    for completion in output.outputs:
        body = _tokens(completion) if completion.logprobs else _short(completion.text)
        parts.append(
            f'<div style="{_BOX}"><div style="{_TEXT}">{body}</div>'
            f'<div style="{_SMALL}">{escape(_caption(completion, len(output.outputs) > 1))}</div></div>'
        )
    if output.error is not None:
        parts.append(f'<div style="{_BOX};border-color:#D55E00">{escape(output.error)}</div>')
    return f"<div>{''.join(parts)}</div>"


def _caption(completion: CompletionOutput, numbered: bool) -> str:
    parts = [f"completion {completion.index}"] if numbered else []
    parts.append(f"{len(completion.token_ids)} tokens")
    if completion.finish_reason is not None:
        reason = completion.finish_reason
        parts.append(reason if completion.stop_reason is None else f"{reason} ({completion.stop_reason!r})")
    if completion.cumulative_logprob is not None:
        parts.append(f"cumulative logprob {completion.cumulative_logprob:.3f}")
    return " · ".join(parts)


def _tokens(completion: CompletionOutput) -> str:
    positions: Sequence[Mapping[int, Logprob]] = completion.logprobs or ()
    spans = []
    for token_id, position in zip(completion.token_ids[:_MOST_TOKENS], positions, strict=False):
        found = position.get(token_id)
        if found is None:
            spans.append(escape(f"[{token_id}]"))
            continue
        probability = _probability(found.logprob)
        likely = sorted(position.items(), key=lambda item: -item[1].logprob)[:_MOST_ALTERNATIVES]
        title = ", ".join(f"{_name(other, entry)} {_probability(entry.logprob):.3f}" for other, entry in likely)
        rank = f", rank {found.rank}" if found.rank is not None else ""
        spans.append(
            f'<span style="background:rgba(230,159,0,{1 - probability:.2f})" '
            f'title="{escape(f"p={probability:.3f}{rank}; {title}")}">{escape(_shown(token_id, found))}</span>'
        )
    left_out = len(completion.token_ids) - _MOST_TOKENS
    return "".join(spans) + (escape(f" … ({left_out} more tokens)") if left_out > 0 else "")


def _probability(logprob: float) -> float:
    """In [0, 1], also where the "logprob" is a logit, as `logprobs_mode` may have it."""
    return 0.0 if math.isnan(logprob) else math.exp(min(logprob, 0.0))


def _shown(token_id: int, entry: Logprob) -> str:
    return f"[{token_id}]" if entry.decoded_token is None else entry.decoded_token


def _name(token_id: int, entry: Logprob) -> str:
    return str(token_id) if entry.decoded_token is None else repr(entry.decoded_token)


def _short(text: str) -> str:
    left_out = len(text) - _MOST_CHARACTERS
    more = f" … ({left_out} more characters)" if left_out > 0 else ""
    return escape(text[:_MOST_CHARACTERS] + more)
