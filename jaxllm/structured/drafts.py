"""Drafts for a request whose tokens are restricted: the host makes them, which has to know them for the masks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxllm.config.speculative import DEFAULT_LOOKUP, SpeculativeConfig

if TYPE_CHECKING:
    from jaxllm.structured.matcher import Matcher


@dataclasses.dataclass(frozen=True)
class HostDraftRule:
    """Most drafts of a step, and the runs of tokens that are looked for, as `speculative.ngram.NgramDrafter` does."""

    num_drafts: int
    min_match: int
    max_match: int

    @classmethod
    def of(cls, config: SpeculativeConfig | None) -> HostDraftRule | None:
        """Of an engine's drafts, whoever makes the others; None: there are none."""
        if config is None or config.num_speculative_tokens is None:
            return None
        if config.method == "ngram" and config.prompt_lookup_min and config.prompt_lookup_max:
            return cls(config.num_speculative_tokens, config.prompt_lookup_min, config.prompt_lookup_max)
        return cls(config.num_speculative_tokens, 1, DEFAULT_LOOKUP)


class CheckedDrafts(NamedTuple):
    """What a step with drafts checks of one request."""

    drafts: list[int]
    #: int32 [1 + drafts, words]: what may come at each of its positions, as `ModelRunner.sample` takes it
    masks: np.ndarray


class HostDrafts:
    """Those of one request: tokens that its matcher leaves no choice for, and between them what followed the last few
    tokens where they first stood, as far as the matcher allows it.

    Args:
        first: tokens before this one are passed over.
        ends_when_complete: the request ends with the token that nothing can follow: no draft is one.
    """

    def __init__(self, rule: HostDraftRule, *, first: int = 0, ends_when_complete: bool = False) -> None:
        self._rule, self._first, self._ends_when_complete = rule, first, ends_when_complete
        #: run of tokens -> index of the token behind its first occurrence
        self._behind: dict[tuple[int, ...], int] = {}
        self._noted = first

    def find(self, token_ids: Sequence[int], matcher: Matcher) -> list[int]:
        """Tokens that may come next.

        Args:
            token_ids: all of the request's; no fewer than at the last call.
            matcher: has taken its outputs, and is left as it is.
        """
        self._note(token_ids)
        drafts: list[int] = []
        ahead, place = matcher.copy(), None
        tail = list(token_ids[max(len(token_ids) - self._rule.max_match, self._first) :])
        while len(drafts) < self._rule.num_drafts and not ahead.is_complete:
            if forced := ahead.forced():
                token_id, place = forced[0], None
            else:
                place = self._look(tail) if place is None else place + 1
                if place is None or place >= len(token_ids):
                    break
                token_id = token_ids[place]
            if ahead.advance(token_id) is not None or (ahead.is_complete and self._ends_when_complete):
                break
            drafts.append(token_id)
            tail.append(token_id)
        return drafts

    def _note(self, token_ids: Sequence[int]) -> None:
        for behind in range(self._noted, len(token_ids)):
            for length in range(self._rule.min_match, min(self._rule.max_match, behind - self._first) + 1):
                self._behind.setdefault(tuple(token_ids[behind - length : behind]), behind)
        self._noted = max(self._noted, len(token_ids))

    def _look(self, tail: list[int]) -> int | None:
        """Index of the token behind the first occurrence of the longest run that the tokens end with."""
        for length in range(min(self._rule.max_match, len(tail)), self._rule.min_match - 1, -1):
            place = self._behind.get(tuple(tail[-length:]))
            if place is not None:
                return place
        return None


def masks_of(drafts: list[int], matcher: Matcher, num_words: int) -> tuple[CheckedDrafts, str | None]:
    """What may come at the positions of a step: the drafts, as far as something can follow them, and its masks.

    Returns:
        (drafts and masks, why the request cannot go on at all).
    """
    masks: list[np.ndarray] = []
    ahead = matcher.copy()
    for place in range(1 + len(drafts)):
        mask = np.full(num_words, -1, np.int32)
        error = ahead.fill_mask(mask)
        if error is not None:
            if place == 0:
                return CheckedDrafts([], np.zeros((1, num_words), np.int32)), error
            break
        masks.append(mask)
        if place < len(drafts) and ahead.advance(drafts[place]) is not None:
            break
    return CheckedDrafts(drafts[: len(masks) - 1], np.stack(masks)), None
