"""Embeddings and heads that adapters have in place of the model's: whole tables, one a slot."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.layers.context import Context
from jaxllm.layers.embedding import embed, unembed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterTables:
    """The tables of all slots. S slots, V tokens, d hidden size."""

    #: [S, V, d]; None: another pipeline stage has them, or a sampler that embeds nothing
    embedding: Any = None
    #: [S, V, d]; None: another pipeline stage has them, or there are no logits
    head: Any = None
    #: i32 [S, 2]: whether an adapter has an embedding, and a head, of its own; 0: the model's are its own
    owned: Any
    #: i32 [T], the slot of each token; -1: it has no adapter. None: outside of a forward step
    slots: jax.Array | None = None

    def embedded(self, context: Context, tokens: jax.Array, x: jax.Array) -> jax.Array:
        """x [T, d], the model's vectors of tokens i32 [T], with those of adapters that have their own."""
        if self.embedding is None or self.slots is None:
            return x
        slots = jnp.maximum(self.slots, 0)
        own = (self.slots >= 0) & (self.owned[slots, 0] > 0)
        return jnp.where(own[:, None], embed(context, self.embedding, tokens, x.dtype, slots), x)

    def scores(self, context: Context, hidden: jax.Array, slots: jax.Array, scores: jax.Array) -> jax.Array:
        """Scores f32 [R, V] of hidden [R, d] by the model's head, with those by the heads of adapters that have their
        own. A head that no row has is not read.

        Args:
            slots: i32 [R]; -1: no adapter.
        """
        if self.head is None:
            return scores
        for slot in range(self.owned.shape[0]):
            own = (slots == slot) & (self.owned[slot, 1] > 0)

            def by_own(scores: jax.Array, slot: int = slot, own: jax.Array = own) -> jax.Array:
                found = unembed(context, hidden, self.head[slot], scores.shape[1])
                return jnp.where(own[:, None], found, scores)

            scores = lax.cond(jnp.any(own), by_own, lambda scores: scores, scores)
        return scores
