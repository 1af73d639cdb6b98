"""Outputs that are known: each of them is the only token that may come, and what is told of it is the model's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxllm.structured.matcher import GrammarMatcher


class TraceMatcher:
    """Lets one request write the tokens that it is given (`SamplingParams.trace_decode_token_ids`).

    Args:
        token_ids: all of them.
        place: how many have come.
    """

    def __init__(self, token_ids: Sequence[int], place: int = 0):
        self._token_ids, self._place = token_ids, place

    def may_constrain(self, num_unread: int) -> bool:
        return self._place < len(self._token_ids)

    def fill_mask(self, out: np.ndarray) -> str | None:
        if self._place < len(self._token_ids):
            token = self._token_ids[self._place]
            out[:] = 0
            out[token // 32] = np.array(1 << token % 32, np.uint32).view(np.int32)
        return None

    def advance(self, token_id: int) -> str | None:
        self._place += 1
        return None

    def forced(self) -> list[int]:
        return list(self._token_ids[self._place :])

    def copy(self) -> TraceMatcher:
        return TraceMatcher(self._token_ids, self._place)

    @property
    def is_complete(self) -> bool:
        """False: their number ends the request."""
        return False

    @property
    def grammar(self) -> GrammarMatcher | None:
        return None
