"""Drafts of suffix decoding, against counts in plain Python."""

from __future__ import annotations

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.speculative import suffix
from jaxllm.speculative.suffix import NEAR, NOTHING, KeptOutputs, SuffixDrafter

WIDTH, KEPT = 40, 64


def by_counts(tokens: list[int], others: list[list[int]], drafter: SuffixDrafter) -> list[list[int]]:
    """All drafts that are as good, of the counts that a tree of all suffixes has."""
    texts = [tokens, *others]
    for length in range(min(drafter.max_depth, len(tokens)), 0, -1):
        end = tokens[len(tokens) - length :]
        if min(end) < 0:
            continue
        behind = [
            text[first + length :]
            for text in texts
            for first in range(len(text) - length + (text is not tokens))
            if text[first : first + length] == end
        ]
        if behind:
            most = min(int(drafter.factor * length + NEAR), drafter.num_drafts)
            return [draft for draft in _paths(behind, 1.0, most, drafter.min_prob)]
    return [[]]


def _paths(behind: list[list[int]], probability: float, most: int, least: float) -> list[list[int]]:
    counts = collections.Counter(text[0] for text in behind if text and text[0] >= 0)
    if not most or not counts or probability * max(counts.values()) / len(behind) < least - NEAR:
        return [[]]
    found = []
    for token, count in counts.items():
        if count == max(counts.values()):
            rest = [text[1:] for text in behind if text and text[0] == token]
            found += [[token, *path] for path in _paths(rest, probability * count / len(behind), most - 1, least)]
    return found


@functools.cache
def finding(drafter: SuffixDrafter, piece: int):
    def find(*args: jax.Array) -> tuple[jax.Array, jax.Array]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(suffix, "PIECE", piece)
            return drafter.found(*args)

    return jax.jit(find)


def written(outputs: list[list[int]], size: int = KEPT, most: int = 9) -> np.ndarray:
    kept, array = KeptOutputs(size, most), np.full(1 + size, NOTHING, np.int32)
    array[0] = 0
    for output in outputs:
        for first, values in kept.add(output):
            assert first + len(values) <= len(array)
            array[first : first + len(values)] = values
    return array


@settings(max_examples=150)
@given(
    sequences=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=WIDTH), min_size=3, max_size=3),
    others=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=14), max_size=4),
    embedded=st.integers(0, 6),
    drafter=st.sampled_from(
        [SuffixDrafter(4, 6, 1.0, 0.1), SuffixDrafter(7, 3, 2.5, 0.3), SuffixDrafter(3, 24, 0.5, 0.0)]
    ),
    piece=st.sampled_from([16, 2048]),
)
def test_it_is_what_a_tree_counts(
    sequences: list[list[int]], others: list[list[int]], embedded: int, drafter: SuffixDrafter, piece: int
):
    sequences = [[-2] * min(embedded, len(tokens) - 1) + tokens[embedded:] or tokens for tokens in sequences]
    # what lies behind a sequence's end is anything
    rubbish = np.random.default_rng(0).integers(0, 3, (len(sequences), WIDTH), np.int32)
    for row, tokens in zip(rubbish, sequences, strict=True):
        row[: len(tokens)] = tokens
    lengths = np.array([len(tokens) for tokens in sequences], np.int32)
    ids, counts = finding(drafter, piece)(rubbish, lengths, written(others)[None])
    for tokens, draft, count in zip(sequences, np.asarray(ids).tolist(), np.asarray(counts).tolist(), strict=True):
        assert draft[:count] in by_counts(tokens, others, drafter)


def test_the_latest_of_many_are_counted():
    """100 times 7 went on with 1, and then 70 times with 2."""
    tokens = np.asarray([[7, 1] * 100 + [7, 2] * 70 + [9, 7]], np.int32)
    ids, counts = SuffixDrafter(1, 1, 1.0, 0.9).found(
        jnp.asarray(tokens), jnp.asarray([tokens.shape[1]]), jnp.asarray(written([])[None])
    )
    assert ids.tolist() == [[2]] and counts.tolist() == [1]


@given(
    outputs=st.lists(st.lists(st.integers(0, 9), max_size=24), max_size=30),
    most=st.sampled_from([0, 1, 3, 100]),
)
def test_kept_outputs_are_whole_and_the_latest(outputs: list[list[int]], most: int):
    array = written(outputs, size=20, most=most)
    text = array[1:].tolist()
    assert array[0] <= 20 and all(token == NOTHING for token in text[array[0] :])
    found = [[]]
    for token in text:
        found = [*found, []] if token == NOTHING else [*found[:-1], [*found[-1], token]]
    found = [output for output in found if output]
    given = [output[-19:] for output in outputs if output]
    assert len(found) <= most and collections.Counter(map(tuple, found)) <= collections.Counter(map(tuple, given))
    if most and given:
        assert given[-1] in found
    if sum(len(output) + 1 for output in given) <= 20:
        assert sorted(found) == sorted(given[max(len(given) - most, 0) :])
