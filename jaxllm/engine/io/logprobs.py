"""From the device's arrays to a request's log-probabilities, and the texts of single tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxllm.api.logprobs import FlatLogprobs, Logprob, PromptLogprobs, SampleLogprobs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jaxllm.api.sampling_params import SamplingParams
    from jaxllm.engine.step import LogprobArrays

#: what decoders put for bytes that are no character
REPLACEMENT = "\ufffd"
#: a character has at most four bytes, so at most three tokens before its last one
CONTEXT_TOKENS = 3


class TokenTexts:
    """The text of single tokens, each decoded once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._alone: dict[int, str] = {}

    def text(self, token_id: int, before: Sequence[int]) -> str:
        """What a token adds to the text.

        A token that is a part of a character has the whole character when it completes it and is empty otherwise, so
        that the texts of a sequence's tokens put together are the sequence's text.

        Args:
            before: the tokens in front of it; the last `CONTEXT_TOKENS` of them matter.
        """
        alone = self._text_alone(token_id)
        if not alone.endswith(REPLACEMENT):
            return alone
        beginning: list[int] = []
        for earlier in reversed(before[-CONTEXT_TOKENS:]):
            if not self._text_alone(earlier).endswith(REPLACEMENT):
                break
            beginning.insert(0, earlier)
            text = self._decode([*beginning, token_id])
            if REPLACEMENT not in text:
                return text
        return ""

    def _text_alone(self, token_id: int) -> str:
        text = self._alone.get(token_id)
        if text is None:
            text = self._alone[token_id] = self._decode([token_id])
        return text

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids))


class RequestLogprobs:
    """What one request has been told about how likely its tokens are.

    Args:
        texts: None: the entries get no text.
    """

    def __init__(self, params: SamplingParams, prompt_token_ids: list[int], texts: TokenTexts | None):
        self._texts = texts
        self._prompt_token_ids = prompt_token_ids
        self._count = params.num_logprobs
        self._prompt_count = params.prompt_logprobs
        self._chosen = params.logprob_token_ids or []
        self.sample: SampleLogprobs | None = None
        if self._count is not None:
            self.sample = FlatLogprobs() if params.flat_logprobs else []
        self.prompt: PromptLogprobs | None = None
        if self._prompt_count is not None:
            self.prompt = FlatLogprobs() if params.flat_logprobs else []
            self.prompt.append(None)
        #: of the generated tokens
        self.cumulative = 0.0

    def append(self, arrays: LogprobArrays, index: int, sequence: list[int]) -> None:
        """Take the newest token: the last one of `sequence`, and row `index` of `arrays`."""
        if self.sample is None:
            return
        token_id = sequence[-1]
        if self._chosen and arrays.chosen is not None:
            # which place in the vocabulary they have is not known
            ids, values = self._chosen, arrays.chosen[index, : len(self._chosen)].tolist()
            ranks: list[int | None] = [None] * len(ids)
        else:
            ids, values, ranks = _most_likely(arrays, index, self._count or 0)
        self.cumulative += float(arrays.sampled[index])
        self._put(self.sample, token_id, arrays, index, ids, values, ranks, sequence[-1 - CONTEXT_TOKENS : -1])

    def take_prompt(self, arrays: LogprobArrays, index: int, start: int, count: int) -> None:
        """Take what positions ``start ..`` found of the tokens behind them: rows ``index ..`` of `arrays`.

        Positions come in order, and again from the first one after a preemption; what is known already stays.
        """
        if self.prompt is None:
            return
        for i in range(len(self.prompt) - 1 - start, count):
            at = start + i + 1
            tokens = self._prompt_token_ids
            entries = _most_likely(arrays, index + i, self._prompt_count or 0)
            self._put(self.prompt, tokens[at], arrays, index + i, *entries, tokens[max(at - CONTEXT_TOKENS, 0) : at])

    def _put(self, out: Any, token_id, arrays, index, ids, values, ranks, before) -> None:
        """Append one position: its own token, then the others."""
        ids = [token_id, *ids]
        values = [float(arrays.sampled[index]), *values]
        ranks = [int(arrays.rank[index]), *ranks]
        texts = [None if self._texts is None else self._texts.text(other, before) for other in ids]
        if isinstance(out, FlatLogprobs):
            out.append_entries(ids, values, ranks, texts)
            return
        position: dict[int, Logprob] = {}
        for other, value, rank, text in zip(ids, values, ranks, texts, strict=True):
            position.setdefault(other, Logprob(value, rank, text))
        out.append(position)


def _most_likely(arrays: LogprobArrays, index: int, count: int) -> tuple[list[int], list[float], list[int | None]]:
    """Ids, values and ranks of the `count` most likely tokens; -1: of all that the device returned."""
    here = slice(None) if count == -1 else slice(count)
    ids = arrays.top_ids[index, here].tolist()
    return ids, arrays.top[index, here].tolist(), list(range(1, len(ids) + 1))
