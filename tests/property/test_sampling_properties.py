"""Truncation of any logits keeps what the oracle keeps, and nothing else is ever drawn."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.sampling_oracle import Row, adjusted, kept_bounds, log_weights, make_batch, ranking

from jaxllm.sampling.sampler import sample

# (rows, vocabulary): each shape is compiled once
SHAPES = [(1, 1), (9, 7), (5, 257), (2, 1000)]


@functools.cache
def compiled(vocab: int) -> Any:
    """A program that returns the logits of every token that remains."""
    return jax.jit(functools.partial(sample, num_logprobs=vocab, logprobs_mode="processed_logits"))


def make_logits(generator: np.random.Generator, kind: str, vocab: int) -> np.ndarray:
    values = generator.normal(0, 3, vocab).astype(np.float32)
    match kind:
        case "ties":
            values = np.round(values)
        case "equal":
            values[:] = values[0]
        case "nearly equal":
            values = values[0] + values * np.float32(1e-6)
        case "holes":
            values[generator.random(vocab) < 0.7] = -np.inf
            values[generator.integers(vocab)] = 1.0
        case "huge":
            values *= np.float32(1e37)
        case "tiny":
            values *= np.float32(1e-30)
        case "spike":
            values[generator.integers(vocab)] = 1e4
        case "infinite":
            values[generator.integers(0, vocab, 2)] = np.inf
        case "flat":
            values *= np.float32(0.1)
    return values


KINDS = st.sampled_from(
    ["normal", "ties", "equal", "nearly equal", "holes", "huge", "tiny", "spike", "infinite", "flat"]
)
ROWS = st.builds(
    Row,
    temperature=st.sampled_from([0.01, 0.3, 1.0, 2.0]),
    top_k=st.one_of(st.integers(-1, 5), st.integers(50, 70), st.integers(1, 2000)),
    top_p=st.one_of(st.just(1.0), st.floats(0.015625, 1.0, width=32)),
    min_p=st.one_of(st.just(0.0), st.floats(2.0**-20, 1.0, width=32)),
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(0, 2**20),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), shape=st.sampled_from(SHAPES), number=st.integers(0, 2**32 - 1))
def test_truncation_keeps_what_the_oracle_keeps(data: st.DataObject, shape: tuple[int, int], number: int) -> None:
    count, vocab = shape
    generator = np.random.default_rng(number)
    logits = np.stack([make_logits(generator, data.draw(KINDS), vocab) for _ in range(count)])
    rows = [data.draw(ROWS) for _ in range(count)]
    result = jax.tree.map(np.asarray, compiled(vocab)(jnp.asarray(logits), make_batch(rows, vocab)))
    for i, row in enumerate(rows):
        fewest, most = kept_bounds(logits[i], row)
        order = ranking(logits[i])
        kept = set(result.logprobs.top_ids[i][result.logprobs.top[i] > -np.inf])
        possible = {token for token in order if logits[i][token] > -np.inf}
        # a logit that overflows when it is divided by the temperature is -inf, and can not be told from a removed one
        visible = {t for t in possible if abs(logits[i][t] / np.float64(row.temperature)) < 3e38 or logits[i][t] > 0}
        assert set(order[:fewest]) & visible <= kept <= set(order[:most]) & possible, (i, row)
        token = result.token_ids[i]
        assert token in set(order[:most]) & possible, (i, row)
        assert log_weights(logits[i], row.temperature)[token] > -88, "a token of probability 0"


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), shape=st.sampled_from(SHAPES), number=st.integers(0, 2**32 - 1))
def test_adjusted_logits_are_the_oracles(data: st.DataObject, shape: tuple[int, int], number: int) -> None:
    count, vocab = shape
    tokens = st.lists(st.integers(0, vocab - 1), max_size=4)
    words = st.lists(st.lists(st.integers(0, vocab - 1), min_size=1, max_size=3), max_size=3)
    penalty = st.floats(-2, 2, width=32)
    rows = [
        data.draw(
            st.builds(
                Row,
                repetition_penalty=st.sampled_from([1.0, 0.5, 1.25]),
                presence_penalty=penalty,
                frequency_penalty=penalty,
                prompt=tokens,
                outputs=tokens,
                bias=st.dictionaries(st.integers(0, vocab - 1), st.floats(-100, 100, width=32), max_size=4),
                allowed=st.one_of(st.none(), st.sets(st.integers(0, vocab - 1))),
                bad_words=words,
            )
        )
        for _ in range(count)
    ]
    logits = np.random.default_rng(number).normal(0, 3, (count, vocab)).astype(np.float32)
    result = jax.tree.map(np.asarray, compiled(vocab)(jnp.asarray(logits), make_batch(rows, vocab)))
    for i, row in enumerate(rows):
        seen = np.empty(vocab)
        seen[result.logprobs.top_ids[i]] = result.logprobs.top[i]
        np.testing.assert_allclose(seen, adjusted(logits[i], row), rtol=1e-5, atol=1e-4)
