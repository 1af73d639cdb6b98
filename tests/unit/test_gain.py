"""Gains of settings that ran in the same rounds, and how sure they are."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from jaxllm.autotuning.gain import Gain
from jaxllm.autotuning.goals import Goals


@pytest.mark.parametrize("rounds", [2, 3, 6, 9, 13])
def test_bounds_are_those_of_students_t(rounds: int):
    draw = np.random.default_rng(rounds)
    values = draw.normal(0.05, 0.1, rounds)
    gain, logs = Gain(tuple(values)), np.log1p(values)
    bounds = stats.t.interval(0.95, rounds - 1, loc=logs.mean(), scale=stats.sem(logs))
    np.testing.assert_allclose([gain.low, gain.high], np.expm1(bounds), rtol=2e-3)
    assert gain.is_shown == bool(bounds[0] > 0)


def test_what_drifts_alike_is_no_gain():
    """The machine is half as fast in one round, and both are."""
    goals = Goals.of("latency")
    drift = [1.0, 2.0, 1.4]
    ours, theirs = ([{"e2e_p50": seconds * slow} for slow in drift] for seconds in (1.0, 1.1))
    gain = Gain.of(goals, ours, theirs)
    assert gain.mean == pytest.approx(0.1) and gain.low == pytest.approx(0.1) and gain.is_shown
    assert Gain((1.0, -0.5)).mean == pytest.approx(0.0)


def test_one_round_shows_nothing():
    gain = Gain((0.9,))
    assert not gain.is_shown and gain.may_exceed(100.0) and "does not say how sure" in gain.text()
    assert not Gain((0.9, 0.1, -0.2)).is_shown
    assert Gain((0.9, 0.1)).text() == "+44.6% in 2 rounds, too few to say how sure that is"
    assert Gain((0.03, 0.031, 0.029)).text() == "+3.0% (+2.8% to +3.2%, 3 rounds)"


def test_something_in_place_of_nothing():
    """Of "goodput", where the other has no request in time."""
    assert Gain((math.inf, math.inf)).is_shown and "from nothing" in Gain((math.inf, math.inf)).text()
    mixed = Gain((math.inf, -1.0, 0.5))
    assert not mixed.is_shown and mixed.mean == 0.5 and mixed.may_exceed(1.0)
