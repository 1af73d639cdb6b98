"""What checks of drafts cost, learned from how long launches take."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.speculative.adaptive import ONE
from jaxllm.speculative.prices import BELIEVED, LEAST, MOST, CheckPrices, LaunchClock


def believed(*steps: float) -> np.ndarray:
    return np.round(np.asarray(steps) * ONE).astype(np.int32)


@settings(max_examples=50)
@given(
    true=st.lists(st.floats(1.0, 8.0), min_size=1, max_size=3),
    first=st.floats(0.0, 4.0),
    step=st.floats(1e-4, 1.0),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_prices_of_launches_of_several_kinds_are_found(true: list[float], first: float, step: float, seed: int):
    rng = np.random.default_rng(seed)
    costs = believed(*[first] * len(true))
    prices = CheckPrices(costs, [9] * len(true))
    for _ in range(600):
        kinds = rng.multinomial(4, rng.dirichlet(np.full(1 + len(true), 0.5)))
        prices.saw(step * float(kinds @ [1.0, *true]) * rng.uniform(0.95, 1.05), kinds.tolist())
    np.testing.assert_allclose(1 + costs / ONE, true, rtol=0.2)


def test_what_was_not_launched_keeps_its_relation_to_a_step():
    costs = believed(0.5, 2.0)
    prices = CheckPrices(costs, (1, 3))
    for seconds in (1.0, 2.0, 4.0, 4.0, 4.0):
        prices.saw(seconds, [4, 0, 0])
    np.testing.assert_array_equal(costs, believed(0.5, 2.0))
    prices.saw(4.0 * 3, [0, 4, 0])
    assert costs[0] > believed(0.5)[0] and costs[1] == believed(2.0)[0]


def test_one_launch_beside_something_else_changes_little():
    costs = believed(1.0)
    prices = CheckPrices(costs, (3,))
    for _ in range(10):
        prices.saw(4.0, [2, 1])
    prices.saw(1000.0, [2, 1])
    assert 1.0 <= costs[0] / ONE < 1.3


def test_what_is_only_believed_keeps_no_check_from_being_tried():
    costs = believed(4.0, 2.0, 9.0)
    CheckPrices(costs, (1, 3, 7))
    np.testing.assert_array_equal(costs, believed(BELIEVED, 2.0, 7 * BELIEVED))


def test_the_first_check_is_what_it_took():
    costs = believed(0.8, 2.0)
    prices = CheckPrices(costs, (1, 3))
    prices.saw(4.0, [4, 0, 0])
    prices.saw(3.0 + 2.5, [3, 1, 0])
    np.testing.assert_array_equal(costs, believed(1.5, 2.0))
    # and no more than twice what was believed
    prices.saw(3.0 + 900.0, [3, 0, 1])
    assert costs[1] == believed(5.0)[0]


def test_a_price_that_is_too_dear_to_be_seen_again_returns():
    costs = believed(0.5)
    prices = CheckPrices(costs, (1,))
    prices.saw(4.0, [4, 0])
    prices.saw(3.0 + 3.0, [3, 1])
    assert costs[0] > ONE
    for _ in range(3000):
        prices.saw(4.0, [4, 0])
    assert 0.5 < costs[0] / ONE < 1.0
    # a cheaper one than was believed stays
    prices = CheckPrices(cheap := believed(0.5), (1,))
    prices.saw(4.0, [4, 0])
    prices.saw(3.0 + 1.2, [3, 1])
    for _ in range(3000):
        prices.saw(4.0, [4, 0])
    np.testing.assert_array_equal(cheap, believed(0.2))


def test_prices_stay_within_bounds():
    costs = believed(1.0)
    prices = CheckPrices(costs, (3,))
    prices.saw(1.0, [1, 0])
    for seconds, bound in ((1000.0, MOST), (0.001, LEAST)):
        for _ in range(100):
            prices.saw(seconds, [0, 1])
        assert 1 + costs[0] / ONE == pytest.approx(bound, abs=1e-4)
    prices.saw(1.0, [0, 0])
    prices.saw(0.0, [1, 0])


def test_only_launches_whose_beginning_and_end_are_known_are_timed(monkeypatch: pytest.MonkeyPatch):
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    clock = LaunchClock()
    first = clock.launched()
    now = 1.0
    second = clock.launched()
    now = 2.0
    # nobody knows when what came before the first was done
    assert clock.seconds(first, waited=True) is None
    now = 5.0
    # it waited for the first until then
    assert clock.seconds(second, waited=True) == 3.0
    now = 7.0
    third = clock.launched()
    now = 8.0
    # the device had nothing to do before it
    assert clock.seconds(third, waited=True) == 1.0
    fourth = clock.launched()
    now = 9.0
    assert clock.seconds(fourth, waited=False) is None
    fifth = clock.launched()
    now = 10.0
    assert clock.seconds(fifth, waited=True) is None
    # of another kind, which nobody times
    clock.launched()
    sixth = clock.launched()
    now = 11.0
    assert clock.seconds(sixth, waited=True) is None
