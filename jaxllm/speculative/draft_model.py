"""Drafts of a smaller model: it reads what the large one reads, and writes a few tokens ahead.

It has weights and a KV cache of its own, under the block tables of the large model, and reads every token that this one
reads. While nothing is drafted for a sequence, it rests: it passes over the sequence's tokens, and reads `LOT` of them
at once, or fewer when they are needed.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.config.cache import KVCacheGroup
from jaxllm.layers.attention import Cache
from jaxllm.layers.context import Context, StepBatch
from jaxllm.models.decoder import forward, logits
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.params import Params
from jaxllm.models.specs import decoder_specs
from jaxllm.sampling.sampler import sample_greedy
from jaxllm.speculative.adaptive import ONE, check_costs
from jaxllm.speculative.drafter import Asked, Checked, ReadingDrafter, Written, columns_of
from jaxllm.speculative.reading import ReadingCosts
from pallas_kernels.batch import AttentionBatch

#: tokens of a sequence that are read at once which were passed over: as many as the kernels for a few rows take of the
#: four sequences that have drafts on a CPU
LOT = 8
#: of `Asked.behind`: the sequence has tokens that are never read (`speculative.reading`), and no drafts
GIVEN_UP = 1 << 24
#: `ReadingCosts.tokens_of_a_step`
PROMPT_TOKENS_CPU, PROMPT_TOKENS_GPU = 4, 256


class _Loop(NamedTuple):
    step: jax.Array  # i32 []
    cache: Cache
    ids: jax.Array  # i32 [S, 1 + num_drafts]: the last token, then the drafts


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelDrafter(ReadingDrafter):
    """See `ReadingDrafter`."""

    #: whether it is the model's own text part, which takes what pictures became; else it reads a prompt's tokens alone,
    #: as in vLLM
    sees: bool = False

    @property
    def rests(self) -> bool:
        """Whether it does: blocks that lie behind a window are others' by the time that they would be read."""
        return all(group.sliding_window is None for group in self.groups if group.layers)

    def specs(self) -> Params:
        """See `ReadingDrafter.specs`."""
        return decoder_specs(self.model)

    def read(
        self,
        context: Context,
        params: Params | None,
        cache: Cache | None,
        batch: StepBatch,
        hidden: jax.Array | None = None,
    ) -> Cache:
        """See `ReadingDrafter.read`."""
        return self._forward(context, params, cache, batch)[0]

    def look(self, asked: Asked) -> tuple[jax.Array, jax.Array]:
        """See `Drafter.look`."""
        counts = jnp.where(asked.behind < GIVEN_UP, super().look(asked)[1], 0)
        return counts, counts

    def write(self, asked: Asked, cache: Any, found: jax.Array, counts: jax.Array) -> Written:
        """Its own continuation."""
        assert cache is not None and asked.params is not None
        params, behind = asked.params, asked.behind
        reads_all = asked.going_on & (behind < GIVEN_UP)
        rests = asked.going_on & (counts == 0) & ((found > 0) | (behind > 0)) & self.rests | (behind >= GIVEN_UP)
        late = reads_all & (~rests | jnp.any(reads_all & (behind >= LOT)))
        cache = self.catch_up(
            asked.context,
            asked.params_of_several,
            cache,
            asked.attention,
            asked.tokens,
            asked.positions,
            jnp.where(late, behind, 0),
            asked.rope_offsets,
        )
        behind = jnp.where(late, 0, behind)

        def one(loop: _Loop) -> _Loop:
            # the last token itself is read where there can be no draft, too
            reads = asked.going_on & ~rests & ((loop.step == 0) | (loop.step < counts))
            batch = self._batch(asked, loop.ids, loop.step, reads)
            cache, hidden = self._forward(asked.context, params, loop.cache, batch)
            # what is compiled for the head is to be what it alone has
            hidden = lax.optimization_barrier(hidden)
            if self.samples:
                new = asked.sample(self.model, params, hidden, asked.positions + loop.step)
            else:
                new = sample_greedy(logits(asked.context, self.model, params, hidden))
            return _Loop(
                loop.step + 1, cache, lax.dynamic_update_slice_in_dim(loop.ids, new[:, None], loop.step + 1, 1)
            )

        ids = jnp.pad(asked.last_tokens, ((0, 0), (0, self.num_drafts)))
        rounds = jnp.maximum(jnp.max(counts), jnp.any(asked.going_on & ~rests).astype(jnp.int32))
        loop = lax.while_loop(lambda loop: loop.step < rounds, one, _Loop(jnp.int32(0), cache, ids))
        return Written(loop.cache, loop.ids[:, 1:], jnp.where(rests, behind + 1, 0))

    def catch_up(
        self,
        context: Context,
        params: Params | None,
        cache: Cache,
        attention: AttentionBatch,
        tokens: jax.Array,
        positions: jax.Array,
        behind: jax.Array,
        rope_offsets: jax.Array | None,
    ) -> Cache:
        """Read what was passed over.

        Args:
            params: as steps of several tokens of each sequence take them.
            attention, tokens, rope_offsets: as of `Asked`.
            positions: i32 [S], each sequence's first token that is not to be read.
            behind: i32 [S], how many before it are.
        """
        lane = jnp.arange(LOT, dtype=jnp.int32)

        def some(carry: tuple[Cache, jax.Array]) -> tuple[Cache, jax.Array]:
            cache, behind = carry
            # what is read ends before `positions`: nothing behind it is looked at
            first = jnp.where(behind > 0, jnp.maximum(positions - jnp.maximum(behind, LOT), 0), 0)
            place = first[:, None] + lane
            valid = (place >= (positions - behind)[:, None]) & (place < positions[:, None])
            now = columns_of(attention, first, behind > 0, jnp.full_like(behind, LOT - 1), LOT)
            now = dataclasses.replace(now, token_valid=valid.reshape(-1))
            ids = jnp.take_along_axis(tokens, place, axis=1, mode="clip")
            turned = None if rope_offsets is None else now.positions + jnp.repeat(rope_offsets, LOT, axis=1)
            batch = StepBatch(tokens=ids.reshape(-1), attention=now, rope_positions=turned)
            return self.read(context, params, cache, batch), jnp.maximum(behind - LOT, 0)

        return lax.while_loop(lambda carry: jnp.any(carry[1] > 0), some, (cache, behind))[0]

    def settle(self, asked: Asked, cache: Any, checked: Checked) -> Cache:
        """Read the last draft of those that were all right, which nothing has read yet."""
        ids, counts, accepted, _ = checked
        reads = asked.going_on & (counts > 0) & (accepted == counts)
        ids = jnp.pad(ids, ((0, 0), (1, 0)))

        # a loop of one round or none, which leaves the cache in its place
        def once(carry: tuple[jax.Array, Cache]) -> tuple[jax.Array, Cache]:
            batch = self._batch(asked, ids, counts, reads)
            return jnp.bool_(False), self.read(asked.context, asked.params, carry[1], batch)

        return lax.while_loop(lambda carry: carry[0], once, (jnp.any(reads), cache))[1]

    def _forward(
        self, context: Context, params: Params | None, cache: Cache | None, batch: StepBatch
    ) -> tuple[Cache, jax.Array]:
        assert params is not None and cache is not None
        if not self.sees:
            attention = dataclasses.replace(batch.attention, seen_to=None)
            batch = StepBatch(tokens=batch.tokens, attention=attention)
        return forward(context, self.model, self.groups, params, cache, batch)

    def _batch(self, asked: Asked, ids: jax.Array, ahead: jax.Array, reads: jax.Array) -> StepBatch:
        """A step of one token of each sequence that `reads`: those at `ahead` (i32 [] or [S]) of ids, which begin with
        the last token.
        """
        column = jnp.broadcast_to(ahead, asked.positions.shape)[:, None]
        tokens = jnp.take_along_axis(ids, column, axis=1, mode="clip")[:, 0]
        batch = asked.single(tokens, asked.positions + ahead, reads)
        if asked.rope_offsets is None:
            return batch
        assert isinstance(batch.attention, AttentionBatch)
        return dataclasses.replace(batch, rope_positions=batch.attention.positions + asked.rope_offsets)


def reading_costs(platform: str, step: float) -> ReadingCosts:
    """What it costs that a model reads whose steps take `step` of the large one's."""
    (lot,) = check_costs(platform, (LOT - 1,), (True,)) / ONE
    return ReadingCosts(
        step, float(step * (1 + lot) / LOT), PROMPT_TOKENS_CPU if platform == "cpu" else PROMPT_TOKENS_GPU
    )


def draft_groups(
    groups: tuple[KVCacheGroup, ...], model: DecoderConfig
) -> tuple[DecoderConfig, tuple[KVCacheGroup, ...]]:
    """The model that drafts, and its layers in that group of the large model's which keeps most tokens. Where that one
    has a window, the drafting layers see no further.
    """
    windows = [group.sliding_window for group in groups]
    chosen = max(range(len(groups)), key=lambda g: windows[g] or 2**30)
    bound = windows[chosen]
    if bound is not None:
        shorter = tuple(bound if window is None else min(window, bound) for window in model.layer_window)
        model = dataclasses.replace(model, layer_window=shorter)
    layers = tuple(range(model.num_layers))
    return model, tuple(
        KVCacheGroup(layers=layers if g == chosen else (), sliding_window=window) for g, window in enumerate(windows)
    )
