"""Values with a name and labels, in vLLM's four kinds."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Metric:
    """One value, or one family of them, at the time of the snapshot."""

    name: str
    labels: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Counter(Metric):
    """Only ever grows."""

    value: int


@dataclasses.dataclass(frozen=True)
class Gauge(Metric):
    """Goes up and down."""

    value: float


@dataclasses.dataclass(frozen=True)
class Vector(Metric):
    """Counters in order, such as one per position of a draft."""

    values: list[int]


@dataclasses.dataclass(frozen=True)
class Histogram(Metric):
    """`buckets`: upper bound (included), as the text of a float -> observations up to it; the last one is "+Inf"."""

    count: int
    sum: float
    buckets: dict[str, int]


def one_two_five(most: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50, ... up to `most`; vLLM's bounds for numbers of tokens."""
    series = (digit * 10**power for power in itertools.count() for digit in (1, 2, 5))
    return tuple(itertools.takewhile(lambda bound: bound <= most, series))


class Observations:
    """A histogram that is being filled."""

    def __init__(self, bounds: Iterable[float]) -> None:
        self._bounds = tuple(float(bound) for bound in bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def add(self, value: float, times: int = 1) -> None:
        self._counts[bisect.bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def histogram(self, name: str, labels: dict[str, str]) -> Histogram:
        cumulative = list(itertools.accumulate(self._counts))
        buckets = dict(zip((*map(str, self._bounds), "+Inf"), cumulative, strict=True))
        return Histogram(name, labels, cumulative[-1], self._sum, buckets)
