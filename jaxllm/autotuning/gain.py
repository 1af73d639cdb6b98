"""By how much one setting is better than another, and how sure that is: of rounds in which both ran."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from jaxllm.autotuning.goals import Goals, gain_text

#: 97.5% quantiles of Student's t of 1, 2, ... degrees of freedom; of more than these, the last is a little too careful
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)
#: a bound of a gain from which on it bounds nothing
_ANYTHING = 10.0


@dataclasses.dataclass(frozen=True)
class Gain:
    """Of the objective, in each round: 0.1 is ten percent better.

    The speed of a machine drifts from minute to minute by more than settings differ, so that only what ran beside each
    other is compared. Gains are averaged as logarithms: twice as fast and half as fast make none.
    """

    values: tuple[float, ...]

    @classmethod
    def of(cls, goals: Goals, ours: Sequence[Mapping[str, float]], theirs: Sequence[Mapping[str, float]]) -> Gain:
        """Of the numbers of the same rounds, of one at least."""
        return cls(tuple(goals.gain(us, them) for us, them in zip(ours, theirs, strict=True)))

    @property
    def mean(self) -> float:
        """The median where some rounds have nothing to compare with (no request kept to the limits of "goodput")."""
        logs = self._logs()
        return float(np.median(self.values)) if logs is None else math.expm1(logs.mean())

    @property
    def low(self) -> float:
        """With 95% confidence it is above this one and below `high`; one round says nothing of that."""
        return self._bound(-_STUDENT[min(len(self.values), len(_STUDENT) + 1) - 2])

    @property
    def high(self) -> float:
        return self._bound(_STUDENT[min(len(self.values), len(_STUDENT) + 1) - 2])

    @property
    def is_shown(self) -> bool:
        """Whether there is one, beyond what the rounds differ by."""
        return self.low > 0

    def may_exceed(self, limit: float) -> bool:
        """Whether twice the standard error leaves room for more than that."""
        return self._bound(2.0) > limit

    def text(self) -> str:
        """Such as "+3.1% (+0.4% to +5.9%, 6 rounds)"."""
        if len(self.values) == 1:
            return f"{gain_text(self.mean)} in one round, which does not say how sure that is"
        if self._logs() is not None and self.high > _ANYTHING:
            return f"{gain_text(self.mean)} in {len(self.values)} rounds, too few to say how sure that is"
        if self._logs() is None:
            return f"{gain_text(self.mean)} ({len(self.values)} rounds)"
        return f"{gain_text(self.mean)} ({self.low:+.1%} to {self.high:+.1%}, {len(self.values)} rounds)"

    def _bound(self, factor: float) -> float:
        if len(self.values) < 2:
            return math.copysign(math.inf, factor)
        logs = self._logs()
        if logs is None:
            return min(self.values) if factor < 0 else max(self.values)
        # no exponent that a double cannot have
        return math.expm1(min(logs.mean() + factor * logs.std(ddof=1) / math.sqrt(len(logs)), 700.0))

    def _logs(self) -> np.ndarray | None:
        """None: some are infinite."""
        values = np.array(self.values)
        return np.log1p(values) if np.isfinite(values).all() and (values > -1).all() else None
