"""Draws follow the distribution, and a row's draw does not see its batch."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from support.quick_compile import THOROUGH
from support.sampling_oracle import Row, adjusted, compiled, make_batch, normal, probabilities, run

from jaxllm.sampling.draw import invert, uniforms
from jaxllm.sampling.sampler import sample_rows

FLAT = 0.7
RANDOM = {
    "temperature 1": (3.0, Row(temperature=1.0)),
    "temperature 0.5, flat": (FLAT, Row(temperature=0.5)),
    "temperature 2": (3.0, Row(temperature=2.0)),
    "top_k in the head": (FLAT, Row(temperature=0.8, top_k=20)),
    "top_k beyond the head": (FLAT, Row(temperature=1.0, top_k=150)),
    "top_p in the head": (3.0, Row(temperature=0.9, top_p=0.8)),
    "top_p beyond the head": (FLAT, Row(temperature=1.0, top_p=0.7)),
    "small top_p beyond the head": (0.01, Row(temperature=1.0, top_p=0.33)),
    "top_k and top_p in the head": (1.5, Row(temperature=1.0, top_k=40, top_p=0.9)),
    "top_k and top_p beyond the head": (FLAT, Row(temperature=1.3, top_k=150, top_p=0.85)),
    "min_p in the head": (3.0, Row(temperature=1.0, min_p=0.05)),
    "min_p beyond the head": (FLAT, Row(temperature=1.0, min_p=0.12)),
    "min_p and top_p beyond the head": (FLAT, Row(temperature=1.0, min_p=0.12, top_p=0.9)),
    "all": (1.0, Row(temperature=0.7, min_p=0.01, top_k=30, top_p=0.95)),
}
SEEN: dict[str, Any] = {"prompt": [3, 7, 7, 11], "outputs": [7, 20, 20, 20]}
#: what changes single logits decides which tokens truncation leaves, and how likely they are
ADJUSTED = {
    "presence and frequency penalties": (
        FLAT,
        Row(temperature=1.1, presence_penalty=1.5, frequency_penalty=-0.8, **SEEN),
    ),
    "penalties and top_k": (
        FLAT,
        Row(temperature=1.0, repetition_penalty=0.5, frequency_penalty=-1.0, top_k=25, **SEEN),
    ),
    "penalties and min_p": (
        1.5,
        Row(temperature=0.6, presence_penalty=-2.0, repetition_penalty=1.3, min_p=0.1, **SEEN),
    ),
    "bias": (FLAT, Row(temperature=1.0, bias={0: 4.0, 299: 3.0, 17: -100.0, 150: 2.0})),
    "bias and top_p": (FLAT, Row(temperature=1.2, bias={0: 4.0, 299: 3.0, 17: -9.0}, top_p=0.6)),
    "bad words, allowed tokens and top_k": (
        FLAT,
        Row(temperature=0.8, allowed=set(range(0, 300, 2)), bad_words=[[20, 21], [20, 0], [3]], top_k=60, **SEEN),
    ),
    "everything": (
        1.0,
        Row(
            temperature=0.8,
            top_k=90,
            top_p=0.9,
            min_p=0.02,
            repetition_penalty=1.2,
            presence_penalty=0.4,
            frequency_penalty=0.3,
            bias={20: 5.0, 7: 3.0, 5: 2.0},
            allowed=set(range(220)),
            bad_words=[[20, 40], [6]],
            **SEEN,
        ),
    ),
}


#: it draws half a million times
draw_all = jax.jit(functools.partial(sample_rows, num_logprobs=0), compiler_options=THOROUGH)


@pytest.mark.parametrize("name", [*RANDOM, *ADJUSTED])
def test_draws_follow_the_distribution(name: str) -> None:
    """20 000 draws against the formula in float64 numpy, by their chi-square and their total variation."""
    rows, repeats, vocab = 2000, 10, 300
    scale, row = (RANDOM | ADJUSTED)[name]
    logits = np.tile(normal(1, vocab, scale, seed=7), (rows, 1))
    batch = make_batch([row] * rows, vocab, want_logprobs=False)
    device_logits = jnp.asarray(logits)
    counts = np.zeros(vocab, int)
    for repeat in range(repeats):
        position = jnp.arange(rows, dtype=jnp.int32) + repeat * rows
        drawn = draw_all(device_logits, dataclasses.replace(batch, position=position)).token_ids
        counts += np.bincount(np.asarray(drawn), minlength=vocab)
    expected = probabilities(adjusted(logits[0], row), row) * rows * repeats
    assert counts[expected == 0].sum() == 0, "drew a token that truncation removes"
    common = expected >= 10
    seen, wanted = [*counts[common]], [*expected[common]]
    if rare := expected[~common].sum():
        seen.append(counts[~common].sum())
        wanted.append(rare)
    assert len(wanted) > 3
    # the distance is sqrt(tokens / (2 pi draws)) at most on average, and deviates by 1 / sqrt(4 draws) at most
    draws, support = rows * repeats, (expected > 0).sum()
    distance = np.abs(counts - expected).sum() / 2 / draws
    assert distance < np.sqrt(support / (2 * np.pi * draws)) + 4 / np.sqrt(4 * draws)
    assert stats.chisquare(seen, np.asarray(wanted) * sum(seen) / sum(wanted)).pvalue > 1e-3


def test_invert_never_picks_weight_0() -> None:
    weights = np.zeros((3, 64), np.float32)
    weights[0, [3, 60]] = 1e-38, 1.0
    weights[1, 5] = 1.0
    weights[2, ::2] = np.random.default_rng(0).random(32)
    for uniform in (0.0, 1e-30, 0.5, 1 - 2.0**-24):
        picked = np.asarray(invert(jnp.asarray(weights), jnp.full(3, uniform, jnp.float32)))
        assert (weights[range(3), picked] > 0).all()


def test_uniforms_are_uniform_and_independent() -> None:
    count = 50_000
    seed = jnp.tile(jnp.asarray([[1, 2]], jnp.uint32), (count, 1))
    numbers = np.asarray(jax.jit(uniforms)(seed, jnp.arange(count), 0))
    assert numbers.min() >= 0 and numbers.max() < 1
    for column in range(3):
        assert stats.kstest(numbers[:, column], "uniform").pvalue > 1e-3
    assert np.abs(np.corrcoef(numbers.T) - np.eye(3)).max() < 0.02
    again = np.asarray(jax.jit(uniforms)(seed, jnp.arange(count), 1))
    assert not (numbers == again).all(axis=1).any()


def test_seeds_and_positions_give_different_draws() -> None:
    seeds = [0, 1, 1 << 32, 2**64 - 1]
    rows = [Row(temperature=1.0, seed=seed, position=position) for seed in seeds for position in range(500)]
    logits = np.zeros((len(rows), 400), np.float32)
    batch = make_batch(rows, 400, want_logprobs=False)
    tokens = np.asarray(draw_all(logits, batch).token_ids)
    # of 500 independent pairs of draws among 400 tokens about 1.25 are equal
    by_seed = tokens.reshape(4, 500)
    for a, b in itertools.combinations(range(4), 2):
        assert (by_seed[a] == by_seed[b]).sum() < 10
    assert (by_seed[:, 1:] == by_seed[:, :-1]).sum() < 25
    np.testing.assert_array_equal(draw_all(logits, batch).token_ids, tokens)


def test_top_k_1_is_greedy_also_on_ties() -> None:
    logits = np.round(normal(16, 300) / 3)
    rows = [Row(temperature=1.0, top_k=1, seed=i) for i in range(16)]
    np.testing.assert_array_equal(run(logits, rows).token_ids, logits.argmax(1))


# --- a row does not see its batch ---


def varied_rows(count: int) -> list[Row]:
    """Rows of every kind, each kind of draw several times."""
    kinds = [row for _, row in RANDOM.values()] + [Row()]
    return [
        dataclasses.replace(kinds[i % len(kinds)], seed=i * 977, position=i, prompt=[1, 2, i], outputs=[i, i + 1])
        if i % 4
        else dataclasses.replace(
            kinds[i % len(kinds)], seed=i, position=i, repetition_penalty=1.2, outputs=[i], bias={i: 2.0}
        )
        for i in range(count)
    ]


def test_a_row_alone_is_the_row_in_any_batch() -> None:
    count, vocab = 33, 1000
    rows, logits = varied_rows(count), normal(count, vocab, 1.0)
    batch = make_batch(rows, vocab)
    whole = compiled(5)(logits, batch)
    order = np.random.default_rng(0).permutation(count)
    shuffled = compiled(5)(*jax.tree.map(lambda leaf: leaf[order] if leaf.ndim else leaf, (logits, batch)))
    parts = [compiled(5)(logits[i : i + 1], make_batch(rows[i : i + 1], vocab)) for i in range(count)]
    alone = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    for other in (jax.tree.map(lambda leaf: leaf[np.argsort(order)], shuffled), alone):
        jax.tree.map(np.testing.assert_array_equal, other, whole)
