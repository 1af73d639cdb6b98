"""What every drafter offers: a frozen dataclass, since a program is compiled for one of them."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxllm.layers.attention import Cache
from jaxllm.layers.context import Context
from jaxllm.models.decoder import DecoderConfig, Params
from pallas_kernels.batch import AttentionBatch


class Asked(NamedTuple):
    """Whom a step wants drafts for. S: sequences, M: max_model_len."""

    context: Context
    #: of the model that drafts; None: nobody needs one
    params: Params | None
    #: of single tokens, with the sequences' block tables; the other fields are any
    attention: AttentionBatch
    tokens: jax.Array  # i32 [S, M], of each sequence at their positions; anything behind the last one
    positions: jax.Array  # i32 [S], of the last token
    going_on: jax.Array  # bool [S]; the others get none
    #: i32 [1, 1 + C], of earlier requests (`suffix.KeptOutputs`); None: they are not kept
    outputs: jax.Array | None
    most: jax.Array  # i32 [S]
    #: (model, its weights, hidden [S, d], positions i32 [S] of the tokens that these are of) -> i32 [S]: what the
    #: sequences' requests would sample of that model's scores, with the random numbers of those positions
    sample: Callable[[DecoderConfig, Params, jax.Array, jax.Array], jax.Array]


class Drafter(Protocol):
    @property
    def num_drafts(self) -> int:
        """The most of a step."""
        ...

    def look(self, asked: Asked) -> tuple[Any, jax.Array]:
        """How many drafts there can be.

        Returns:
            (found, counts): what `write` takes, and i32 [S], at most `asked.most`; 0 of those that do not go on.
        """
        ...

    def write(self, asked: Asked, cache: Cache | None, found: Any, counts: jax.Array) -> tuple[Cache | None, jax.Array]:
        """The drafts.

        Args:
            cache: the drafter's own (`State.draft_cache`).
            counts: i32 [S], how many are wanted, of those that there can be.

        Returns:
            (cache, ids): i32 [S, num_drafts].
        """
        ...

    def settle(
        self, asked: Asked, cache: Cache | None, ids: jax.Array, counts: jax.Array, accepted: jax.Array
    ) -> Cache | None:
        """Told what became of its drafts.

        Args:
            accepted: i32 [S], how many of `counts` were right.
        """
        ...


class TextDrafter(abc.ABC):
    """A `Drafter` that finds drafts in texts that there are, and needs no model: it looks for them, and that is all."""

    @abc.abstractmethod
    def found(
        self, tokens: jax.Array, lengths: jax.Array, outputs: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """What may come next.

        Args:
            tokens: i32 [S, M], of each sequence, at their positions; anything from its length on.
            lengths: i32 [S], at least 1.
            outputs: see `Asked.outputs`.

        Returns:
            (ids, counts): i32 [S, num_drafts], and i32 [S], how many of them are drafts; none where nothing matches.
        """

    def look(self, asked: Asked) -> tuple[jax.Array, jax.Array]:
        """See `Drafter.look`."""
        ids, counts = self.found(asked.tokens, asked.positions + 1, asked.outputs)
        return ids, jnp.where(asked.going_on, jnp.minimum(counts, asked.most), 0)

    def write(
        self, asked: Asked, cache: Cache | None, found: jax.Array, counts: jax.Array
    ) -> tuple[Cache | None, jax.Array]:
        """What `look` has found."""
        return cache, found

    def settle(
        self, asked: Asked, cache: Cache | None, ids: jax.Array, counts: jax.Array, accepted: jax.Array
    ) -> Cache | None:
        """It learns nothing."""
        return cache
