"""How a workload fared, simulated or measured."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from jaxllm.engine.observe.trace import Trace

#: names of numbers, how they are shown, and in which unit of theirs
SHOWN = (
    ("throughput", "output tokens/s", 1.0),
    ("request_throughput", "requests/s", 1.0),
    ("ttft_p50", "TTFT, median, ms", 1e3),
    ("ttft_p99", "TTFT, 99th percentile, ms", 1e3),
    ("tpot_p50", "TPOT, median, ms", 1e3),
    ("tpot_p99", "TPOT, 99th percentile, ms", 1e3),
    ("itl_p50", "ITL, median, ms", 1e3),
    ("itl_p99", "ITL, 99th percentile, ms", 1e3),
    ("e2e_p50", "end to end, median, ms", 1e3),
    ("seconds", "seconds", 1.0),
    ("preemptions", "preemptions", 1.0),
    ("hit_rate", "prefix hit rate", 1.0),
    ("kv_cache_usage_max", "KV cache, at most", 1.0),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimulatedRun:
    """Times are in seconds from the beginning. Arrays of requests have an entry for each that got a token, in the order
    of arrival; arrays of steps one for each launch.
    """

    #: of requests: when they came, had their first token, and their last
    arrivals: np.ndarray
    firsts: np.ndarray
    lasts: np.ndarray
    #: and their tokens
    prompt_lengths: np.ndarray
    output_lengths: np.ndarray
    #: between two outputs of a request, of all requests; empty where that was not recorded
    itl: np.ndarray
    preemptions: int
    #: prompt tokens that the prefix cache had
    cached_tokens: int
    #: of steps: when they were decided, and what there was then, the cache as a share in [0, 1]
    times: np.ndarray
    kv_cache_usage: np.ndarray
    num_running: np.ndarray
    num_waiting: np.ndarray

    @property
    def num_requests(self) -> int:
        return len(self.arrivals)

    @property
    def output_tokens(self) -> int:
        return int(self.output_lengths.sum())

    @property
    def prompt_tokens(self) -> int:
        return int(self.prompt_lengths.sum())

    @property
    def seconds(self) -> float:
        """From the first arrival to the last token."""
        return float(self.lasts.max() - self.arrivals.min()) if len(self.arrivals) else 0.0

    @property
    def throughput(self) -> float:
        """Output tokens a second."""
        return self.output_tokens / self.seconds if self.seconds else 0.0

    @property
    def request_throughput(self) -> float:
        """Requests a second."""
        return self.num_requests / self.seconds if self.seconds else 0.0

    @property
    def ttft(self) -> np.ndarray:
        """Of each request, from its arrival to its first token."""
        return self.firsts - self.arrivals

    @property
    def e2e(self) -> np.ndarray:
        """Of each request, from its arrival to its last token."""
        return self.lasts - self.arrivals

    @property
    def tpot(self) -> np.ndarray:
        """Of each request of several tokens, the mean time between two of them."""
        several = self.output_lengths > 1
        return (self.lasts - self.firsts)[several] / (self.output_lengths[several] - 1)

    @property
    def hit_rate(self) -> float:
        """The share of prompt tokens that the prefix cache had, in [0, 1]."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def goodput(self, *, ttft: float | None = None, tpot: float | None = None, e2e: float | None = None) -> float:
        """Requests a second of those that were as fast as all of these have it, as in DistServe (arXiv:2401.09670).

        Args:
            ttft, tpot, e2e: seconds; None: any number.
        """
        means = (self.lasts - self.firsts) / np.maximum(self.output_lengths - 1, 1)
        good = np.ones(self.num_requests, bool)
        for values, limit in ((self.ttft, ttft), (means, tpot), (self.e2e, e2e)):
            if limit is not None:
                good &= values <= limit
        return int(good.sum()) / self.seconds if self.seconds else 0.0

    def percentile(self, name: str, rank: float) -> float | None:
        """Of "ttft", "tpot", "itl" or "e2e", in seconds; None where there are no values."""
        values = getattr(self, name)
        return float(np.percentile(values, rank)) if len(values) else None

    def to_dict(self) -> dict[str, float | None]:
        """Numbers by name, such as "throughput" and "ttft_p50"; None where there were no values for one."""
        names = (f"{name}_p{rank}" for name in ("ttft", "tpot", "itl", "e2e") for rank in (50, 90, 99))
        return {
            "throughput": self.throughput,
            "request_throughput": self.request_throughput,
            **{name: self.percentile(name.split("_")[0], int(name.split("_p")[1])) for name in names},
            "seconds": self.seconds,
            "preemptions": self.preemptions,
            "hit_rate": self.hit_rate,
            "kv_cache_usage_max": float(self.kv_cache_usage.max(initial=0.0)),
        }

    def __str__(self) -> str:
        return table({"simulated": self})

    @classmethod
    def of_trace(cls, trace: Trace) -> SimulatedRun:
        """What a trace measured, of the requests that it has seen from their arrival to their end."""
        done = [each for each in trace.requests if each.first_token is not None and each.last_token is not None]
        done.sort(key=lambda each: each.queued)
        columns: dict[str, Any] = {
            name: np.array([getattr(each, name) for each in done])
            for name in ("queued", "first_token", "last_token", "num_prompt_tokens", "num_output_tokens")
        }
        steps = trace.arrays()
        return cls(
            arrivals=columns["queued"].astype(float),
            firsts=columns["first_token"].astype(float),
            lasts=columns["last_token"].astype(float),
            prompt_lengths=columns["num_prompt_tokens"].astype(int),
            output_lengths=columns["num_output_tokens"].astype(int),
            itl=np.zeros(0),
            preemptions=int(steps["num_preemptions"].sum()),
            cached_tokens=sum(each.num_cached_tokens for each in done),
            times=steps["start"],
            kv_cache_usage=steps["kv_cache_usage"],
            num_running=steps["num_running"],
            num_waiting=steps["num_waiting"],
        )


def table(columns: dict[str, SimulatedRun], more: dict[str, dict[str, str]] | None = None) -> str:
    """Runs beside each other, as text.

    Args:
        more: other columns, heading -> name of a number -> text, behind the simulation of what was measured, or last.
    """
    texts: dict[str, dict[str, str]] = {}
    for heading, run in columns.items():
        numbers = run.to_dict()
        found = {name: (numbers[name], factor) for name, _, factor in SHOWN}
        texts[heading] = {
            name: "-" if value is None else f"{factor * value:.2f}" for name, (value, factor) in found.items()
        }
    first = dict(list(texts.items())[: 2 if "measured" in texts else None])
    texts = first | (more or {}) | texts
    widths = {heading: max(len(heading), *map(len, each.values())) + 2 for heading, each in texts.items()}
    lines = [" " * 28 + "".join(f"{heading:>{width}}" for heading, width in widths.items())]
    for name, label, _ in SHOWN:
        cells = (f"{texts[heading].get(name, ''):>{width}}" for heading, width in widths.items())
        lines.append(f"{label:28}{''.join(cells)}".rstrip())
    return "\n".join(lines)
