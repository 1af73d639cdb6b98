"""A model that drafts reads as long as its drafts win what that costs."""

from __future__ import annotations

import random

import pytest

from jaxllm.speculative.credit import INITIAL, MOST, RATE, Credit
from jaxllm.speculative.reading import Reading, ReadingCosts

COSTS = ReadingCosts(step=0.5, late_token=0.1, tokens_of_a_step=16)
#: what a check of three drafts takes longer than a step
CHECK = 2.0


@pytest.mark.parametrize("likely", [0.0, 0.3, 0.9])
def test_no_more_is_lost_than_was_promised(likely: float):
    """Over many requests: less than the credit there is at first, one prompt, one launch, and a share of all steps."""
    rng, credit = random.Random(1), Credit(most=INITIAL)
    # what others won before is not lost
    credit.win(100.0)
    reading = Reading(COSTS, credit)
    lost, steps, read, requests, prompt = 0.0, 0, 0, 400, 96
    for _ in range(requests):
        reading.admit(0)
        reads = reading.reads([0], [prompt], may_draft=True)
        read += reads
        lost += reads * COSTS.step * prompt / COSTS.tokens_of_a_step
        steps += prompt // COSTS.tokens_of_a_step
        for _ in range(16):
            (given_up,) = reading.given_up([0])
            single, won = 4, 0.0
            if not given_up and rng.random() < (0.9 if likely > 0.5 else 0.1):
                # as the rule for each request has it, which soon has none where they are wrong
                right = [sum(rng.random() < likely for _ in range(3)) for _ in range(4)]
                single, won = 0, sum(right) - 4 * CHECK
            lost += (0 if given_up else single * COSTS.late_token) - won
            steps += 4
            credit.grow(4)
            credit.win(won)
            reading.rested([0], single)
        assert lost <= INITIAL + COSTS.step * prompt / COSTS.tokens_of_a_step + 4 * CHECK + RATE * steps
    assert read == requests if likely > 0.5 else 0 < read < requests / 2


def test_who_was_not_read_is_given_up_until_its_row_has_another_request():
    reading = Reading(COSTS, Credit())
    assert not reading.reads([0, 1, 2], [8, 8, 8], may_draft=False)
    assert reading.given_up([0, 1, 2, 3], always=True) == [True, True, True, False]
    reading.admit(1)
    assert reading.reads([1], [4], may_draft=True)
    assert reading.given_up([0, 1]) == [True, False]


def test_a_prompt_that_was_paid_for_is_drafted_for():
    credit = Credit()
    reading = Reading(COSTS, credit)
    assert reading.reads([0], [160], may_draft=True)
    reading.admit(1)
    assert not reading.reads([1], [16], may_draft=True)
    assert reading.given_up([0, 1]) == [False, True]
    # of what it was worth, the launches without drafts leave nothing in the end
    for _ in range(100):
        reading.given_up([0])
        reading.rested([0], 4)
    assert reading.given_up([0]) == [True]
    # right drafts of others bring it back, for new requests
    credit.win(2 * MOST)
    reading.admit(0)
    assert reading.reads([0], [16], may_draft=True) and reading.given_up([0]) == [False]
