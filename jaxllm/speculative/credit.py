"""What drafts may cost: credit in steps of a single token, out of which is paid what may be lost, and which right
drafts fill up again.

What is promised, of the requests' times in steps, their mean: whatever is drafted, however often it is right, and
whatever checks cost once they have been timed, all that drafts of all requests lose together is at no time more than

- `INITIAL` once, or `DEAREST` where a single check costs more,
- twice `RATE` of the steps that were made: each request's own, and the engine's,
- where a model drafts, `SHARE` of the time that the running requests take without drafts, up to their max_tokens,
- and what was under way when that was spent.

So it is less than 3% of the time without drafts, but for the first `INITIAL` of an engine, which is more than that of a
batch of less than 50 steps. A request that ends long before its max_tokens may have lost the share of what it did not
get; until that is paid off, no other request is drafted for by the model. What requests have at first, the engine pays
out of a credit of its own, so that short ones, of which each would lose that much, lose no more together. That one is
never above `INITIAL` either: what earlier requests won is not lost by later ones, whose batch would be slower than
without drafts.
"""

from __future__ import annotations

#: steps: what there is at first, what each step without a check adds, and the most that there ever is, however much was
#: won, of which so much may be lost again
INITIAL, RATE, MOST = 1.5, 0.0075, 16.0
#: steps: what a check may cost for which whoever has `INITIAL` goes into debt
DEAREST = 3.0
#: what reading by a model that drafts, and the checks behind it, may lose, of the time without drafts
SHARE = 0.014


class Credit:
    """What the host, or the engine, may lose; `speculative.adaptive` has each request's own, on the device."""

    def __init__(self, most: float = INITIAL) -> None:
        self._steps, self._most = INITIAL, most

    @property
    def steps(self) -> float:
        return self._steps

    @property
    def is_left(self) -> bool:
        return self._steps > 0

    def pay(self, steps: float) -> None:
        self._steps -= steps

    def grow(self, num_steps: int = 1) -> None:
        """So many steps were made that cost nothing more."""
        self.win(RATE * num_steps)

    def win(self, steps: float) -> None:
        self._steps = min(self._steps + steps, self._most)
