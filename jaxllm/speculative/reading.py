"""Whether a model that drafts reads what the large one reads: where its drafts can win what that costs.

A request is read from its first step on or not at all, since a draft needs all tokens before it. Three things are
asked when it begins, of its prompt's P tokens and of the N that it may still get, in steps of the large model:

- What its drafts may win is N times what a check can save of a token's time, by the prices of checks (`prices`) and by
  how many of the engine's drafts were right: before any was checked, all of them. It has to be more than reading costs.
- What is lost where all drafts are wrong is what reading costs, one check, and waiting for another. It has to be no
  more than `SHARE` of the time that the request takes without drafts: of a prompt of many tokens and an answer of few,
  nothing is read. What that share leaves is the request's credit for checks.
- A request may end long before its N tokens. So the engine's credit (`speculative.credit`) has to be left, which pays
  for all of this: what one request's drafts did not win back is waited for before the next one is read.

While a request has no drafts, the small model falls behind, and reading what it passed over is paid for, too. So it is
with a token that a request gets in a step beside a prompt that is not read. A request whose drafts rest for `PATIENCE`
steps, or have lost its share, is given up: nobody reads its tokens from there on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxllm.speculative.credit import INITIAL, MOST, SHARE, Credit

#: steps without a check, of a request that was read
PATIENCE = 8
#: tokens of a step that tells how long prompts take
TIMED_TOKENS = 16
#: of the engine's checks, the part of older ones that each leaves; their drafts, before any was checked, all right
KEPT, BEFORE = 0.95, 4.0


@dataclasses.dataclass(frozen=True)
class ReadingCosts:
    """In steps of a single token of the large model."""

    #: a step of the small one
    step: float
    #: a token that it has passed over and reads later, among others
    late_token: float
    #: tokens of a prompt that take the large model as long as a step of a single token; an assumption, until prompts
    #: are timed
    tokens_of_a_step: float

    def large(self, num_tokens: int) -> float:
        """What the large model takes to read so many tokens."""
        return max(num_tokens / self.tokens_of_a_step, 1.0)

    def small(self, num_tokens: int) -> float:
        """What the small one takes."""
        return self.step * self.large(num_tokens)


@dataclasses.dataclass(frozen=True)
class Prices:
    """Of the checks of one number of sequences."""

    #: drafts of each
    lengths: Sequence[int]
    #: f64 [L], steps that each takes longer than one of a single token
    extra: np.ndarray

    def saved(self, right: float) -> float:
        """The most that checks save of the time of a token, of which each draft is right with that probability if those
        before it are.
        """
        tokens = [sum(right**place for place in range(1 + length)) for length in self.lengths]
        return max(0.0, *(1.0 - (1.0 + extra) / count for extra, count in zip(self.extra, tokens, strict=True)))

    def first_try(self) -> float:
        """What the check costs that is made where nothing is known: the shortest one that can win anything."""
        return next((float(e) for e, length in zip(self.extra, self.lengths, strict=True) if e < length), 0.0)


@dataclasses.dataclass
class ReadRequest:
    """What is known of a request."""

    #: tokens of its prompt that are computed, and how many it may still get
    num_prompt_tokens: int
    left: int
    #: tokens of the prompt that no step had yet
    waiting: int
    #: whether it was decided; and that it is read, and nothing of it was passed over for good
    begun: bool = False
    is_read: bool = False
    #: its latest tokens that steps without drafts have passed over, of which the device does not know
    passed_over: int = 0
    #: steps that its drafts may lose in all, reading it among them; and what reading it takes
    share: float = 0.0
    reading: float = 0.0
    #: steps since the latest check
    rested: int = 0


class Reading:
    """Of an engine.

    Args:
        credit: what all drafts of the engine may cost; it pays for reading.
        can_be_late: whether the small model can read later what it has passed over.
    """

    def __init__(self, costs: ReadingCosts, credit: Credit, *, can_be_late: bool = True) -> None:
        self._costs, self._credit, self._can_be_late = costs, credit, can_be_late
        self._rows: dict[int, ReadRequest] = {}
        self._right = self._tried = BEFORE
        self._is_timed = False

    def saw(self, num_tokens: int, steps: float, *, was_read: bool) -> None:
        """A step of so many tokens took as long as so many steps of a single token."""
        if num_tokens < TIMED_TOKENS or steps <= 0:
            return
        before = self._costs.tokens_of_a_step
        now = max(num_tokens * (1 + self._costs.step * was_read) / steps, 0.1)
        # a program beside it does not count for ever
        now = (before * now) ** 0.5 if self._is_timed else now
        self._costs, self._is_timed = dataclasses.replace(self._costs, tokens_of_a_step=now), True

    def admit(self, row: int, num_prompt_tokens: int, most_tokens: int) -> None:
        """A row has a new request, or one that begins anew.

        Args:
            num_prompt_tokens: of what is known of it, those that are to be computed.
            most_tokens: what it may get.
        """
        self._rows[row] = ReadRequest(num_prompt_tokens, most_tokens, num_prompt_tokens)

    def reads(
        self, rows: Sequence[int], counts: Sequence[int], prices: Prices, *, may_draft: bool, always: bool = False
    ) -> bool:
        """Whether a step without drafts is read.

        Args:
            counts: tokens of each row in it.
            prices: of checks of so many sequences.
            may_draft: as many requests run as may have drafts.
            always: however little drafts can win.
        """
        known = [self._rows[row] for row in rows]
        can_pay = may_draft and (always or self.can_pay(rows))
        in_vain = sum(
            count for one, count in zip(known, counts, strict=True) if one.begun and not one.is_read and count > 1
        )
        reads = can_pay and (always or self._pays(known, prices, in_vain))
        for one, count in zip(known, counts, strict=True):
            passes_over = one.is_read and can_pay and not reads and count == 1 and self._can_be_late
            one.passed_over += passes_over
            one.is_read = passes_over or (reads and (one.is_read or not one.begun))
            one.begun = True
            # a chunk that does not end the prompt brings no token
            one.waiting -= count
            one.left -= one.waiting <= 0
        if not any(one.is_read for one in known):
            return False
        self._credit.pay(self._costs.small(sum(counts)) if reads else self._costs.late_token)
        return reads

    def _pays(self, rows: Sequence[ReadRequest], prices: Prices, in_vain: int) -> bool:
        """Whether the rows' drafts may win what reading costs of those that begin, and lose little. What they may lose
        is shared out to these.

        Args:
            in_vain: tokens of the step that are of prompts which are not read.
        """
        if self._credit.steps >= INITIAL:
            # enough for another try, whatever became of those before
            self._right = self._tried = BEFORE
        beginning = [one for one in rows if not one.begun]
        if in_vain and not beginning:
            return False
        there = sum(one.left for one in rows if one.is_read or not one.begun) / len(rows)
        time = there + sum(self._costs.large(one.num_prompt_tokens) for one in beginning)
        cost = sum(self._costs.small(one.num_prompt_tokens) for one in beginning)
        if in_vain:
            cost += self._costs.small(in_vain)
        tries = (prices.first_try() + PATIENCE * self._costs.late_token) * len(beginning) / len(rows)
        if prices.saved(self._right / self._tried) * there <= cost or cost + tries > SHARE * time:
            return False
        for one in beginning:
            one.share, one.reading = SHARE * time / len(beginning), cost / len(beginning)
        return True

    def given_up(self, rows: Sequence[int], *, always: bool = False) -> list[bool]:
        """Of the rows of a launch with drafts, which have none: they have tokens that were not read."""
        known, can_pay = [self._rows[row] for row in rows], self.can_pay(rows)
        for one in known:
            one.is_read &= always or (can_pay and one.rested < PATIENCE)
        return [not one.is_read for one in known]

    def is_read(self, row: int) -> bool:
        return self._rows[row].is_read

    def passed_over(self, row: int) -> int:
        return self._rows[row].passed_over

    def take_passed_over(self, rows: Sequence[int]) -> list[int]:
        """`passed_over` of each, of which the device is told now."""
        known = [self._rows[row] for row in rows]
        counts = [one.passed_over for one in known]
        for one in known:
            one.passed_over = 0
        return counts

    def can_pay(self, rows: Sequence[int]) -> bool:
        """Whether credit is left, with what the rows that are read may lose."""
        shares = sum(self._rows[row].share for row in rows if self._rows[row].is_read)
        return self._credit.steps + max(shares - INITIAL, 0.0) > 0

    def first_credit(self, rows: Sequence[int]) -> float:
        """Of requests that have their first launch with drafts, the least that one of them may lose by checks, in steps
        of its own.
        """
        size, beginning = len(rows), [one for row in rows if (one := self._rows[row]).is_read]
        left = (size * (one.share - one.reading - PATIENCE * self._costs.late_token / size) for one in beginning)
        return min(max(min(left, default=0.0), INITIAL), MOST)

    def requests(self, rows: Sequence[int]) -> list[ReadRequest]:
        """Those that the rows have now: by the time that a launch is read, others may have them."""
        return [self._rows[row] for row in rows]

    def learn(
        self,
        requests: Sequence[ReadRequest],
        num_tokens: Sequence[int],
        drafted: np.ndarray,
        accepted: np.ndarray,
        num_single: int,
        *,
        may_check: bool = True,
    ) -> None:
        """What a launch with drafts has brought.

        Args:
            requests: `requests` of the launch's rows, as it was made.
            num_tokens: of each.
            drafted, accepted: i32 [steps, requests], what was checked of each, and what of that was right.
            num_single: steps without checks.
            may_check: False: it was to have none (`prices.CheckPrices.launch`), which says nothing of the drafts.
        """
        if any(one.is_read for one in requests):
            self._credit.pay(num_single * self._costs.late_token)
        for one, count, drafts in zip(requests, num_tokens, drafted.T, strict=True):
            one.left -= count
            one.rested = 0 if drafts.any() else one.rested + count * may_check
        checked = drafted.any(axis=1)
        for drafts, right in zip(drafted[checked], accepted[checked], strict=True):
            self._right = KEPT * self._right + float(right.sum())
            self._tried = KEPT * self._tried + float((right + (right < drafts)).sum())
