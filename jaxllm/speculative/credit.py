"""What drafts may cost: credit in steps of a single token, out of which is paid what may be lost, and which right
drafts fill up again.

So all that is lost together is no more than `INITIAL`, and `RATE` of the steps; a request of 128 tokens loses at most
1.5 steps and 1.25% of 128, less than 3%. What requests have at first, the engine pays out of a credit of its own, so
that short ones, of which each would lose that much, lose no more together. That one is never above `INITIAL` either:
what earlier requests won is not lost by later ones, whose batch would be slower than without drafts.
"""

from __future__ import annotations

#: steps: what there is at first, what each step without a check adds, and the most that there ever is, however much was
#: won, of which so much may be lost again
INITIAL, RATE, MOST = 1.5, 0.0125, 16.0


class Credit:
    """What the host, or the engine, may lose; `speculative.adaptive` has each request's own, on the device."""

    def __init__(self, most: float = MOST) -> None:
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
