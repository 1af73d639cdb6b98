"""How many drafts are checked (`jaxllm.speculative.adaptive`), written down in plain Python."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from jaxllm.speculative.credit import DEAREST, INITIAL, MOST, RATE


@dataclasses.dataclass
class ByTheRule:
    """One sequence."""

    credit: float = INITIAL
    right: float = 1.6
    tried: float = 2.0

    def expected(self, count: int) -> float:
        return sum((self.right / self.tried) ** place for place in range(1, count + 1))

    def after_check(self, share: float, count: int, accepted: int) -> None:
        self.credit = min(self.credit + accepted - share, MOST)
        self.right += accepted - self.right / 8
        self.tried += accepted + (accepted < count) - self.tried / 8

    def after_step(self) -> None:
        self.credit = min(self.credit + RATE, MOST)


def chosen(
    lengths: Sequence[int], sequences: Sequence[ByTheRule | None], counts: Sequence[int], extra: Sequence[float]
) -> tuple[int, list[int], float]:
    """The check, or 0, of those that are not None; their drafts; and how near the decision was."""
    there = [one for one in sequences if one is not None]
    taking = [count if one and one.credit > 0 else 0 for one, count in zip(sequences, counts, strict=True)]
    purse = sum(one.credit for one, count in zip(sequences, taking, strict=True) if one and (count or one.credit < 0))
    near = min((abs(one.credit) for one in there), default=1.0)
    if not any(taking):
        return 0, taking, near
    may_owe = purse >= INITIAL * len(there)
    near = min(near, abs(purse - INITIAL * len(there)))
    gains, payable, owed = [], [], []
    for length, cost in zip(lengths, extra, strict=True):
        price, drafts = cost * len(there), sum(min(count, length) for count in taking)
        won = sum(one.expected(min(count, length)) for one, count in zip(sequences, taking, strict=True) if one)
        near = min(near, abs(purse - price))
        payable.append(drafts > price and purse >= price)
        owed.append(drafts > price and may_owe and cost <= DEAREST)
        gains.append(won - price if payable[-1] else -1.0)
    near = min(near, *(abs(gain) for gain in gains), *(abs(a - b) for a, b in itertools.combinations(gains, 2)))
    kind = 0
    if max(gains) > 0:
        kind = 1 + gains.index(max(gains))
    elif any(payable) or any(owed):
        kind = 1 + (payable if any(payable) else owed).index(True)
    return kind, [min(count, (0, *lengths)[kind]) for count in taking], near
