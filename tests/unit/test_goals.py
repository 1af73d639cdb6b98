"""What is asked of `jaxllm tune`: objectives and constraints, as users write them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from jaxllm.api.errors import ValidationError
from jaxllm.autotuning.goals import Goals, gain_text, parse
from jaxllm.tuning.simulation.simulated_run import SimulatedRun


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("p99 ttft<2s", ("ttft", "p99", 2.0)),
        ("p50 itl < 50ms", ("itl", "p50", 0.05)),
        ("median E2E <= 1.5 s", ("e2e", "p50", 1.5)),
        ("mean tpot<800us", ("tpot", "mean", 8e-4)),
        ("max e2el<1min", ("e2e", "max", 60.0)),
        ("p99.9_ttft<.5s", ("ttft", "p99.9", 0.5)),
        ("ttft<2s", ("ttft", "", 2.0)),
        ("throughput>500", ("throughput", "", 500.0)),
        ("throughput >= 500 tok/s", ("throughput", "", 500.0)),
        ("goodput>1.5 req/s", ("goodput", "", 1.5)),
    ],
)
def test_constraints(text: str, expected: tuple[str, str, float]):
    found = parse(text)
    assert (found.name, found.rank) == expected[:2] and found.limit == pytest.approx(expected[2])
    assert parse(str(found)).limit == pytest.approx(found.limit)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("p99 ttft<2", "2 of what.*ms, s.*'p99 ttft<2s'"),
        ("p99 ttft>2s", "below its limit: write 'p99 ttft<2s'"),
        ("p99 tftf<2s", "no 'tftf'.*Did you mean 'ttft'"),
        ("p101 ttft<2s", r"percentiles are in \(0, 100\].*p101"),
        ("p0 ttft<2s", "percentiles"),
        ("ttft<0s", "above 0"),
        ("throughput<5", "more is better: write 'throughput>5'"),
        ("p99 throughput>5", "more is better"),
        ("throughput>5ms", "in tok/s, not 'ms'"),
        ("fast please", "cannot be read. Write it as 'p99 ttft<2s'"),
        ("ttft<-1s", "cannot be read"),
    ],
)
def test_what_is_no_constraint_is_refused_with_what_would_be(text: str, match: str):
    with pytest.raises(ValidationError, match=match):
        parse(text)


def test_goals():
    goals = Goals.of("throughput", ["p99 ttft<2s, p50 itl<50ms", "e2e<10s"])
    assert [str(each) for each in goals.constraints] == ["p99 ttft<2s", "p50 itl<50ms", "p99 e2e<10s"]
    assert str(goals) == "throughput with p99 ttft<2s, p50 itl<50ms, p99 e2e<10s"
    assert Goals.of("latency", "p99 ttft<2s").constraints == Goals.of("latency", ["p99 ttft<2s"]).constraints
    with pytest.raises(ValidationError, match="objective must be .*'thruput'.*Did you mean 'throughput'"):
        Goals.of("thruput")
    with pytest.raises(ValidationError, match="bound the same; give one"):
        Goals.of("throughput", "p99 ttft<2s, p99 ttft<3s")
    with pytest.raises(ValidationError, match="goodput counts the requests that are fast enough"):
        Goals.of("goodput", "throughput>5")


def run() -> SimulatedRun:
    """Four requests that come together: the first tokens after 1, 2, 3, 4 s, and three more 0.1, 0.2, 0.3, 0.4 s apart;
    the last has but one.
    """
    firsts, gaps, counts = np.arange(1.0, 5), np.arange(1, 5) / 10, np.array([4, 4, 4, 1])
    return SimulatedRun(
        arrivals=np.zeros(4), firsts=firsts, lasts=firsts + gaps * (counts - 1), prompt_lengths=np.full(4, 10),
        output_lengths=counts, itl=np.zeros(0), preemptions=2, cached_tokens=10, times=np.zeros(1),
        kv_cache_usage=np.full(1, 0.5), num_running=np.zeros(1), num_waiting=np.zeros(1),
    )  # fmt: skip


def test_numbers_of_a_run():
    goals = Goals.of("goodput", "ttft<3s, itl<250ms, p50 e2e<4s")
    numbers = goals.numbers(run())
    assert numbers["throughput"] == pytest.approx(13 / 4) and numbers["hit_rate"] == 0.25
    assert numbers["ttft_p50"] == 2.5 and numbers["itl_p50"] == pytest.approx(0.2)
    assert numbers["e2e_p50"] == pytest.approx((2.6 + 3.9) / 2)
    # the third misses 250 ms between tokens, the fourth 3 s to the first; all that are left end within 4 s
    assert numbers["goodput"] == pytest.approx(2 / 4) and goals.value(numbers) == numbers["goodput"]
    assert str(goals) == "goodput with ttft<3s, itl<250ms, p50 e2e<4s"
    # the bound with a rank holds for the run as well, those without one are each request's
    assert [str(each) for each in goals.held] == ["p50 e2e<4s"] and goals.excess(numbers) < 0


def test_what_misses_a_constraint_is_behind_what_keeps_it():
    goals = Goals.of("throughput", "p99 ttft<2s, throughput>1")
    base = goals.numbers(run()) | {"e2e_mean": 1.0}
    kept = base | {"ttft_p99": 1.9, "throughput": 2.0}
    slow = base | {"ttft_p99": 1.9, "throughput": 1.5}
    near, far = base | {"ttft_p99": 2.2, "throughput": 9.0}, base | {"ttft_p99": 8.0, "throughput": 99.0}
    assert sorted([far, slow, near, kept], key=goals.rank) == [kept, slow, near, far]
    assert goals.excess(near) == pytest.approx(0.1) and goals.excess(kept) < 0
    # as good, and sooner
    assert goals.rank(kept | {"e2e_mean": 0.5}) < goals.rank(kept)
    assert goals.gain(kept, slow) == pytest.approx(1 / 3)
    # of goodput, none at all is not as good as some
    good = Goals.of("goodput", "ttft<2s")
    assert good.gain({"goodput": 2.0}, {"goodput": 0.0}) == math.inf and gain_text(math.inf) == "from nothing"
    assert good.gain({"goodput": 0.0}, {"goodput": 2.0}) == -1 and good.gain({"goodput": 0.0}, {"goodput": 0.0}) == 0
    latency = Goals.of("latency")
    assert latency.gain({"e2e_p50": 1.0}, {"e2e_p50": 1.5}) == pytest.approx(0.5)
    assert latency.text({"e2e_p50": 0.0123}) == "median e2e 12.3ms"
