"""What is asked of the best settings: an objective, and the constraints that hold in any case."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from jaxllm.api.errors import ValidationError
from jaxllm.tuning.simulation.simulated_run import SimulatedRun

#: objective -> (its unit, whether more of it is better, what it is)
OBJECTIVES: dict[str, tuple[str, bool, str]] = {
    "throughput": ("tok/s", True, "output tokens a second"),
    "latency": ("s", False, "the median of the seconds from a request's arrival to its last token"),
    "goodput": ("req/s", True, "requests a second that keep to the limits of all constraints"),
}
#: of each request, in seconds
LATENCIES = ("ttft", "tpot", "itl", "e2e")
_OTHER_NAMES = {"e2el": "e2e", "latency": "e2e"}
#: of a run -> the unit that may follow the number
_RATES = {"throughput": "tok/s", "goodput": "req/s"}
_SECONDS = {"ms": 1e-3, "s": 1.0, "us": 1e-6, "min": 60.0}
_EXAMPLES = "'p99 ttft<2s', 'p50 itl<50ms', 'mean e2e<10s' or 'throughput>500'"
_FORM = re.compile(
    r"(?:(?P<rank>p\d+(?:\.\d+)?|median|mean|max)[\s_]*)?(?P<name>[a-z][a-z0-9_]*?)\s*(?P<sign><=|>=|<|>|=+)\s*"
    r"(?P<number>\d+(?:\.\d*)?|\.\d+)\s*(?P<unit>[a-z%/]*)"
)
#: of a latency, where a constraint names no other
DEFAULT_RANK = "p99"


@dataclasses.dataclass(frozen=True)
class Constraint:
    """One bound: of a latency from above, of a rate from below."""

    #: one of `LATENCIES` or of "throughput" and "goodput"
    name: str
    #: "p99" and its like, "mean" or "max"; "": of each request, or of a rate
    rank: str
    #: seconds, or a rate
    limit: float
    #: as it was written
    text: str

    @property
    def is_latency(self) -> bool:
        return self.name in LATENCIES

    @property
    def key(self) -> str:
        """Under which `Numbers` has what is bounded."""
        return f"{self.name}_{self.rank or DEFAULT_RANK}" if self.is_latency else self.name

    def excess(self, numbers: Mapping[str, float]) -> float:
        """By how much it is missed, relative to the limit; at most 0 where it is kept."""
        value = numbers[self.key]
        if self.is_latency:
            return value / self.limit - 1
        return 1 - value / self.limit

    def __str__(self) -> str:
        if not self.is_latency:
            return f"{self.name}>{self.limit:g} {_RATES[self.name]}"
        return f"{self.rank or DEFAULT_RANK} {self.name}<{seconds_text(self.limit)}"


@dataclasses.dataclass(frozen=True)
class Goals:
    """An objective and its constraints."""

    objective: str
    constraints: tuple[Constraint, ...] = ()

    @classmethod
    def of(cls, objective: str, constraints: str | Iterable[str] = ()) -> Goals:
        """Read what a user writes.

        Args:
            constraints: each may be several, with commas between them.

        Raises:
            ValidationError: there is no such objective, or a constraint says nothing that can be kept.
        """
        if objective not in OBJECTIVES:
            close = difflib.get_close_matches(str(objective).lower(), OBJECTIVES, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValidationError(f"objective must be {', '.join(OBJECTIVES)}; got {objective!r}.{hint}")
        texts = [constraints] if isinstance(constraints, str) else list(constraints)
        found = tuple(parse(part) for text in texts for part in re.split(r"[,;]", text) if part.strip())
        if objective == "goodput" and not any(each.is_latency for each in found):
            raise ValidationError(
                "goodput counts the requests that are fast enough: say what that is, by a constraint such as "
                "'ttft<2s' or 'itl<50ms'."
            )
        _check_together(found)
        return cls(objective, found)

    @property
    def unit(self) -> str:
        return OBJECTIVES[self.objective][0]

    @property
    def held(self) -> tuple[Constraint, ...]:
        """Those that the whole run is judged by: with "goodput", a limit without a rank is each request's alone."""
        return tuple(
            each for each in self.constraints if each.rank or not each.is_latency or self.objective != "goodput"
        )

    def numbers(self, run: SimulatedRun) -> dict[str, float]:
        """What is compared and shown of a run: the rates, and percentiles such as "ttft_p99", in seconds.

        "itl" are the times between two outputs; where nobody recorded them, each request's mean.
        """
        several = run.output_lengths > 1
        tpot = np.where(several, (run.lasts - run.firsts) / np.maximum(run.output_lengths - 1, 1), np.nan)
        itl = run.itl if len(run.itl) else tpot
        ranks = (each.rank or DEFAULT_RANK for each in self.constraints if each.is_latency)
        wanted = sorted({"p50", "p99", "mean", *ranks})
        found = {
            "throughput": run.throughput,
            "seconds": run.seconds,
            "preemptions": float(run.preemptions),
            "hit_rate": run.hit_rate,
            "kv_cache_usage_max": float(run.kv_cache_usage.max(initial=0.0)),
        }
        arrays = {"ttft": run.ttft, "tpot": tpot, "itl": itl, "e2e": run.e2e}
        for name, values in arrays.items():
            known = values[np.isfinite(values)]
            found |= {f"{name}_{rank}": _ranked(known, rank) for rank in wanted}
        good = np.ones(run.num_requests, bool)
        for each in self.constraints:
            if each.is_latency:
                # of a request, the time between tokens is their mean; one of a single token has none to be too long
                good &= ~((tpot if each.name == "itl" else arrays[each.name]) > each.limit)
        found["goodput"] = float(good.sum()) / run.seconds if run.seconds else 0.0
        return found

    def value(self, numbers: Mapping[str, float]) -> float:
        """The objective, in its unit."""
        return numbers["e2e_p50"] if self.objective == "latency" else numbers[self.objective]

    def excess(self, numbers: Mapping[str, float]) -> float:
        """By how much the constraint is missed that is missed most; at most 0 where all are kept."""
        return max((each.excess(numbers) for each in self.held), default=0.0)

    def score(self, numbers: Mapping[str, float]) -> float:
        """Larger is better: logarithm of the objective, and a little of what the objective does not see, so that of
        settings that are as good (requests that come slowly are all answered) those are best that answer soonest.
        """
        value = max(self.value(numbers), 1e-12)
        sooner = -math.log(max(numbers["e2e_mean"], 1e-12))
        return (math.log(value) if OBJECTIVES[self.objective][1] else -math.log(value)) + 1e-3 * sooner

    def rank(self, numbers: Mapping[str, float]) -> tuple[float, float]:
        """To sort by, the best first: what misses constraints comes behind, the nearest first."""
        excess = self.excess(numbers)
        return (excess, 0.0) if excess > 0 else (0.0, -self.score(numbers))

    def gain(self, numbers: Mapping[str, float], other: Mapping[str, float]) -> float:
        """How much better the objective is than another run's: 0.1 is ten percent, -1 is nothing in place of
        something (no request kept to the limits of "goodput"), infinity the other way round.
        """
        ours, theirs = self.value(numbers), self.value(other)
        if ours == theirs:
            return 0.0
        if not theirs or not ours:
            return math.inf if bool(ours) == OBJECTIVES[self.objective][1] else -1.0
        return ours / theirs - 1 if OBJECTIVES[self.objective][1] else theirs / ours - 1

    def text(self, numbers: Mapping[str, float]) -> str:
        """The objective and what is bounded, for people."""
        value = self.value(numbers)
        shown = f"median e2e {seconds_text(value)}" if self.objective == "latency" else f"{value:.4g} {self.unit}"
        keys = dict.fromkeys(each.key for each in self.held if each.key != self.objective)
        return ", ".join([shown, *(f"{_heading(key)} {_shown(key, numbers[key])}" for key in keys)])

    def __str__(self) -> str:
        each = [str(one) if one in self.held else str(one).removeprefix(f"{DEFAULT_RANK} ") for one in self.constraints]
        bounds = ", ".join(each)
        return f"{self.objective}{f' with {bounds}' if bounds else ''}"


def parse(text: str) -> Constraint:
    """One constraint, such as 'p99 ttft<2s'.

    Raises:
        ValidationError: it is none; the text says what one looks like.
    """
    plain = " ".join(text.lower().split())
    match = _FORM.fullmatch(plain)
    if match is None:
        raise ValidationError(f"constraint {text.strip()!r} cannot be read. Write it as {_EXAMPLES}.")
    rank, name, sign, unit = (match[part] or "" for part in ("rank", "name", "sign", "unit"))
    number = float(match["number"])
    name = _OTHER_NAMES.get(name, name)
    known = (*LATENCIES, *_RATES)
    if name not in known:
        close = difflib.get_close_matches(name, [*known, *_OTHER_NAMES], n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValidationError(f"constraint {text.strip()!r}: there is no {name!r}, but {', '.join(known)}.{hint}")
    if not number > 0:
        raise ValidationError(f"constraint {text.strip()!r}: the limit must be above 0.")
    if name in _RATES:
        if rank or not sign.startswith(">"):
            raise ValidationError(
                f"constraint {text.strip()!r}: {name} is one number of a whole run, and more is better: write "
                f"'{name}>{number:g}'."
            )
        if unit not in ("", _RATES[name], "/s"):
            raise ValidationError(
                f"constraint {text.strip()!r}: {name} is in {_RATES[name]}, not {unit!r}: write '{name}>{number:g}'."
            )
        return Constraint(name, "", number, text.strip())
    if not sign.startswith("<"):
        raise ValidationError(
            f"constraint {text.strip()!r}: a time is to be below its limit: write '{plain.replace(sign, '<')}'."
        )
    if unit not in _SECONDS:
        raise ValidationError(
            f"constraint {text.strip()!r}: {number:g} of what? Give the limit a unit: {', '.join(_SECONDS)}, as in "
            f"'{f'{rank} ' if rank else ''}{name}<{number:g}s'."
        )
    rank = "p50" if rank == "median" else rank
    if rank.startswith("p") and not 0 < float(rank[1:]) <= 100:
        raise ValidationError(f"constraint {text.strip()!r}: percentiles are in (0, 100], such as p99; got {rank}.")
    return Constraint(name, rank, number * _SECONDS[unit], text.strip())


def gain_text(gain: float) -> str:
    """Such as "+3.1%"; "from nothing" where there is no share."""
    return f"{gain:+.1%}" if math.isfinite(gain) else "from nothing"


def seconds_text(seconds: float) -> str:
    """Such as "35.2ms" or "2s"."""
    return f"{seconds:.4g}s" if seconds >= 1 else f"{1e3 * seconds:.4g}ms"


def _check_together(constraints: Sequence[Constraint]) -> None:
    seen: dict[str, Constraint] = {}
    for each in constraints:
        key = f"{each.name} {each.rank}"
        if key in seen and seen[key].limit != each.limit:
            raise ValidationError(f"constraints {seen[key].text!r} and {each.text!r} bound the same; give one of them.")
        seen[key] = each


def _ranked(values: np.ndarray, rank: str) -> float:
    if not len(values):
        return 0.0
    if rank in ("mean", "max"):
        return float(getattr(values, rank)())
    return float(np.percentile(values, float(rank[1:])))


def _heading(key: str) -> str:
    name, _, rank = key.partition("_")
    return f"{rank} {name}" if rank else name


def _shown(key: str, value: float) -> str:
    return f"{value:.4g} {_RATES[key]}" if key in _RATES else seconds_text(value)
