"""Drafts of layers behind the model (`models.draft_head`), which take what the model made of each token.

A token's place in their cache has its pair with the hidden state of the token before it, so that what lies in a block
depends on the tokens up to its end alone, as with the model's own keys and values. The hidden state of the last token
in each block that is computed so far is kept with the block: a chunk of a prompt, a request whose prefix was found in
the cache, or one that comes again begins with it.

While a step drafts, the layers go on from their own hidden states. What they have written so is written anew as soon as
the model has computed these tokens. That takes keys and values alone, so where nobody drafts, they nearly rest.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.layers.attention import Cache
from jaxllm.layers.context import Context, StepBatch
from jaxllm.models.decoder import last_norm, logits
from jaxllm.models.draft_head import DraftHead, head_forward, head_hidden, head_specs
from jaxllm.models.params import Params
from jaxllm.sampling.sampler import sample_greedy
from jaxllm.speculative.drafter import Asked, Checked, ReadingDrafter, Written, columns_of
from pallas_kernels.batch import AttentionBatch
from pallas_kernels.storage import from_storage, to_storage


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HeadCache:
    pages: Cache
    #: [blocks, d], `head_hidden` of the last token in each block that is computed, stored as pages are
    hidden: jax.Array


class _Loop(NamedTuple):
    step: jax.Array  # i32 []
    pages: Cache
    ids: jax.Array  # i32 [S, 1 + num_drafts]: the last token, then the drafts
    hidden: jax.Array  # [S, d], of the token before the next one


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadDrafter(ReadingDrafter):
    """See `ReadingDrafter`."""

    head: DraftHead

    takes_hidden = True

    @property
    def keeps(self) -> tuple[int, ...]:
        return self.head.keeps

    @property
    def kept_numbers(self) -> int:
        """See `ReadingDrafter.kept_numbers`."""
        return self.model.hidden_size if self.head.kind == "eagle3" else self.head.hidden_size

    def specs(self) -> Params:
        """See `ReadingDrafter.specs`."""
        return head_specs(self.head, self.model)

    def cache(self, pages: Any, kept: Any) -> HeadCache:
        """See `ReadingDrafter.cache`."""
        return HeadCache(pages, kept)

    def read(
        self, context: Context, params: Params | None, cache: Any, batch: StepBatch, hidden: jax.Array | None
    ) -> HeadCache:
        """See `ReadingDrafter.read`."""
        assert isinstance(batch.attention, AttentionBatch)
        lasts = batch.attention.query_start[1:] - 1
        return self._read(context, params, cache, batch, hidden, lasts)

    def _read(
        self,
        context: Context,
        params: Params | None,
        cache: HeadCache,
        batch: StepBatch,
        hidden: jax.Array | None,
        lasts: jax.Array,
    ) -> HeadCache:
        """`read`, of steps in which token `lasts` i32 [S] is the last one of each sequence."""
        assert params is not None and hidden is not None and isinstance(batch.attention, AttentionBatch)
        now, own = batch.attention, head_hidden(context, self.head, params, hidden)
        token = jnp.arange(own.shape[0], dtype=jnp.int32)
        is_first = token == now.query_start[now.token_seq]
        kept = lax.optimization_barrier(self._kept(cache, now, now.token_seq, now.positions - 1, own.dtype))
        is_last = (token == lasts[now.token_seq]) | ((now.positions + 1) % _block_size(cache) == 0)
        # block 0 is trash
        block = jnp.where(is_last & now.token_valid, self._blocks(cache, now, now.token_seq, now.positions), 0)
        # Where it writes depends on what was read, and is the same place whatever that is: XLA copies the whole array
        # where it does not know which comes first.
        block = jnp.minimum(block, jnp.iinfo(jnp.int32).max - jnp.isnan(kept[:, 0]))
        stored = to_storage(own, cache.hidden.dtype)
        if block.shape[0] == 1:
            # a scatter of one row is fused with the array's users by XLA:CPU, and copies it for each
            block, stored = jnp.pad(block, (0, 1)), jnp.pad(stored, ((0, 1), (0, 0)))
        written = dataclasses.replace(cache, hidden=cache.hidden.at[block].set(stored, mode="promise_in_bounds"))
        # A full block in front may be a hit of one that another request fills in this very step. A block that is not
        # full is the sequence's own, and what it held is overwritten.
        full = self._kept(written, now, now.token_seq, now.positions - 1, own.dtype)
        kept = jnp.where((now.positions % _block_size(cache) == 0)[:, None], full, kept)
        before = jnp.where(is_first[:, None], kept, jnp.roll(own, 1, axis=0))
        pages, _ = self._forward(context, params, cache.pages, batch, before)
        return dataclasses.replace(written, pages=pages)

    def look(self, asked: Asked) -> tuple[jax.Array, jax.Array]:
        """See `Drafter.look`."""
        counts = jnp.where(asked.positions > 0, super().look(asked)[1], 0)
        return counts, counts

    def write(self, asked: Asked, cache: Any, found: jax.Array, counts: jax.Array) -> Written:
        """Their own continuation."""
        assert asked.params is not None
        params, seq = asked.params, jnp.arange(asked.positions.shape[0], dtype=jnp.int32)

        def one(loop: _Loop) -> _Loop:
            tokens = lax.dynamic_index_in_dim(loop.ids, loop.step, 1, keepdims=False)
            batch = asked.single(tokens, asked.positions + loop.step, loop.step < counts)
            pages, hidden = self._forward(asked.context, params, loop.pages, batch, loop.hidden)
            # what is compiled for the head is to be what it alone has
            normed = lax.optimization_barrier(last_norm(self.model, params, hidden))
            if self.samples:
                new = asked.sample(self.model, params, normed, asked.positions + loop.step)
            else:
                new = sample_greedy(logits(asked.context, self.model, params, normed))
            ids = lax.dynamic_update_slice_in_dim(loop.ids, new[:, None], loop.step + 1, 1)
            return _Loop(loop.step + 1, pages, ids, normed if self.head.hands_on_normed else hidden)

        ids = jnp.pad(asked.last_tokens, ((0, 0), (0, self.num_drafts)))
        dtype = jnp.dtype(params.dtype)
        before = self._kept(cache, asked.attention, seq, asked.positions - 1, dtype)
        loop = _Loop(jnp.int32(0), cache.pages, ids, before)
        loop = lax.while_loop(lambda loop: loop.step < jnp.max(counts), one, loop)
        return Written(dataclasses.replace(cache, pages=loop.pages), loop.ids[:, 1:])

    def settle(self, asked: Asked, cache: Any, checked: Checked) -> HeadCache:
        """Read the last token and the drafts that were right, with what the model made of them."""
        ids, _, accepted, hidden = checked
        assert hidden is not None
        tokens = jnp.concatenate([asked.last_tokens, ids], axis=1)
        several = jnp.any(asked.going_on & (accepted > 0))

        def reads(width: int, params: Params | None, cache: HeadCache) -> HeadCache:
            own = jnp.swapaxes(hidden[:width], 0, 1).reshape(-1, hidden.shape[2])
            if width == 1:
                batch = asked.single(tokens[:, 0], asked.positions, asked.going_on)
                return self.read(asked.context, params, cache, batch, own)
            now = columns_of(asked.attention, asked.positions, asked.going_on, accepted, width)
            batch = StepBatch(tokens=tokens[:, :width].reshape(-1), attention=now)
            return self._read(asked.context, params, cache, batch, own, now.query_start[:-1] + accepted)

        # loops of one round or none, which leave the cache in its place
        def once(width: int, params: Params | None, wanted: jax.Array, cache: HeadCache) -> HeadCache:
            def body(carry: tuple[jax.Array, HeadCache]) -> tuple[jax.Array, HeadCache]:
                return jnp.bool_(False), reads(width, params, carry[1])

            return lax.while_loop(lambda carry: carry[0], body, (wanted, cache))[1]

        cache = once(1, asked.params, ~several, cache)
        return once(1 + self.num_drafts, asked.params_of_several, several, cache)

    def _forward(
        self, context: Context, params: Params, pages: Cache, batch: StepBatch, before: jax.Array
    ) -> tuple[Cache, jax.Array]:
        return head_forward(context, self.head, self.model, self.groups, params, pages, batch, before)

    def _kept(
        self, cache: HeadCache, batch: AttentionBatch, seq: jax.Array, positions: jax.Array, dtype: jnp.dtype
    ) -> jax.Array:
        """Hidden states of the last tokens of sequences, which are at these positions: [N, d]."""
        return from_storage(cache.hidden[self._blocks(cache, batch, seq, positions)], dtype)

    def _blocks(self, cache: HeadCache, batch: AttentionBatch, seq: jax.Array, positions: jax.Array) -> jax.Array:
        """The blocks in which tokens of sequences i32 [N] at their positions i32 [N] lie."""
        (group,) = (number for number, members in enumerate(self.groups) if members.layers)
        return batch.block_tables[group, seq, jnp.maximum(positions, 0) // _block_size(cache)]


def _block_size(cache: HeadCache) -> int:
    """Tokens of a block."""
    return cache.pages.shape[-2]
