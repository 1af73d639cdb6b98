"""From measured seconds to tokens per second."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

from jaxllm.bench.requests import BenchRequest, output_tokens, prompt_tokens

_RATES = (
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "requests_per_s",
    "total_tokens_per_s",
    "output_tokens_per_s",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a round computes."""

    num_requests: int
    prompt_tokens: int
    output_tokens: int

    @classmethod
    def of(cls, requests: list[BenchRequest]) -> Sizes:
        return cls(
            num_requests=len(requests), prompt_tokens=prompt_tokens(requests), output_tokens=output_tokens(requests)
        )

    def rates(self, seconds: float, prefill_seconds: float | None) -> dict[str, float]:
        """Rates of one round.

        Args:
            seconds: of the whole round.
            prefill_seconds: of a round of the same requests that generates one token each; None: not measured.

        Prefill is the prompts over `prefill_seconds`; decode is the tokens after the first of each request over the
        rest of `seconds`. An engine that mixes both in one step is measured by the same difference.
        """
        found = {
            "requests_per_s": self.num_requests / seconds,
            "total_tokens_per_s": (self.prompt_tokens + self.output_tokens) / seconds,
            "output_tokens_per_s": self.output_tokens / seconds,
        }
        if prefill_seconds is not None:
            found["prefill_tokens_per_s"] = self.prompt_tokens / prefill_seconds
            if seconds > prefill_seconds and self.output_tokens > self.num_requests:
                found["decode_tokens_per_s"] = (self.output_tokens - self.num_requests) / (seconds - prefill_seconds)
        return found


@dataclasses.dataclass(kw_only=True)
class Samples:
    """What an engine's rounds over the same requests took, in seconds; one entry an iteration."""

    sizes: Sizes
    seconds: list[float] = dataclasses.field(default_factory=list)
    prefill_seconds: list[float] = dataclasses.field(default_factory=list)

    def medians(self) -> dict[str, float]:
        """The median of each rate, and of the rounds' seconds."""
        prefills = self.prefill_seconds or [None] * len(self.seconds)
        rounds = [self.sizes.rates(*pair) for pair in zip(self.seconds, prefills, strict=True)]
        found = {"seconds": statistics.median(self.seconds)}
        for name in _RATES:
            values = [rates[name] for rates in rounds if name in rates]
            if values:
                found[name] = statistics.median(values)
        return found

    def record(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            **dataclasses.asdict(self.sizes),
            "seconds": self.seconds,
            "prefill_seconds": self.prefill_seconds,
            "medians": self.medians(),
        }
