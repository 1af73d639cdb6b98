"""How many drafts are checked, against the rule written down in plain Python, and what can be lost by it."""

from __future__ import annotations

import functools
import random
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.draft_rule import ByTheRule, chosen

from jaxllm.speculative.adaptive import ONE, AdaptiveDrafts, check_costs, check_lengths
from jaxllm.speculative.credit import DEAREST, INITIAL, RATE

LENGTHS, MOST_DRAFTS = (2, 5), 5


@functools.cache
def compiled() -> tuple[Any, Any]:
    rule = AdaptiveDrafts(LENGTHS)
    return jax.jit(rule.choose), jax.jit(rule.after)


@settings(max_examples=60)
@given(
    likely=st.lists(st.sampled_from((0.0, 0.3, 0.6, 0.9, 1.0)), min_size=4, max_size=4),
    extra=st.sampled_from(([0.0, 0.0], [0.1, 0.1], [0.9, 2.1], [0.5, 0.6], [1.7, 4.1], [2.1, 2.6], [1.9, 7.0])),
    seed=st.integers(0, 99),
)
def test_it_is_the_rule(likely: list[float], extra: list[float], seed: int):
    choose, after = compiled()
    rng, costs = random.Random(seed), np.round(np.array(extra) * ONE).astype(np.int32)
    numbers = np.tile(np.asarray(AdaptiveDrafts(LENGTHS).beginning(), np.int32), (4, 1))
    sequences = [ByTheRule() for _ in likely]
    for _ in range(60):
        going_on = [rng.random() < 0.8 for _ in likely]
        counts = [rng.choice((0, 1, 3, 5)) for _ in likely]
        there = [one if goes else None for one, goes in zip(sequences, going_on, strict=True)]
        kind, wanted, near = chosen(LENGTHS, there, counts, extra)
        got = choose(numbers, np.asarray(counts, np.int32), np.asarray(going_on), costs)
        if near < 0.01:
            # two answers are as good; the rule goes on with the device's
            kind, wanted = int(got[0]), np.asarray(got[1]).tolist()
        assert (int(got[0]), np.asarray(got[1]).tolist()) == (kind, wanted)
        accepted = []
        for count, probability in zip(wanted, likely, strict=True):
            right = [rng.random() < probability for _ in range(count)]
            accepted.append((right + [False]).index(False))
        drafting = sum(count > 0 for count in wanted)
        for one, count, right in zip(there, wanted, accepted, strict=True):
            if one is not None and count:
                one.after_check(extra[kind - 1] * sum(going_on) / drafting, count, right)
            elif one is not None:
                one.after_step()
        numbers = np.asarray(after(numbers, *got, np.asarray(accepted, np.int32), np.asarray(going_on), costs))
        expected = [[one.credit, one.right, one.tried] for one in sequences]
        np.testing.assert_allclose(numbers / ONE, expected, atol=2e-3)


@pytest.mark.parametrize("extra", [[0.2, 0.2], [0.9, 2.1], [1.0, 1.4], [2.3, 2.6], [1.9, 7.0], [2.1, 3.2]])
@pytest.mark.parametrize("likely", [0.0, 0.2, 0.5, 0.95])
def test_no_more_is_lost_than_was_promised(likely: float, extra: list[float]):
    """Alone and in a batch, at every step; and where most drafts are right, their time is won."""
    choose, after = compiled()
    rng, costs = random.Random(3), np.round(np.array(extra) * ONE).astype(np.int32)
    # of one that is tried at first
    first = max(INITIAL, next((cost for cost, length in zip(extra, LENGTHS, strict=True) if cost < length), 0.0))
    for size in (1, 4):
        numbers = np.tile(np.asarray(AdaptiveDrafts(LENGTHS).beginning(), np.int32), (4, 1))
        going_on, tokens, time = np.arange(4) < size, 0, 0.0
        for _ in range(150):
            counts = np.asarray([rng.choice((0, 4, 5)) for _ in range(4)], np.int32)
            kind, counts = choose(numbers, counts, going_on, costs)
            accepted = [([rng.random() < likely for _ in range(n)] + [False]).index(False) for n in np.asarray(counts)]
            numbers = np.asarray(after(numbers, kind, counts, np.asarray(accepted, np.int32), going_on, costs))
            tokens += size + sum(accepted)
            time += size * (1 + [0.0, *extra][int(kind)])
            assert time <= tokens + size * first + tokens * RATE
        if likely == 0.95 and extra[0] < 1.5:
            assert tokens > 1.1 * time


def test_a_check_that_no_credit_pays_is_tried_once():
    """Of the price that was seen with a model that drafts on a CPU: one draft can win nothing, and three can."""
    choose, after = compiled()
    costs = np.round(np.array([2.2, 2.6]) * ONE).astype(np.int32)
    numbers = np.asarray(AdaptiveDrafts(LENGTHS).beginning(), np.int32)[None]
    going_on, counts = np.array([True]), np.array([5], np.int32)
    kind, checked = choose(numbers, counts, going_on, costs)
    assert (int(kind), checked.tolist()) == (2, [5])
    wrong = np.asarray(after(numbers, kind, checked, np.array([0], np.int32), going_on, costs))
    assert wrong[0, 0] / ONE == pytest.approx(INITIAL - 2.6, abs=1e-3)
    assert int(choose(wrong, counts, going_on, costs)[0]) == 0
    right = np.asarray(after(numbers, kind, checked, np.array([5], np.int32), going_on, costs))
    assert int(choose(right, counts, going_on, costs)[0]) == 2
    # neither where it is too dear, nor where some of what it has room for is missing
    assert int(choose(numbers, counts, going_on, costs + round((DEAREST - 2.5) * ONE))[0]) == 0
    assert int(choose(numbers, np.array([2], np.int32), going_on, costs)[0]) == 0


def test_what_checks_cost():
    found = {drafts: check_lengths("cpu", drafts) for drafts in (1, 2, 3, 5, 8, 24)}
    assert found == {1: (1,), 2: (1, 2), 3: (1, 3), 5: (2, 5), 8: (2, 4, 8), 24: (3, 6, 12, 24)}
    assert check_lengths("cuda", 5) == (5,)
    few, more = check_costs("cpu", (2, 5), (True, True)), check_costs("cpu", (2, 5), (False, False))
    assert (few < more).all() and few[0] < few[1]
    assert check_costs("cuda", (5,), (False,)) < few[0]
    # of more sequences, a step multiplies as long as it reads
    assert (few < check_costs("cpu", (2, 5), (True, True), num_seqs=4)).all()
    assert (check_costs("cpu", (2, 5), (True, True), num_seqs=4) < more).all()


def test_many_sequences_with_many_drafts_are_checked():
    """As many as a GPU's ranges of batch sizes may name: their sum is 2**31 in the units of credit."""
    seqs, drafts = 256, 128
    rule = AdaptiveDrafts((drafts,))
    numbers = np.tile(np.asarray([16 * ONE, 2 * ONE, 2 * ONE], np.int32), (seqs, 1))
    every, costs = np.ones(seqs, bool), np.asarray([0.1 * ONE], np.int32)
    kind, counts = jax.jit(rule.choose)(numbers, np.full(seqs, drafts, np.int32), every, costs)
    assert int(kind) == 1 and (np.asarray(counts) == drafts).all()


def test_what_many_sequences_pay_for_a_dear_check():
    """All of 4,096 pay 12 steps each, which are 3 * 2**30 in the units of credit; and then three quarters of them."""
    seqs, after = 4096, jax.jit(AdaptiveDrafts((5,)).after)
    numbers = np.tile(np.asarray([16 * ONE, 2 * ONE, 2 * ONE], np.int32), (seqs, 1))
    every, wrong, costs = np.ones(seqs, bool), np.zeros(seqs, np.int32), np.asarray([12 * ONE + 1], np.int32)
    for payers in (seqs, 3 * seqs // 4):
        counts = np.where(np.arange(seqs) < payers, 5, 0).astype(np.int32)
        left = np.asarray(after(numbers, np.int32(1), counts, wrong, every, costs))[:payers, 0]
        np.testing.assert_array_equal(left, 16 * ONE - int(costs[0]) * seqs // payers)
