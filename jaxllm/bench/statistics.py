"""Means and percentiles of measured times."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which `percent` of the sorted `values` lie, between two of them by linear interpolation (numpy's
    default). Raises ValueError without values.
    """
    if not values:
        raise ValueError("there is no percentile of nothing")
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def summary(values: Sequence[float], percents: Iterable[float] = (99,)) -> dict[str, float]:
    """Mean, median, standard deviation (of the population) and percentiles, named as in vLLM's results ("p99"); of no
    values, zeros.
    """
    if not values:
        values = [0.0]
    return {
        "mean": statistics.fmean(values),
        "median": statistics.median(values),
        "std": statistics.pstdev(values),
        **{f"p{percent:g}": percentile(values, percent) for percent in percents},
    }
