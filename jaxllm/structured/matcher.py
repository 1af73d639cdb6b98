"""A matcher knows which tokens may come next in one request; a grammar has one, and so have other constraints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import llguidance
import numpy as np

#: characters of a line of an error; it may quote the whole grammar
LINE = 200


class Matcher(Protocol):
    """Follows one request's outputs, token by token."""

    def may_constrain(self, num_unread: int) -> bool:
        """Return whether the next token may need a mask, when `num_unread` sampled tokens have not been read yet.

        True more often than needed only costs time.
        """
        ...

    def fill_mask(self, out: np.ndarray) -> str | None:
        """Clear in `out` (int32 [words], token t is bit t % 32 of word t // 32) what must not come next.

        Bits may be set that were not only where the vocabulary has no tokens. Returns why the request cannot go on, if
        it cannot.
        """
        ...

    def advance(self, token_id: int) -> str | None:
        """Take the token that came; returns why it must not have come, None when all is well."""
        ...

    def forced(self) -> list[int]:
        """The next tokens, as far as there is no choice; [] where there is one, or where it is not known."""
        ...

    def copy(self) -> Matcher:
        """Another one at the same point."""
        ...

    @property
    def is_complete(self) -> bool:
        """Whether nothing can follow but the end of the text."""
        ...

    @property
    def grammar(self) -> GrammarMatcher | None:
        """The grammar that decides on the next token; None when something else does."""
        ...


class GrammarMatcher:
    """A compiled grammar at one point of one text.

    Args:
        matcher: this request's own.
        num_words: words of the mask that llguidance writes, for its own vocabulary.
    """

    def __init__(self, matcher: llguidance.LLMatcher, num_words: int):
        self._matcher = matcher
        self._words = np.zeros(num_words, np.int32)
        self._is_filled = False

    @staticmethod
    def fill_together(matchers: Sequence[GrammarMatcher], executor: llguidance.LLExecutor) -> None:
        """Compute the masks of several matchers of one compiler in threads; `fill_mask` finds them then."""
        words = np.zeros((len(matchers), len(matchers[0]._words)), np.int32)
        jobs = [(matcher._matcher, i) for i, matcher in enumerate(matchers)]
        executor.unsafe_compute_mask_ptr(jobs, words.ctypes.data, words.strides[0], len(words))
        for matcher, filled in zip(matchers, words, strict=True):
            matcher._words, matcher._is_filled = filled, True

    def may_constrain(self, num_unread: int) -> bool:
        return True

    def fill_mask(self, out: np.ndarray) -> str | None:
        words = self._words
        if not self._is_filled:
            self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        self._is_filled = False
        if self._matcher.is_error():
            return f"the grammar cannot be followed any further: {explain(self._matcher.get_error())}"
        count = min(len(out), len(words))
        out[:count] &= words[:count]
        out[count:] = 0
        return None

    def advance(self, token_id: int) -> str | None:
        # an end token behind the end of the text
        if self._matcher.is_stopped() or self._matcher.consume_token(token_id):
            return None
        return f"the grammar does not allow token {token_id}: {explain(self._matcher.get_error())}"

    def forced(self) -> list[int]:
        return [] if self._matcher.is_stopped() else self._matcher.compute_ff_tokens()

    def copy(self) -> GrammarMatcher:
        return GrammarMatcher(self._matcher.deep_copy(), len(self._words))

    @property
    def is_complete(self) -> bool:
        return self._matcher.is_stopped()

    @property
    def grammar(self) -> GrammarMatcher | None:
        return self


def explain(error: str) -> str:
    """Return what a user can do something with of llguidance's error: where and what, not the parser's state."""
    if error.startswith("NoExtension"):
        return "no text matches it that the model's tokens can spell."
    text = error.split("\n<state>")[0].split("\n<non-verbose/>")[0]
    return "\n".join(line if len(line) <= LINE else line[:LINE] + "..." for line in text.strip().split("\n"))
