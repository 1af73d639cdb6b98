"""Values with a name and labels, in vLLM's four kinds."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Metric:
    """One value, or one family of them, at the time of the snapshot."""

    name: str
    labels: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Counter(Metric):
    """Only ever grows. vLLM's are whole numbers; seconds are not."""

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


_KINDS = {kind.__name__.lower(): kind for kind in (Counter, Gauge, Vector, Histogram)}


def to_dict(metric: Metric) -> dict[str, Any]:
    """Of what JSON knows."""
    return {"type": type(metric).__name__.lower(), **dataclasses.asdict(metric)}


def from_dict(fields: Mapping[str, Any]) -> Metric:
    """Of a `to_dict`. Raises KeyError or TypeError for something else."""
    given = dict(fields)
    return _KINDS[given.pop("type")](**given)


def since(before: Iterable[Metric], now: Iterable[Metric]) -> list[Metric]:
    """What was counted between two snapshots of one engine; gauges are those of the second one."""
    earlier = {_key(metric): metric for metric in before}
    return [_less(metric, earlier.get(_key(metric))) for metric in now]


def _key(metric: Metric) -> tuple[str, tuple[tuple[str, str], ...]]:
    return metric.name, tuple(sorted(metric.labels.items()))


def _less(metric: Metric, before: Metric | None) -> Metric:
    if isinstance(metric, Counter) and isinstance(before, Counter):
        return dataclasses.replace(metric, value=metric.value - before.value)
    if isinstance(metric, Vector) and isinstance(before, Vector):
        values = [value - other for value, other in zip(metric.values, before.values, strict=True)]
        return dataclasses.replace(metric, values=values)
    if isinstance(metric, Histogram) and isinstance(before, Histogram):
        buckets = {bound: count - before.buckets.get(bound, 0) for bound, count in metric.buckets.items()}
        count, total = metric.count - before.count, metric.sum - before.sum
        return dataclasses.replace(metric, count=count, sum=total, buckets=buckets)
    return metric
