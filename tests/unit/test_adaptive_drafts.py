"""How many drafts are checked, against the rule written down in plain Python, and what can be lost by it."""

from __future__ import annotations

import dataclasses
import functools
import random
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.speculative.adaptive import ONE, AdaptiveDrafts, check_costs, check_lengths
from jaxllm.speculative.credit import INITIAL, MOST, RATE

LENGTHS, MOST_DRAFTS = (2, 5), 5


@dataclasses.dataclass
class ByTheRule:
    """One sequence."""

    credit: float = INITIAL
    right: float = 1.6
    tried: float = 2.0

    def expected(self, count: int) -> float:
        return sum((self.right / self.tried) ** place for place in range(1, count + 1))

    def after_check(self, share: float, count: int, accepted: int) -> None:
        self.credit = min(self.credit + accepted - share, MOST)
        self.right += accepted - self.right / 8
        self.tried += accepted + (accepted < count) - self.tried / 8

    def after_step(self) -> None:
        self.credit = min(self.credit + RATE, MOST)


def chosen(sequences: list[ByTheRule | None], counts: list[int], extra: list[float]) -> tuple[int, list[int], float]:
    """The check, or 0, of those that are not None; their drafts; and how near the decision was."""
    there = [one for one in sequences if one is not None]
    taking = [count if one and one.credit > 0 else 0 for one, count in zip(sequences, counts, strict=True)]
    purse = sum(one.credit for one, count in zip(sequences, taking, strict=True) if one and count)
    near = min((abs(one.credit) for one in there), default=1.0)
    if not any(taking):
        return 0, taking, near
    gains = []
    for length, cost in zip(LENGTHS, extra, strict=True):
        won = sum(one.expected(min(count, length)) for one, count in zip(sequences, taking, strict=True) if one)
        near = min(near, abs(purse - cost * len(there)))
        gains.append((won - cost * len(there)) if purse >= cost * len(there) else -1.0)
    near = min(near, abs(gains[0] - gains[1]), *(abs(gain) for gain in gains))
    kind = 0
    if max(gains) > 0:
        kind = 1 + gains.index(max(gains))
    elif purse >= extra[0] * len(there):
        kind = 1
    return kind, [min(count, (0, *LENGTHS)[kind]) for count in taking], near


@functools.cache
def compiled() -> tuple[Any, Any]:
    rule = AdaptiveDrafts(LENGTHS)
    return jax.jit(rule.choose), jax.jit(rule.after)


@settings(max_examples=60)
@given(
    likely=st.lists(st.sampled_from((0.0, 0.3, 0.6, 0.9, 1.0)), min_size=4, max_size=4),
    extra=st.sampled_from(([0.0, 0.0], [0.1, 0.1], [0.9, 2.1], [0.5, 0.6], [1.7, 4.1])),
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
        kind, wanted, near = chosen(there, counts, extra)
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


@pytest.mark.parametrize("extra", [[0.2, 0.2], [0.9, 2.1], [1.0, 1.4]])
@pytest.mark.parametrize("likely", [0.0, 0.2, 0.5, 0.95])
def test_no_more_is_lost_than_was_promised(likely: float, extra: list[float]):
    """Alone and in a batch, at every step; and where most drafts are right, their time is won."""
    choose, after = compiled()
    rng, costs = random.Random(3), np.round(np.array(extra) * ONE).astype(np.int32)
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
            assert time <= tokens + size * INITIAL + tokens * RATE
        if likely == 0.95:
            assert tokens > 1.1 * time


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
