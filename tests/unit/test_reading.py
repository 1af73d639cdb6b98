"""A model that drafts reads where its drafts can win what that costs."""

from __future__ import annotations

import numpy as np
import pytest

from jaxllm.speculative.credit import INITIAL, SHARE, Credit
from jaxllm.speculative.reading import PATIENCE, Prices, Reading, ReadingCosts

#: of a model of 0.5B beside one of 1.5B, on a CPU: one draft can win nothing, three can
COSTS = ReadingCosts(step=0.44, late_token=0.1, tokens_of_a_step=16)
PRICES = Prices((1, 3), np.array([1.53, 2.3]))


def begins(reading: Reading, *requests: tuple[int, int], prices: Prices = PRICES) -> bool:
    """Whether prompts of so many tokens are read, before so many tokens each, in one step."""
    for row, request in enumerate(requests):
        reading.admit(row, *request)
    prompts = [prompt for prompt, _ in requests]
    return reading.reads(range(len(requests)), prompts, prices, may_draft=True)


def test_what_checks_save():
    assert PRICES.saved(1.0) == pytest.approx(1 - 3.3 / 4)
    assert PRICES.saved(0.9) == pytest.approx(1 - 3.3 / (1 + 0.9 + 0.81 + 0.729))
    assert PRICES.saved(0.5) == 0.0
    assert Prices((3,), np.array([3.0])).saved(1.0) == 0.0
    assert PRICES.first_try() == 2.3


@pytest.mark.parametrize(
    ("prompt", "tokens", "prices", "reads"),
    [
        (50, 400, PRICES, True),
        (2000, 24, PRICES, False),
        # what may be lost is more than the share of its time
        (50, 60, PRICES, False),
        (50, 400, Prices((1, 3), np.array([1.0, 3.0])), False),
        (300, 2000, PRICES, True),
    ],
)
def test_where_drafts_can_win_it_is_read(prompt: int, tokens: int, prices: Prices, reads: bool):
    assert begins(Reading(COSTS, Credit()), (prompt, tokens), prices=prices) == reads


def test_four_prompts_are_paid_by_all_of_their_drafts():
    assert begins(Reading(COSTS, Credit()), *[(20, 600)] * 4)
    assert not begins(Reading(COSTS, Credit()), *[(200, 600)] * 4)


def test_who_was_not_read_is_given_up_until_its_row_has_another_request():
    reading = Reading(COSTS, Credit())
    for row in range(4):
        reading.admit(row, 8, 400)
    assert not reading.reads([0, 1, 2], [8, 8, 8], PRICES, may_draft=False)
    assert reading.given_up([0, 1, 2], always=True) == [True, True, True]
    reading.admit(1, 4, 400)
    assert reading.reads([1], [4], PRICES, may_draft=True)
    assert reading.given_up([0, 1]) == [True, False]
    # beside a step that nobody reads, none goes on
    assert not reading.reads([1, 3], [1, 8], PRICES, may_draft=False)
    assert reading.given_up([1, 3]) == [True, True]


def test_a_prompt_that_is_not_read_leaves_the_others_their_drafts():
    """They pass over the token that they get beside it, and read it later."""
    for tokens, reads in ((16, True), (3000, False)):
        reading = Reading(COSTS, Credit())
        assert begins(reading, (16, 400))
        reading.admit(1, tokens, 300)
        assert reading.reads([0, 1], [1, tokens], PRICES, may_draft=True) == reads
        assert reading.given_up([0, 1]) == [False, not reads]
        assert reading.take_passed_over([0, 1]) == [int(not reads), 0]
        assert reading.take_passed_over([0, 1]) == [0, 0]


def test_who_cannot_be_late_is_given_up_beside_a_prompt_that_is_not_read():
    """Beside a window; or more of a prompt than a token."""
    for can_be_late, count in ((False, 1), (True, 2)):
        reading = Reading(COSTS, Credit(), can_be_late=can_be_late)
        assert begins(reading, (16, 400))
        reading.admit(1, 3000, 300)
        assert not reading.reads([0, 1], [count, 3000], PRICES, may_draft=True)
        assert reading.given_up([0, 1]) == [True, True]


def test_what_is_passed_over_is_paid_for():
    credit = Credit()
    reading = Reading(COSTS, credit)
    assert begins(reading, (16, 400))
    reading.admit(1, 3000, 300)
    steps = 0
    while reading.is_read(0) and steps < 1000:
        assert not reading.reads([0, 1], [1, 8], PRICES, may_draft=True)
        steps += 1
    # a lot of eight takes 0.8 of a step
    assert 0 < -credit.steps < SHARE * 402 and reading.passed_over(0) == steps - 1


def test_wrong_drafts_end_reading_until_their_cost_is_paid_off():
    credit = Credit()
    reading = Reading(COSTS, credit)
    assert begins(reading, (100, 700))
    assert reading.given_up([0]) == [False]
    assert INITIAL < reading.first_credit([0]) < SHARE * 707
    wrong = np.array([[3]]), np.array([[0]])
    for _ in range(4):
        credit.win(-2.3)
        reading.learn(reading.requests([0]), [1], *wrong, 0)
    assert reading.given_up([0]) == [True]
    assert not begins(reading, (16, 400))
    # then what was seen of drafts counts: that they win nothing
    credit.win(INITIAL / 2 - credit.steps)
    assert not begins(reading, (16, 400))
    credit.win(INITIAL)
    assert begins(reading, (16, 400))


def test_whose_drafts_rest_is_given_up():
    reading, nothing = Reading(COSTS, Credit()), np.zeros((1, 1), np.int32)
    assert begins(reading, (16, 400))
    for number in range(2 * PATIENCE):
        if number == PATIENCE - 1:
            reading.learn(reading.requests([0]), [4], np.array([[3]]), np.array([[3]]), 0)
        assert reading.given_up([0]) == [False]
        reading.learn(reading.requests([0]), [1], nothing, nothing, 1)
        if reading.given_up([0]) == [True]:
            break
    assert number == 2 * PATIENCE - 2


def test_prompts_are_timed():
    """A prompt that takes long is not read; steps of a few tokens tell nothing."""
    reading = Reading(COSTS, Credit())
    reading.saw(4, 100.0, was_read=False)
    assert begins(reading, (50, 400))
    reading.saw(50, 50.0, was_read=True)
    assert not begins(reading, (50, 400))
    for _ in range(20):
        reading.saw(64, 4.0, was_read=False)
    assert begins(reading, (50, 400))


#: of a model so small that any prompt is read
CHEAP = ReadingCosts(step=0.01, late_token=0.001, tokens_of_a_step=4)


def test_a_launch_is_that_of_the_requests_that_had_the_rows():
    """A request ends while its last launches are under way, and another one has its row when these are read."""
    reading, nothing = Reading(CHEAP, Credit()), np.zeros((PATIENCE, 1), np.int32)
    assert begins(reading, (10, 400))
    under_way = reading.requests([0])
    assert begins(reading, (10, 400))
    reading.learn(under_way, [PATIENCE], nothing, nothing, PATIENCE)
    assert reading.given_up([0]) == [False]


def test_launches_that_are_to_have_no_drafts_are_no_rest():
    reading, nothing = Reading(CHEAP, Credit()), np.zeros((PATIENCE, 1), np.int32)
    assert begins(reading, (10, 400))
    for may_check in (False, True):
        reading.learn(reading.requests([0]), [PATIENCE], nothing, nothing, PATIENCE, may_check=may_check)
        assert reading.given_up([0]) == [may_check]


def test_chunks_of_a_prompt_bring_no_tokens():
    """What is left to a request does not become less by them: a prompt whose reading has begun is read to its end."""
    reading = Reading(CHEAP, Credit())
    reading.admit(0, 1600, 100)
    assert all(reading.reads([0], [8], PRICES, may_draft=True) for _ in range(200))
    assert reading.given_up([0]) == [False]
