"""What checks cost, learned from how long launches took: prices differ by device, model and length of the sequences."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from jaxllm.speculative.adaptive import ONE
from jaxllm.speculative.credit import INITIAL

#: how far a launch moves what is known, as an exponent of its time over the expected one; and what such a quotient is
#: at most, as the machine may have done something else meanwhile
PACE, LARGEST_QUOTIENT = 0.25, 2.0
#: steps, of a check
LEAST, MOST = 1.0, 16.0


class CheckPrices:
    """Of the launches of one number of sequences: what a check of each length takes longer than a step of a single
    token.

    A launch is some steps without drafts and some checks, so its time says the sum of their times. Whatever it took
    more or less than expected is put down to each kind by its part of what was expected. (Multiplicative updates in
    proportion to the parts: what was never launched keeps its relation to a step.)

    Args:
        steps: i32 [L] in units of 1 / `ONE`, of the shortest checks first: what is believed before any launch. Changed
            in place, as it is learned.
    """

    def __init__(self, steps: np.ndarray):
        # a check that no request can pay is never tried, and so its price never learned
        steps[0] = min(steps[0], round(INITIAL * ONE))
        self._steps = steps
        #: seconds of a step without drafts; None: no launch was timed
        self._seconds: float | None = None

    def saw(self, seconds: float, kinds: Sequence[int]) -> None:
        """A launch took so long, and had so many steps of each kind: without drafts, then of each length."""
        counts = np.asarray(kinds, np.float64)
        relative = np.concatenate([[1.0], 1.0 + self._steps / ONE])
        parts = counts * relative
        if not parts.sum() or seconds <= 0:
            return
        if self._seconds is None:
            self._seconds = seconds / parts.sum()
            return
        quotient = seconds / (self._seconds * parts.sum())
        quotient = min(max(quotient, 1 / LARGEST_QUOTIENT), LARGEST_QUOTIENT)
        moves = quotient ** (PACE * parts / parts.sum())
        self._seconds *= float(moves[0])
        learned = np.clip(relative[1:] * moves[1:], LEAST, MOST)
        self._steps[:] = np.round((learned - 1.0) * ONE)


class LaunchClock:
    """Times launches by when they were launched and when the host, which waited for them, had what they brought.

    The device works on one launch after the other, and two are under way: a launch begins when the one before it is
    done. Where the host comes late for a launch, its time is not known, nor that of the one behind it.
    """

    def __init__(self) -> None:
        self._launches = 0
        #: the latest launch that was timed, and when it was done
        self._done: tuple[int, float] | None = None

    def launched(self) -> tuple[int, float]:
        """Of any launch: its number, and now."""
        self._launches += 1
        return self._launches, time.perf_counter()

    def seconds(self, launch: tuple[int, float], *, waited: bool) -> float | None:
        """How long a launch took that is done just now.

        Args:
            waited: it was not done when the host came for it.
        """
        (number, began), now, before = launch, time.perf_counter(), self._done
        self._done = (number, now) if waited else None
        if not waited or before is None or before[0] != number - 1:
            return None
        return now - max(began, before[1])
