"""A model that drafts reads as long as its drafts win what that costs."""

from __future__ import annotations

import random

import pytest

from jaxllm.speculative.credit import INITIAL, MOST, RATE
from jaxllm.speculative.reading import Reading, ReadingCosts

COSTS = ReadingCosts(step=0.5, late_token=0.1, tokens_of_a_step=16)
#: what checks of two lengths take longer than a step
EXTRA = [0.8, 2.0]


@pytest.mark.parametrize("likely", [0.0, 0.3, 0.9])
def test_no_more_is_lost_than_was_promised(likely: float):
    """Over many requests: less than the credit there is at first, one prompt, one launch, and a share of all steps."""
    rng, reading = random.Random(1), Reading(COSTS)
    lost, steps, read, requests, prompt = 0.0, 0, 0, 400, 96
    for _ in range(requests):
        reading.admit(0)
        reads = reading.reads([0], [prompt], may_draft=True)
        read += reads
        lost += reads * COSTS.step * prompt / COSTS.tokens_of_a_step
        steps += prompt // COSTS.tokens_of_a_step
        for _ in range(16):
            (given_up,) = reading.given_up([0])
            kinds, accepted = [4, 0, 0], 0
            if not given_up and rng.random() < (0.9 if likely > 0.5 else 0.1):
                # as the rule for each request has it, which soon has none where they are wrong
                right = [sum(rng.random() < likely for _ in range(3)) for _ in range(4)]
                kinds, accepted = [0, 0, 4], sum(right)
            lost += kinds[2] * EXTRA[1] - accepted
            lost += 0 if given_up else kinds[0] * COSTS.late_token
            steps += 4
            reading.learn([0], accepted, kinds, EXTRA)
        assert lost <= INITIAL + COSTS.step * prompt / COSTS.tokens_of_a_step + 4 * EXTRA[1] + RATE * steps
    assert read == requests if likely > 0.5 else 0 < read < requests / 2


def test_who_was_not_read_is_given_up_until_its_row_has_another_request():
    reading = Reading(COSTS)
    assert not reading.reads([0, 1, 2], [8, 8, 8], may_draft=False)
    assert reading.given_up([0, 1, 2, 3], always=True) == [True, True, True, False]
    reading.admit(1)
    assert reading.reads([1], [4], may_draft=True)
    assert reading.given_up([0, 1]) == [True, False]


def test_a_prompt_that_was_paid_for_is_drafted_for():
    reading = Reading(COSTS)
    assert reading.reads([0], [160], may_draft=True)
    reading.admit(1)
    assert not reading.reads([1], [16], may_draft=True)
    assert reading.given_up([0, 1]) == [False, True]
    # of what it was worth, the launches without drafts leave nothing in the end
    for _ in range(100):
        reading.given_up([0])
        reading.learn([0], 0, [4, 0, 0], EXTRA)
    assert reading.given_up([0]) == [True]
    # right drafts of others bring it back, for new requests
    reading.learn([2], int(2 * MOST), [0, 0, 4], EXTRA)
    reading.admit(0)
    assert reading.reads([0], [16], may_draft=True) and reading.given_up([0]) == [False]
