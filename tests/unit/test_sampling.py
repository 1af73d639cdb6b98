"""Sampling against a float64 numpy oracle."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from support.sampling_oracle import Row, adjusted, compiled, log_softmax, log_weights, make_batch, normal, ranking, run

from jaxllm.runner.compile.compiler_options import CPU_HEAD_OPTIONS, CPU_OPTIONS
from jaxllm.sampling import penalties, tiles, truncation
from jaxllm.sampling.sampler import SampleResult, sample, sample_greedy

INF = float("inf")


VOCAB = 300


# --- greedy ---


def by_tiles(logits: jax.Array) -> jax.Array:
    return tiles._by_tiles(tiles.to_tiles(logits))[1]


@pytest.mark.parametrize("vocab", [1, 7, 64, 257, 1000, 1024, 2500])
def test_greedy_is_argmax_with_ties_to_the_lowest_id(vocab: int) -> None:
    logits = np.round(normal(9, vocab))
    # the first and last of blocks of tiles, of tiles behind the last block, and of the vocabulary
    places = np.asarray([0, 1023, 1024, 2047, 2048, 2111, 2112, 2498, 2499]) % vocab
    alone = np.zeros_like(logits)
    alone[np.arange(9), places] = 1.0
    for given in (logits, alone, alone + np.roll(alone, 5, axis=1)):
        np.testing.assert_array_equal(jax.jit(sample_greedy)(given), given.argmax(axis=1))
        # and as other platforms have it
        np.testing.assert_array_equal(jax.jit(by_tiles)(given), given.argmax(axis=1))


def test_greedy_of_rows_that_are_no_distribution() -> None:
    logits = normal(6, VOCAB)
    logits[0, 150] = np.nan
    logits[1, :] = -INF
    logits[2, [77, 99]] = INF
    logits[3, 3] = -INF
    logits[4, :] = np.nan
    logits[5, [10, 20]] = INF, np.nan
    expected = [0, 0, 77, logits[3].argmax(), 0, 0]
    np.testing.assert_array_equal(jax.jit(sample_greedy)(logits), expected)
    np.testing.assert_array_equal(run(logits, [Row()] * 6).token_ids, expected)
    sampled = run(logits, [Row(temperature=1e-6, top_p=0.9)] * 6).token_ids
    assert sampled[2] in (77, 99)
    np.testing.assert_array_equal(np.delete(sampled, 2), np.delete(expected, 2))


@pytest.mark.parametrize("vocab", [50257, 262144])
def test_greedy_of_real_vocabularies_as_engines_compile_it(vocab: int) -> None:
    """XLA's fusions for CPUs, which engines leave out, lose a NaN of so many numbers."""
    logits = normal(4, vocab)
    logits[1, vocab - 1] = np.nan
    logits[2, [vocab // 2, vocab - 2, vocab - 1]] = INF
    logits[3, 0] = np.nan
    greedy = jax.jit(sample_greedy, compiler_options=CPU_OPTIONS | CPU_HEAD_OPTIONS)
    np.testing.assert_array_equal(greedy(logits), [logits[0].argmax(), 0, vocab // 2, 0])


@pytest.mark.parametrize("vocab", [257, 1024, 262144])
def test_a_row_of_nan_has_a_token_whatever_xla_loses(vocab: int) -> None:
    """With the fusions that programs with drafts have in JAX 0.11: they lose it from one maximum, not from another."""
    logits = normal(3, vocab)
    logits[1] = np.nan
    logits[2, 1:] = np.nan
    np.testing.assert_array_equal(jax.jit(sample_greedy)(logits), [logits[0].argmax(), 0, 0])


def test_a_row_of_nan_leaves_the_others_alone() -> None:
    logits = normal(4, VOCAB)
    rows = [Row(temperature=1.5, top_p=0.99, seed=i) for i in range(4)]
    clean = run(logits, rows)
    logits[2] = np.nan
    dirty = run(logits, rows)
    assert dirty.token_ids[2] == 0
    np.testing.assert_array_equal(np.delete(dirty.token_ids, 2), np.delete(clean.token_ids, 2))
    np.testing.assert_array_equal(np.delete(dirty.logprobs.top, 2, 0), np.delete(clean.logprobs.top, 2, 0))


@pytest.mark.parametrize("k", [1, 5, 64, 200])
def test_largest_is_a_stable_sort(k: int) -> None:
    logits = np.round(normal(3, 1000) * 2) / 2
    logits[1, ::3] = -INF
    values, ids = jax.jit(lambda x: tiles.largest(tiles.to_tiles(x), k))(logits)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_array_equal(values, np.take_along_axis(logits, order, 1))


# --- what changes single logits ---

ADJUSTMENTS = {
    "nothing": Row(),
    "mask": Row(allowed={0, 31, 32, 299, 150}),
    "one token allowed": Row(allowed={299}),
    "bias": Row(bias={0: 5.0, 299: -100.0, 17: 0.25}),
    "repetition": Row(repetition_penalty=1.3, prompt=[1, 2, 2, 3], outputs=[3, 4]),
    "repetition below 1": Row(repetition_penalty=0.7, prompt=[1, 2, 2, 3], outputs=[3, 4]),
    "presence": Row(presence_penalty=1.5, prompt=[1, 2], outputs=[2, 7, 7, 7]),
    "frequency": Row(frequency_penalty=-0.5, prompt=[1, 2], outputs=[2, 7, 7, 7]),
    "no outputs yet": Row(repetition_penalty=2.0, frequency_penalty=1.0, presence_penalty=1.0, prompt=[5, 299]),
    "bad word of one token": Row(bad_words=[[42]]),
    "bad word that begins": Row(bad_words=[[8, 9], [1, 9, 50]], prompt=[1], outputs=[8]),
    "bad word that ends": Row(bad_words=[[8, 9, 50], [9, 51], [7, 9, 52]], prompt=[3], outputs=[8, 9]),
    "bad word that begins in the prompt": Row(bad_words=[[8, 50], [8, 9, 51], [9, 52]], prompt=[8], outputs=[9]),
    "bad word behind a prompt": Row(bad_words=[[8, 50], [7, 8, 51]], prompt=[7, 8]),
    "bad word longer than the history": Row(bad_words=[[8, 9, 50]], outputs=[9]),
    "all": Row(
        repetition_penalty=1.2,
        presence_penalty=0.5,
        frequency_penalty=0.3,
        prompt=[4, 5, 6],
        outputs=[6, 8, 8],
        bias={8: 3.0, 6: -2.0},
        allowed=set(range(0, 300, 2)),
        bad_words=[[8, 10]],
    ),
}


@pytest.fixture(scope="module")
def adjusted_rows() -> tuple[np.ndarray, SampleResult]:
    logits = normal(len(ADJUSTMENTS), VOCAB)
    return logits, run(logits, list(ADJUSTMENTS.values()), VOCAB, "processed_logits")


@pytest.mark.parametrize("name", ADJUSTMENTS)
def test_adjusted_logits(name: str, adjusted_rows: tuple[np.ndarray, SampleResult]) -> None:
    logits, result = adjusted_rows
    index = list(ADJUSTMENTS).index(name)
    expected = adjusted(logits[index], ADJUSTMENTS[name])
    seen = np.empty(VOCAB)
    seen[result.logprobs.top_ids[index]] = result.logprobs.top[index]
    np.testing.assert_allclose(seen, expected, rtol=1e-6, atol=1e-6)
    assert result.token_ids[index] == expected.argmax()
    if name == "nothing":
        np.testing.assert_array_equal(
            seen.astype(np.float32), logits[index], "must not be touched by its neighbours' features"
        )


def test_nothing_allowed_gives_token_0() -> None:
    rows = [Row(allowed=set()), Row(allowed=set(), temperature=1.0), Row(allowed=set(), temperature=1.0, top_p=0.5)]
    np.testing.assert_array_equal(run(normal(3, VOCAB), rows).token_ids, [0, 0, 0])


def test_counts_cross_chunks_of_the_history() -> None:
    capacity, vocab = 700, 50
    assert capacity % penalties.CHUNK
    generator = np.random.default_rng(0)
    rows = []
    for prompt, outputs in [(0, 700), (300, 400), (511, 2), (512, 0), (700, 0), (0, 0), (255, 258)]:
        tokens = generator.integers(0, vocab, 700).tolist()
        rows.append(Row(repetition_penalty=1.1, prompt=tokens[:prompt], outputs=tokens[prompt : prompt + outputs]))
    rows.append(dataclasses.replace(rows[1], repetition_penalty=1.0))
    rows.append(dataclasses.replace(rows[1], repetition_penalty=1.0, presence_penalty=0.1))
    batch = make_batch(rows, vocab, capacity=capacity)
    counts = np.asarray(jax.jit(penalties.history_counts, static_argnums=1)(batch, vocab))
    for row, seen in zip(rows, counts, strict=True):
        expected = np.zeros(vocab, int)
        if row.repetition_penalty != 1.0 or row.presence_penalty:
            np.add.at(expected, row.outputs, 1)
        if row.repetition_penalty != 1.0:
            expected[list(set(row.prompt))] += 1 << 24
        np.testing.assert_array_equal(seen, expected)


# --- log-probabilities ---


@pytest.mark.parametrize("mode", ["raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits"])
def test_logprobs(mode: str) -> None:
    vocab, k = VOCAB, 5
    rows = [
        Row(),
        Row(temperature=0.7, seed=3),
        Row(temperature=1.5, top_k=9, seed=4),
        Row(temperature=1.5, top_k=20, bias={3: 4.0}, seed=5),
        Row(bias={3: 8.0}),
    ]
    logits = np.round(normal(len(rows), vocab) * 4) / 4
    result = run(logits, rows, k, mode)
    for i, row in enumerate(rows):
        values = logits[i].astype(np.float64)
        if mode.startswith("processed"):
            values = adjusted(logits[i], row)
            if row.temperature:
                removed = np.full(vocab, True)
                removed[ranking(values)[: row.top_k or vocab]] = False
                values = np.where(removed, -INF, values / row.temperature)
        if mode.endswith("logprobs"):
            values = log_softmax(values)
        token, logprobs = result.token_ids[i], result.logprobs
        np.testing.assert_allclose(logprobs.sampled[i], values[token], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(logprobs.top[i], values[ranking(values)[:k]], rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(logprobs.top_ids[i], ranking(values)[:k])
        assert logprobs.rank[i] == 1 + (values > values[token]).sum()


def test_logprobs_that_nobody_wants_are_zeros() -> None:
    logits = normal(2, VOCAB)
    result = run(logits, [Row()] * 2, want_logprobs=False)
    assert not any(leaf.any() for leaf in jax.tree.leaves(result.logprobs))
    assert run(logits, [Row()] * 2, 0).logprobs.top.shape == (2, 0)
    np.testing.assert_allclose(
        run(logits, [Row()] * 2, 0).logprobs.sampled, [log_softmax(row).max() for row in logits], rtol=1e-5
    )


# --- the program ---


def primitives(jaxpr: Any) -> list[tuple[str, int]]:
    """(name, largest size of an operand or result) of every primitive, inner programs included."""
    found = []
    for equation in jaxpr.eqns:
        found.append((equation.primitive.name, max(v.aval.size for v in [*equation.invars, *equation.outvars])))
        for inner in jaxprs_in_params(equation.params):
            found += primitives(inner)
    return found


def test_no_sort_of_the_vocabulary_and_no_random_number_per_token() -> None:
    rows, vocab = 4, 100_000
    batch = make_batch([Row()] * rows, vocab)
    program = jax.make_jaxpr(functools.partial(sample, num_logprobs=20))(jnp.zeros((rows, vocab)), batch)
    seen = primitives(program.jaxpr)
    for name in ("sort", "top_k", "random_fold_in"):
        sizes = [size for primitive, size in seen if primitive == name]
        assert sizes and max(sizes) < rows * vocab / 10, name
    assert not [name for name, _ in seen if name.startswith("random_bits")]


def test_lowers_for_cuda() -> None:
    specs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), make_batch([Row()] * 8, 32_000))
    logits = jax.ShapeDtypeStruct((8, 32_000), jnp.float32)
    lowered = compiled(20).trace(logits, specs).lower(lowering_platforms=("cuda",))
    assert "stablehlo.while" in lowered.as_text()


def test_features_of_size_0_are_left_out() -> None:
    logits = normal(2, VOCAB)
    logits = np.tile(logits, (8, 1))
    batch = make_batch([Row(), Row(temperature=1.0, top_p=0.9)] * 8, VOCAB)
    slim = dataclasses.replace(
        batch,
        history=batch.history[:, :0],
        bias_ids=batch.bias_ids[:, :0],
        bias_values=batch.bias_values[:, :0],
        mask_words=batch.mask_words[:, :0],
        bad_words=batch.bad_words[:, :0],
    ).with_flags()
    jax.tree.map(np.testing.assert_array_equal, compiled(5)(logits, slim), compiled(5)(logits, batch))
    assert "scatter" not in compiled(5).lower(logits, slim).as_text()


def test_flags_of_a_batch() -> None:
    def flags(row: Row) -> set[str]:
        batch = make_batch([Row(), row], 64)
        return {
            field.name
            for field in dataclasses.fields(batch)
            if field.name.startswith("any_") and getattr(batch, field.name)
        }

    assert flags(Row()) == set()
    assert flags(Row(top_k=5, top_p=0.5)) == set(), "a greedy row needs no truncation"
    assert flags(Row(temperature=1.0)) == {"any_random"}
    assert flags(Row(temperature=1.0, min_p=0.1)) == {"any_random", "any_truncation"}
    assert flags(Row(frequency_penalty=0.1)) == {"any_penalty"}
    assert flags(Row(bias={1: 0.5})) == {"any_bias"}
    assert flags(Row(allowed={1})) == {"any_mask"}
    assert flags(Row(bad_words=[[1]])) == {"any_bad_words"}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(num_logprobs=1, logprobs_mode="logits"), "logprobs_mode is 'logits'; it must be one of raw_logprobs"),
        (dict(num_logprobs=101), "num_logprobs is 101; it must be between 0 and the vocabulary's size, 100"),
        (dict(num_logprobs=-1), "num_logprobs is -1"),
    ],
)
def test_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(jnp.zeros((1, 100)), make_batch([Row()], 100), **kwargs)


def test_mask_of_another_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="mask_words has 4 words a row; 200 tokens need 7"):
        sample(jnp.zeros((1, 200)), make_batch([Row()], 100), num_logprobs=0)


# --- searching the border in the whole vocabulary ---


@pytest.mark.parametrize("limit", [1, 63, 64, 65, 200, 999, 1000])
def test_top_k_cut_keeps_exactly_k(limit: int) -> None:
    logits = normal(5, 1000)
    logits[1] = np.round(logits[1])
    logits[2] = 0.0
    logits[3] *= 1e30
    logits[4, 10:] = -INF
    tiled = tiles.to_tiles(jnp.asarray(logits))
    cut = jax.jit(truncation.top_k_cut)(tiled, jnp.full(5, limit), jnp.full(5, True))
    keeps = np.asarray(cut.keeps(tiled, tiles.token_ids(tiled))).reshape(5, -1)[:, :1000]
    for row in range(5):
        assert set(np.flatnonzero(keeps[row])) == set(ranking(logits[row])[:limit])


def test_the_oracle_weighs_as_softmax_does() -> None:
    logits = normal(1, 50)[0]
    weights = np.exp(log_weights(logits, 0.7))
    np.testing.assert_allclose(weights / weights.sum(), np.asarray(jax.nn.softmax(logits / 0.7)), rtol=1e-5)
