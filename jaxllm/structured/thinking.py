"""Reasoning comes before the answer: a budget ends it, and a grammar begins behind it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxllm.api.errors import ValidationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jaxllm.config.structured_outputs import ReasoningConfig
    from jaxllm.structured.matcher import GrammarMatcher, Matcher

Tokens = tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReasoningMarks:
    """Token ids around the reasoning."""

    start: Tokens
    #: how the model ends it
    end: Tokens
    #: what is forced when the budget is spent; ends with the end
    forced_end: Tokens


def reasoning_marks(tokenizer: PreTrainedTokenizerBase | None, config: ReasoningConfig) -> ReasoningMarks:
    """Return the marks' tokens.

    Raises:
        ValidationError: there is no tokenizer, or nobody said what the marks are and the usual ones are no tokens.
    """
    if tokenizer is None:
        raise ValidationError("thinking_token_budget needs a tokenizer, and skip_tokenizer_init=True")
    if not config.is_set:
        vocabulary = tokenizer.get_vocab()
        if config.start not in vocabulary or config.end not in vocabulary:
            raise ValidationError(
                "thinking_token_budget is set but reasoning_config is not configured, and the model's tokenizer has no "
                f"tokens {config.start!r} and {config.end!r}. If the model reasons between other marks, make the LLM "
                "with reasoning_config={'reasoning_start_str': ..., 'reasoning_end_str': ...}."
            )
        start, end = (vocabulary[config.start],), (vocabulary[config.end],)
        return ReasoningMarks(start=start, end=end, forced_end=end)
    start, end, forced = (
        tuple(tokenizer.encode(text, add_special_tokens=False))
        for text in (config.start, config.natural_end, config.end)
    )
    return ReasoningMarks(start=start, end=end, forced_end=forced)


class ThinkingMatcher:
    """Follows a request into its reasoning and out of it.

    Args:
        budget: tokens of each reasoning; those of the prompt's open one count. None: no limit.
        grammar: holds behind the reasoning, or from the start when the prompt's reasoning is closed.
    """

    def __init__(
        self, marks: ReasoningMarks, budget: int | None, prompt: Sequence[int], grammar: Matcher | None = None
    ):
        self._marks = marks
        self._budget = budget
        self._grammar = grammar
        started, ended = _last(prompt, marks.start), _last(prompt, marks.end)
        self._inside = started > ended
        #: whether a reasoning has ended: the grammar holds from there on
        self._ended = ended > started
        self._used = len(prompt) - started - len(marks.start) if self._inside else 0
        #: tokens of the forced end that have come; None: nothing is forced
        self._forced: int | None = None
        #: the newest tokens, as many as a mark can have
        self._tail: list[int] = [] if self._inside else list(prompt[-len(marks.start) :])
        self._force_if_spent()

    @property
    def _answers(self) -> bool:
        return self._grammar is not None and self._ended and not self._inside

    def may_constrain(self, num_unread: int) -> bool:
        if self._forced is not None or self._answers:
            return True
        if self._grammar is not None and num_unread:
            return True
        if self._budget is None:
            return False
        # a start mark among the unread tokens leaves at most the others for the reasoning
        at_most = self._used + num_unread if self._inside else num_unread - 1
        return at_most >= self._budget

    def fill_mask(self, out: np.ndarray) -> str | None:
        if self._forced is not None:
            token = self._marks.forced_end[self._forced]
            kept = out[token // 32] & np.array(1 << token % 32, np.uint32).view(np.int32)
            out[:] = 0
            out[token // 32] = kept
        elif self._answers and self._grammar is not None:
            return self._grammar.fill_mask(out)
        return None

    def advance(self, token_id: int) -> str | None:
        if self._answers and self._grammar is not None:
            return self._grammar.advance(token_id)
        self._tail = [*self._tail, token_id][-max(len(self._marks.start), len(self._marks.end)) :]
        if self._forced is not None:
            self._forced += 1
            if self._forced == len(self._marks.forced_end):
                self._leave()
        elif self._inside:
            self._used += 1
            if self._ends_with(self._marks.end):
                self._leave()
            else:
                self._force_if_spent()
        elif self._ends_with(self._marks.start):
            self._inside, self._used, self._tail = True, 0, []
            self._force_if_spent()
        return None

    def forced(self) -> list[int]:
        if self._forced is not None:
            return list(self._marks.forced_end[self._forced :])
        return self._grammar.forced() if self._answers and self._grammar is not None else []

    def copy(self) -> ThinkingMatcher:
        other = copy.copy(self)
        other._grammar = self._grammar and self._grammar.copy()
        return other

    @property
    def is_complete(self) -> bool:
        return self._answers and self._grammar is not None and self._grammar.is_complete

    @property
    def grammar(self) -> GrammarMatcher | None:
        return self._grammar.grammar if self._answers and self._grammar is not None else None

    def _force_if_spent(self) -> None:
        if self._inside and self._budget is not None and self._used >= self._budget:
            self._forced = 0

    def _leave(self) -> None:
        self._inside, self._ended, self._forced, self._used, self._tail = False, True, None, 0, []

    def _ends_with(self, mark: Tokens) -> bool:
        return tuple(self._tail[-len(mark) :]) == mark


def _last(tokens: Sequence[int], mark: Tokens) -> int:
    """Return the index of the last occurrence of `mark`; -1 when there is none."""
    for first in range(len(tokens) - len(mark), -1, -1):
        if tuple(tokens[first : first + len(mark)]) == mark:
            return first
    return -1
