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
    """Of an engine. What is read and never drafted for is time that is lost, so it is paid out of the credit that all
    its drafts have (`speculative.credit`), and that right ones fill up. Where that is spent, the small model reads no
    further, and whoever has tokens that it did not read is drafted for no more: a draft would need them all.

    A prompt whose reading has begun is read to its end, and its request drafted for at least until that much was lost
    again.
    """

    def __init__(self, costs: ReadingCosts, credit: Credit) -> None:
        self._costs, self._credit = costs, credit
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
        if not (may_draft and (always or self.can_pay(rows))):
            self._unread.update(rows)
            return False
        steps = self._costs.step * max(sum(counts) / self._costs.tokens_of_a_step, 1.0)
        self._credit.pay(steps)
        for row, count in zip(rows, counts, strict=True):
            if count > 1:
                self._paid[row] = self._paid.get(row, 0.0) + steps * count / sum(counts)
        return True

    def given_up(self, rows: Sequence[int], *, always: bool = False) -> list[bool]:
        """Of the rows of a launch with drafts, which have none: they have tokens that were not read."""
        if not (always or self.can_pay(rows)):
            self._unread.update(rows)
        return [row in self._unread for row in rows]

    def can_pay(self, rows: Sequence[int]) -> bool:
        """Whether credit is left, not counting what reading the rows' own prompts took."""
        return self._credit.steps + sum(self._paid.get(row, 0.0) for row in rows) > 0

    def rested(self, rows: Sequence[int], num_steps: int) -> None:
        """So many steps of a launch with drafts had none."""
        if not all(row in self._unread for row in rows):
            self._credit.pay(num_steps * self._costs.late_token)
