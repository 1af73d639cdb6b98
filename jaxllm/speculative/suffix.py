"""Drafts out of the sequence itself and of what earlier requests got: how texts that end alike went on most often."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.speculative.drafter import TextDrafter

#: positions that are compared at once
PIECE = 4096
#: the latest matches that are asked how they went on
VOTERS = 64
#: tokens of earlier requests' outputs that are kept
KEPT_TOKENS = 1 << 14
#: what separates them, and what is there before any; no token is this
NOTHING = -1
#: a product of frequencies in float32 is as large as one that it is this near to
NEAR = 1e-6

_Found = tuple[jax.Array, jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class SuffixDrafter(TextDrafter):
    """Suffix decoding (Oliaro et al. 2024, arXiv:2411.04975), without its trees.

    Of the runs of up to `max_depth` tokens that a sequence ends with, the longest one that occurs before, in the
    sequence or in an output of an earlier request: of all its occurrences, the draft is what follows most of them,
    token after token among those that agree with it so far. It ends where the product of the tokens' frequencies falls
    below `min_prob`, and is no longer than `factor` times the run.

    A tree of suffixes has the same counts at its nodes as long as no more than `VOTERS` occurrences match; of more of
    them the latest ones are counted. Of two tokens that are as frequent, the one of the latest occurrence is taken.
    """

    num_drafts: int
    max_depth: int
    factor: float
    min_prob: float
    #: earlier outputs that are kept at once
    max_outputs: int = 0

    def found(
        self, tokens: jax.Array, lengths: jax.Array, outputs: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """See `TextDrafter.found`."""
        seqs, width = tokens.shape
        last = lengths - 1
        back = lax.iota(jnp.int32, self.max_depth)
        # the sequence's end, its last token first
        end = jnp.take_along_axis(tokens, jnp.maximum(last[:, None] - back, 0), axis=1, mode="clip")
        end = jnp.where(back <= last[:, None], end, NOTHING)
        # places below `width` are in the sequence, the others in the outputs
        found = jnp.zeros(seqs, jnp.int32), jnp.zeros(seqs, jnp.int32), jnp.zeros((seqs, VOTERS), jnp.int32)
        found = self._search(tokens, last, end, 0, found)
        if outputs is None:
            outputs = jnp.asarray([[0, NOTHING]], jnp.int32)
        kept = jnp.broadcast_to(outputs[:, 1:], (seqs, outputs.shape[1] - 1))
        found = self._search(kept, jnp.broadcast_to(outputs[0, 0], (seqs,)), end, width, found)
        return self._vote(tokens, lengths, kept, found)

    def _search(self, texts: jax.Array, ends: jax.Array, end: jax.Array, offset: int, found: _Found) -> _Found:
        """Add what matches in `texts` [S, W] before positions `ends` [S], the latest first.

        Args:
            found: how long the longest match is, how many there are, and the places of their last tokens, those of the
                first `VOTERS`.
            offset: is added to places.
        """
        seqs, width = texts.shape
        depth, piece = self.max_depth, min(PIECE, width)
        padded = jnp.pad(texts, ((0, 0), (depth - 1, 0)), constant_values=NOTHING)

        def add(run: jax.Array, first: jax.Array, found: _Found) -> _Found:
            longest, count, places = found
            best = jnp.max(run, axis=1)
            count = jnp.where(best > longest, 0, count)
            longest = jnp.maximum(best, longest)
            matches = (run == longest[:, None]) & (run > 0)
            # the n-th latest match of this piece comes behind those that are there
            so_far = _running_count(matches)
            total = so_far[:, -1]
            number = 1 + lax.iota(jnp.int32, VOTERS) - count[:, None]
            place = jax.vmap(jnp.searchsorted)(so_far, total[:, None] - number + 1).astype(jnp.int32)
            is_new = (number >= 1) & (number <= total[:, None])
            places = jnp.where(is_new, offset + first + place, places)
            return longest, count + total, places

        def one_piece(carry: tuple[jax.Array, _Found]) -> tuple[jax.Array, _Found]:
            index, found = carry
            first = jnp.minimum(index * piece, width - piece)
            position = first + lax.iota(jnp.int32, piece)

            def one_distance(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
                distance, goes_on, run = carry
                there = lax.dynamic_slice_in_dim(padded, first + depth - 1 - distance, piece, axis=1)
                wanted = lax.dynamic_slice_in_dim(end, distance, 1, axis=1)
                goes_on = goes_on & (there == wanted) & (wanted >= 0)
                return distance + 1, goes_on, run + goes_on

            # the last piece begins where it has room, and what the one behind it has is not found again
            goes_on = (position < ends[:, None]) & (position >= index * piece)
            nothing = jnp.int32(0), goes_on, jnp.zeros((seqs, piece), jnp.int32)
            _, _, run = lax.while_loop(lambda c: (c[0] < depth) & jnp.any(c[1]), one_distance, nothing)
            some = jnp.any((jnp.max(run, axis=1) >= found[0]) & (jnp.max(run, axis=1) > 0))
            found = lax.cond(some, add, lambda run, first, found: found, run, first, found)
            return index - 1, found

        pieces = (jnp.max(ends) + piece - 1) // piece
        return lax.while_loop(lambda carry: carry[0] >= 0, one_piece, (pieces - 1, found))[1]

    def _vote(
        self, tokens: jax.Array, lengths: jax.Array, kept: jax.Array, found: _Found
    ) -> tuple[jax.Array, jax.Array]:
        longest, count, places = found
        seqs, width = tokens.shape
        agree = lax.iota(jnp.int32, VOTERS) < count[:, None]
        most = jnp.minimum((self.factor * longest + NEAR).astype(jnp.int32), self.num_drafts)
        probability, going_on = jnp.ones(seqs, jnp.float32), jnp.ones(seqs, bool)
        ids, counts = [], jnp.zeros(seqs, jnp.int32)
        for distance in range(1, self.num_drafts + 1):
            ahead = places + distance
            own = jnp.take_along_axis(tokens, jnp.minimum(ahead, width - 1), axis=1, mode="clip")
            others = jnp.take_along_axis(kept, jnp.clip(ahead - width, 0, kept.shape[1] - 1), axis=1, mode="clip")
            is_own = places < width
            there = jnp.where(is_own, ahead < lengths[:, None], ahead - width < kept.shape[1])
            token = jnp.where(there, jnp.where(is_own, own, others), NOTHING)
            speaks = agree & (token >= 0)
            votes = jnp.sum(speaks[:, None, :] & (token[:, :, None] == token[:, None, :]), axis=2)
            votes = jnp.where(speaks, votes, 0)
            best = jnp.argmax(votes, axis=1)[:, None]
            chosen = jnp.take_along_axis(token, best, axis=1)[:, 0]
            share = jnp.max(votes, axis=1) / jnp.maximum(jnp.sum(agree, axis=1), 1)
            probability = probability * share.astype(jnp.float32)
            going_on = going_on & (distance <= most) & jnp.any(speaks, axis=1)
            going_on = going_on & (probability >= self.min_prob - NEAR)
            agree = speaks & (token == chosen[:, None])
            ids.append(jnp.where(going_on, chosen, 0))
            counts += going_on
        return jnp.stack(ids, axis=1).astype(jnp.int32), counts


def _running_count(flags: jax.Array) -> jax.Array:
    """``cumsum(flags, axis=1)`` of bool [S, W], i32: of blocks by a product, as XLA:CPU's takes 20 ns an element."""
    seqs, width = flags.shape
    block = 64
    blocks = jnp.pad(flags, ((0, 0), (0, -width % block))).reshape(seqs, -1, block).astype(jnp.float32)
    inner = jnp.matmul(blocks, jnp.triu(jnp.ones((block, block), jnp.float32)), precision=lax.Precision.HIGHEST)
    sums = inner[..., -1]
    whole = inner + (jnp.cumsum(sums, axis=1) - sums)[..., None]
    return whole.reshape(seqs, -1)[:, :width].astype(jnp.int32)


class KeptOutputs:
    """Where the outputs of earlier requests lie in i32 [1, 1 + C] on the device: how many places were ever used, then
    outputs, each with a `NOTHING` behind it. An output that needs the place of others takes all of theirs.

    Args:
        size: C, at least 2.
        most: outputs at once.
    """

    def __init__(self, size: int, most: int) -> None:
        self._size, self._most = size, most
        self._next = self._used = 0
        #: (first place, places) of each, the oldest first
        self._lying: list[tuple[int, int]] = []

    def add(self, token_ids: list[int]) -> list[tuple[int, list[int]]]:
        """Find a place for an output: what is to be written, as (index in the array, values)."""
        token_ids = token_ids[1 - self._size :]
        if not token_ids or not self._most:
            return []
        count = len(token_ids) + 1
        first = self._next if self._next + count <= self._size else 0
        self._next = first + count
        too_many = len(self._lying) + 1 - self._most
        gone = [
            (place, length)
            for index, (place, length) in enumerate(self._lying)
            if index < too_many or (place < first + count and first < place + length)
        ]
        self._lying = [lot for lot in self._lying if lot not in gone] + [(first, count)]
        self._used = max(self._used, first + count)
        writes = [(1 + place, [NOTHING] * length) for place, length in gone]
        return [*writes, (1 + first, [*token_ids, NOTHING]), (0, [self._used])]

    def clear(self) -> None:
        """Forget all; the array is as at the beginning."""
        self._next = self._used = 0
        self._lying.clear()
