"""Measured seconds become means, percentiles and tokens per second."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxllm.bench.datasets import BenchRequest

#: what vLLM prints of a latency and of a start
PERCENTAGES = (10, 25, 50, 75, 90, 99)


def percentiles(values: Sequence[float]) -> dict[int, float]:
    """Return vLLM's `PERCENTAGES` of `values`, which are not empty, interpolated linearly."""
    return {share: float(np.percentile(values, share)) for share in PERCENTAGES}


def summary(values: Sequence[float]) -> dict[str, float]:
    """Return mean, median, standard deviation (of the population) and 99th percentile, named as in vLLM's results.

    They are zeros where there are no values.
    """
    found = {"mean": np.mean, "median": np.median, "std": np.std, "p99": lambda array: np.percentile(array, 99)}
    array = np.asarray(values or [0.0])
    return {name: float(function(array)) for name, function in found.items()}


def ranks(values: Sequence[float]) -> dict[str, float]:
    """Return median, 99th and 10th percentile, minimum and mean of values that are not empty. The two percentiles are
    values that occurred (the nearest rank).
    """
    ranked = sorted(values)
    return {
        "p50": float(np.median(ranked)),
        "p99": ranked[-(-99 * len(ranked) // 100) - 1],
        "p10": ranked[len(ranked) // 10],
        "min": ranked[0],
        "mean": float(np.mean(ranked)),
    }


def turns(arguments: argparse.Namespace) -> range:
    """Return the rounds of a benchmark; those below 0 warm up, and do not count."""
    return range(-arguments.num_iters_warmup, arguments.num_iters)


@dataclasses.dataclass(kw_only=True)
class Samples:
    """What an engine's rounds over the same requests took, in seconds; one entry an iteration."""

    num_requests: int
    prompt_tokens: int
    output_tokens: int
    num_images: int = 0
    seconds: list[float] = dataclasses.field(default_factory=list)
    #: of rounds that generate one token of each request; empty where prefill is not measured apart
    prefill_seconds: list[float] = dataclasses.field(default_factory=list)

    @classmethod
    def of(cls, requests: Sequence[BenchRequest]) -> Samples:
        return cls(
            num_requests=len(requests),
            prompt_tokens=sum(len(request.prompt_token_ids) for request in requests),
            output_tokens=sum(request.output_len for request in requests),
            num_images=sum(len(request.pictures) for request in requests),
        )

    def add(self, turn: int, seconds: float, prefill_seconds: float | None = None) -> None:
        """Add a round, unless it only warms up."""
        if turn >= 0:
            self.seconds.append(seconds)
            self.prefill_seconds += [] if prefill_seconds is None else [prefill_seconds]

    def rates(self, seconds: float, prefill_seconds: float | None) -> dict[str, float]:
        """Return the rates of one round.

        Prefill is the prompts over `prefill_seconds`; decode is the tokens after the first of each request over the
        rest of `seconds`. An engine that mixes both in one step is measured by the same difference.
        """
        found = {
            "requests_per_s": self.num_requests / seconds,
            "total_tokens_per_s": (self.prompt_tokens + self.output_tokens) / seconds,
            "output_tokens_per_s": self.output_tokens / seconds,
        }
        if self.num_images:
            found["images_per_s"] = self.num_images / seconds
        if prefill_seconds is not None:
            found["prefill_tokens_per_s"] = self.prompt_tokens / prefill_seconds
            if seconds > prefill_seconds and self.output_tokens > self.num_requests:
                found["decode_tokens_per_s"] = (self.output_tokens - self.num_requests) / (seconds - prefill_seconds)
        return found

    def medians(self) -> dict[str, float]:
        """Return the median of the rounds' seconds and of each rate."""
        prefills = self.prefill_seconds or [None] * len(self.seconds)
        rounds = [self.rates(*pair) for pair in zip(self.seconds, prefills, strict=True)]
        names = dict.fromkeys(name for rates in rounds for name in rates)
        medians = {name: float(np.median([rates[name] for rates in rounds if name in rates])) for name in names}
        return {"seconds": float(np.median(self.seconds)), **medians}

    def record(self) -> dict[str, Any]:
        """Return all of it, for JSON."""
        return {**dataclasses.asdict(self), "medians": self.medians()}
