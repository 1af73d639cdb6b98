"""Drafts out of the sequence itself: what followed its last few tokens where they stood before."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.speculative.drafter import TextDrafter

#: positions that are compared at once: a search goes no further than the longest sequence, in pieces of it
PIECE = 512


@dataclasses.dataclass(frozen=True)
class NgramDrafter(TextDrafter):
    """vLLM's rule: of the runs of `min_match` to `max_match` tokens that a sequence ends with, the longest one that
    occurs before; of its occurrences the first; what follows it there, as far as it goes, is the draft.
    """

    num_drafts: int
    min_match: int
    max_match: int

    def found(
        self, tokens: jax.Array, lengths: jax.Array, outputs: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """See `TextDrafter.found`; it looks at no outputs."""
        seqs, width = tokens.shape
        piece = min(PIECE, width)
        last = lengths - 1
        # the sequence's end, its last token first; -1 before its beginning, which no token is
        back = lax.iota(jnp.int32, self.max_match)
        end = jnp.take_along_axis(tokens, jnp.maximum(last[:, None] - back, 0), axis=1, mode="clip")
        end = jnp.where(back <= last[:, None], end, -1)

        def search(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
            index, longest, found = carry
            first = jnp.minimum(index * piece, width - piece)
            position = first + lax.iota(jnp.int32, piece)
            # how many tokens up to each position are those of the end
            run = jnp.zeros((seqs, piece), jnp.int32)
            goes_on = jnp.broadcast_to(position < last[:, None], (seqs, piece))
            for distance in range(self.max_match):
                # what lies before the sequence's beginning is no match
                there = jnp.take(tokens, jnp.maximum(position - distance, 0), axis=1, mode="clip")
                goes_on = goes_on & (there == end[:, distance : distance + 1]) & (position >= distance)
                run += goes_on
            best = jnp.max(run, axis=1)
            place = first + jnp.argmax(run, axis=1).astype(jnp.int32)
            better = best > longest
            return index + 1, jnp.where(better, best, longest), jnp.where(better, place, found)

        nothing = jnp.int32(0), jnp.zeros(seqs, jnp.int32), jnp.zeros(seqs, jnp.int32)
        pieces = (jnp.max(last) + piece - 1) // piece
        _, longest, found = lax.while_loop(lambda carry: carry[0] < pieces, search, nothing)

        ahead = found[:, None] + 1 + lax.iota(jnp.int32, self.num_drafts)
        ids = jnp.take_along_axis(tokens, jnp.minimum(ahead, width - 1), axis=1, mode="clip")
        # a vector of a prompt is no token: drafts end before it
        is_draft = (ahead < lengths[:, None]) & (ids >= 0) & (longest >= self.min_match)[:, None]
        is_draft = jnp.cumprod(is_draft, axis=1)
        return jnp.where(is_draft == 1, ids, 0), jnp.sum(is_draft, axis=1).astype(jnp.int32)
