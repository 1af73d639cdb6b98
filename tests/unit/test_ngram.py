"""Drafts out of the sequence itself, against the rule written down in plain Python."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.speculative import ngram
from jaxllm.speculative.ngram import NgramDrafter


def by_the_rule(tokens: list[int], drafter: NgramDrafter) -> list[int]:
    """The longest run, of the allowed lengths, that the tokens end with and that occurs before; its first occurrence;
    what follows it there.
    """
    for length in range(drafter.max_match, drafter.min_match - 1, -1):
        end = tokens[-length:] if length <= len(tokens) else None
        for first in range(len(tokens) - length):
            if end is not None and tokens[first : first + length] == end:
                draft = tokens[first + length : first + length + drafter.num_drafts]
                return draft[: next((place for place, token in enumerate(draft) if token < 0), len(draft))]
    return []


WIDTH = 40


@functools.cache
def proposing(drafter: NgramDrafter):
    return jax.jit(drafter.found)


@pytest.mark.parametrize("piece", [512, 16])
@settings(max_examples=100)
@given(
    sequences=st.lists(st.lists(st.integers(-2, 3), min_size=1, max_size=WIDTH), min_size=3, max_size=3),
    drafter=st.sampled_from(
        [NgramDrafter(4, 2, 4), NgramDrafter(1, 1, 1), NgramDrafter(9, 3, 3), NgramDrafter(5, 1, 6)]
    ),
)
def test_it_is_the_rule(piece: int, sequences: list[list[int]], drafter: NgramDrafter):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngram, "PIECE", piece)
        # what lies behind a sequence's end is anything
        rubbish = np.random.default_rng(0).integers(0, 4, (len(sequences), WIDTH), np.int32)
        for row, tokens in zip(rubbish, sequences, strict=True):
            row[: len(tokens)] = tokens
        lengths = np.array([len(tokens) for tokens in sequences], np.int32)
        propose = proposing(drafter) if piece == 512 else proposing.__wrapped__(drafter)
        ids, counts = propose(jnp.asarray(rubbish), jnp.asarray(lengths))
    for tokens, draft, count in zip(sequences, np.asarray(ids).tolist(), np.asarray(counts).tolist(), strict=True):
        assert draft[:count] == by_the_rule(tokens, drafter)


def test_long_sequences_are_searched_to_their_beginning():
    tokens = np.arange(10, 3010, dtype=np.int32)
    tokens = np.concatenate([[7, 8, 9, 5], tokens, [7, 8, 9]])[None]
    ids, counts = NgramDrafter(3, 2, 3).found(jnp.asarray(tokens), jnp.asarray([tokens.shape[1]]))
    assert ids.tolist() == [[5, 10, 11]] and counts.tolist() == [3]
