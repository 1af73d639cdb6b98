"""Whether a model that drafts reads what the large one reads: as long as its drafts win what that costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jaxllm.speculative.credit import Credit


@dataclasses.dataclass(frozen=True)
class ReadingCosts:
    """In steps of a single token of the large model."""

    #: a step of the small one
    step: float
    #: a token that it has passed over and reads later, among others
    late_token: float
    #: tokens of a prompt that take the large model as long as a step of a single token; an assumption
    tokens_of_a_step: int


class Reading:
    """Of an engine. What is read and never drafted for is time that is lost, so it is paid out of one credit
    (`speculative.credit`), which right drafts fill up. Where that is spent, the small model reads no further, and
    whoever has tokens that it did not read is drafted for no more: a draft would need them all.

    A prompt that is read is paid for, so its request goes on at least as long as that was worth.
    """

    def __init__(self, costs: ReadingCosts) -> None:
        self._costs, self._credit = costs, Credit()
        #: row -> steps that reading its prompt took
        self._paid: dict[int, float] = {}
        #: rows with tokens that were not read
        self._unread: set[int] = set()

    def admit(self, row: int) -> None:
        """A row has a new request."""
        self._paid.pop(row, None)
        self._unread.discard(row)

    def reads(self, rows: Sequence[int], counts: Sequence[int], *, may_draft: bool, always: bool = False) -> bool:
        """Whether a step without drafts is read.

        Args:
            counts: tokens of each row in it.
            may_draft: as many requests run as may have drafts.
            always: however little drafts have won.
        """
        if not may_draft or not (always or self._credit.is_left):
            self._unread.update(rows)
            return False
        steps = self._costs.step * max(sum(counts) / self._costs.tokens_of_a_step, 1.0)
        self._credit.pay(steps)
        for row, count in zip(rows, counts, strict=True):
            self._paid[row] = self._paid.get(row, 0.0) + steps * count / sum(counts)
        return True

    def given_up(self, rows: Sequence[int], *, always: bool = False) -> list[bool]:
        """Of the rows of a launch with drafts, which have none: they have tokens that were not read."""
        if not (always or self._credit.is_left or self._credit.steps + sum(self._paid.get(row, 0) for row in rows) > 0):
            self._unread.update(rows)
        return [row in self._unread for row in rows]

    def learn(self, rows: Sequence[int], accepted: int, kinds: Sequence[int], extra: Sequence[float]) -> None:
        """Take in a launch with drafts: how many were right, how many steps had none, and checks of each length, and
        what such a check takes longer than a step.
        """
        single, *checks = kinds
        self._credit.grow(sum(kinds))
        won = accepted / len(rows) - sum(count * steps for count, steps in zip(checks, extra, strict=True))
        if not all(row in self._unread for row in rows):
            won -= single * self._costs.late_token
        self._credit.win(won)
