"""What checks cost, learned from how long launches took: prices differ by device, model and length of the sequences."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from jaxllm.speculative.adaptive import ONE

#: how far a launch moves what is known, as an exponent of its time over the expected one; and what such a quotient is
#: at most, as the machine may have done something else meanwhile
PACE, LARGEST_QUOTIENT = 0.25, 2.0
#: steps, of a check. None is free: drafts that cost nothing would be checked for ever, however wrong they are
LEAST, MOST = 1.05, 16.0
#: what a check of k drafts is believed to add is at most this part of k steps, the most that it can win: what costs
#: more is not tried (`speculative.adaptive`), and so nobody would ever see what it costs
BELIEVED = 0.9
#: the part of the way back to what was believed that a dear price goes with each launch that has no such check
RETURN = 1 / 2048
#: launches without drafts: the first ones, and one of so many. Prices are in steps without drafts, whose time is known
#: where some are made
FIRST_PLAIN, PLAIN = 3, 64


class CheckPrices:
    """Of the launches of one number of sequences: what a check of each length takes longer than a step of a single
    token.

    A launch is some steps without drafts and some checks, so its time says the sum of their times. Whatever it took
    more or less than expected is put down to each kind by its part of what was expected. (Multiplicative updates in
    proportion to the parts: what was never launched keeps its relation to a step.) The first launch with a check whose
    price is only believed moves that price all the way, since what a check costs more than is paid for it is lost
    beside all credit.

    A price may be learned that is too dear to be tried again, beside a program that is gone by now; so where it is not
    launched, it returns slowly to what was believed, and is seen anew. What that try costs, credit has paid for.

    Args:
        steps: i32 [L] in units of 1 / `ONE`: what is believed before any launch. Changed in place, as it is learned.
        lengths: drafts of each check.
    """

    def __init__(self, steps: np.ndarray, lengths: Sequence[int]):
        np.minimum(steps, np.round(BELIEVED * ONE * np.asarray(lengths)), out=steps, casting="unsafe")
        self._steps = steps
        self._believed = 1.0 + steps / ONE
        #: the same, as it was learned
        self._relative = self._believed.copy()
        self._seen = np.zeros(len(steps), bool)
        #: seconds of a step without drafts; None: no launch was timed
        self._seconds: float | None = None
        self._launches = 0

    @property
    def seconds(self) -> float | None:
        """Of a step without drafts; None: none was timed."""
        return self._seconds

    def launch(self) -> bool:
        """Of the next launch: whether it may have drafts."""
        self._launches += 1
        return self._launches > FIRST_PLAIN and self._launches % PLAIN > 0

    def saw(self, seconds: float, kinds: Sequence[int]) -> None:
        """A launch took so long, and had so many steps of each kind: without drafts, then of each length."""
        counts = np.asarray(kinds, np.float64)
        relative = np.concatenate([[1.0], self._relative])
        parts = counts * relative
        if not parts.sum() or seconds <= 0:
            return
        if self._seconds is None:
            self._seconds = seconds / parts.sum()
            return
        first = np.concatenate([[False], ~self._seen]) & (counts > 0)
        if first.any():
            quotient = (seconds / self._seconds - parts[~first].sum()) / parts[first].sum()
            moves = np.where(first, min(max(quotient, 1 / LARGEST_QUOTIENT), LARGEST_QUOTIENT), 1.0)
            self._seen |= first[1:]
        else:
            quotient = seconds / (self._seconds * parts.sum())
            quotient = min(max(quotient, 1 / LARGEST_QUOTIENT), LARGEST_QUOTIENT)
            moves = quotient ** (PACE * parts / parts.sum())
        self._seconds *= float(moves[0])
        learned = np.clip(relative[1:] * moves[1:], LEAST, MOST)
        returns = (counts[1:] == 0) & (learned > self._believed)
        self._relative = np.where(returns, learned + RETURN * (self._believed - learned), learned)
        self._steps[:] = np.round((self._relative - 1.0) * ONE)


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
