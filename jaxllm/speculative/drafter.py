"""What every drafter offers: a frozen dataclass, since a program is compiled for one of them."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxllm.config.cache import KVCacheGroup
from jaxllm.layers.context import Context, StepBatch
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.params import Params
from pallas_kernels.batch import AttentionBatch


class Asked(NamedTuple):
    """Whom a step wants drafts for. S: sequences, M: max_model_len."""

    context: Context
    #: of what drafts; None: nobody needs any
    params: Params | None
    #: the same, as steps of ``1 + num_drafts`` tokens of each sequence take them
    params_of_several: Params | None
    #: of single tokens, with the sequences' block tables; the other fields are any
    attention: AttentionBatch
    tokens: jax.Array  # i32 [S, M], of each sequence at their positions; anything behind the last one
    positions: jax.Array  # i32 [S], of the last token
    going_on: jax.Array  # bool [S]; the others get none
    #: i32 [1, 1 + C], of earlier requests (`suffix.KeptOutputs`); None: they are not kept
    outputs: jax.Array | None
    most: jax.Array  # i32 [S]
    #: i32 [S]: tokens before the last one that a model which drafts has passed over
    behind: jax.Array
    #: i32 [3, S], what is added to positions of generated tokens behind pictures; None: positions have one axis
    rope_offsets: jax.Array | None
    #: (model, its weights, hidden [S, d], positions i32 [S] of the tokens that these are of) -> i32 [S]: what the
    #: sequences' requests would sample of that model's scores, with the random numbers of those positions
    sample: Callable[[DecoderConfig, Params, jax.Array, jax.Array], jax.Array]

    @property
    def last_tokens(self) -> jax.Array:
        """i32 [S, 1]."""
        return jnp.take_along_axis(self.tokens, self.positions[:, None], axis=1, mode="clip")

    def single(self, tokens: jax.Array, positions: jax.Array, valid: jax.Array) -> StepBatch:
        """A step of one token of each sequence, of those that are valid: all [S]."""
        position = jnp.where(valid, positions, 0)
        now = dataclasses.replace(self.attention, positions=position, kv_lens=position + 1, token_valid=valid)
        return StepBatch(tokens=tokens, attention=now)


class Written(NamedTuple):
    """What a drafter has made."""

    cache: Any  # the drafter's own (`State.draft_cache`)
    ids: jax.Array  # i32 [S, num_drafts]
    #: i32 [S], tokens up to the last one that it has passed over; None: it passes over none
    behind: jax.Array | None = None


class Checked(NamedTuple):
    """What became of drafts."""

    ids: jax.Array  # i32 [S, num_drafts]
    counts: jax.Array  # i32 [S], how many of them were checked
    accepted: jax.Array  # i32 [S], how many were right
    #: [1 + num_drafts, S, h], what the model made of the last token and of the drafts, for those who take it
    #: (`ReadingDrafter.takes_hidden`); rubbish where there is no draft
    hidden: jax.Array | None


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

    def write(self, asked: Asked, cache: Any, found: Any, counts: jax.Array) -> Written:
        """The drafts.

        Args:
            counts: i32 [S], how many are wanted, of those that there can be.
        """
        ...

    def settle(self, asked: Asked, cache: Any, checked: Checked) -> Any:
        """Told what became of its drafts; returns its cache."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadingDrafter(abc.ABC):
    """A `Drafter` with layers and a cache of its own, under the block tables of the model that it drafts for: it reads
    every token that the model reads. What is in a block of the one, of a prefix too, is in the same block of the other.
    """

    num_drafts: int
    #: its layers; where heads and the MLP are split over devices, with one device's numbers
    model: DecoderConfig
    #: as many as the model has that it drafts for; all its layers are in one of them, whose block table they read
    groups: tuple[KVCacheGroup, ...]
    #: tokens of the longest sequence that it drafts for
    max_length: int
    #: whether drafts are what the request would sample of its scores, with the random numbers that the model's tokens
    #: are sampled with, so that models which agree draw the same; False: its most likely tokens
    samples: bool = True

    #: whether it takes what the model made of the tokens, and of which of its layers' inputs (`forward_keeping`); ():
    #: of what comes out behind the last norm
    takes_hidden = False

    @property
    def keeps(self) -> tuple[int, ...]:
        return ()

    @property
    def kept_numbers(self) -> int:
        """Numbers that it keeps of each block besides its layers' pages."""
        return 0

    @abc.abstractmethod
    def specs(self) -> Params:
        """Its weights, a tree of `WeightSpec`s."""

    def cache(self, pages: Any, kept: Any) -> Any:
        """What it keeps between steps, of its layers' pages, and of [blocks, kept_numbers]."""
        return pages

    @abc.abstractmethod
    def read(
        self, context: Context, params: Params | None, cache: Any, batch: StepBatch, hidden: jax.Array | None
    ) -> Any:
        """Write what it keeps of a step's tokens.

        Args:
            hidden: [T, h], what the model made of them, if it takes that.
        """

    def look(self, asked: Asked) -> tuple[jax.Array, jax.Array]:
        """See `Drafter.look`; what is found are the counts."""
        counts = jnp.clip(jnp.minimum(asked.most, self.max_length - 1 - asked.positions), 0, self.num_drafts)
        counts = jnp.where(asked.going_on, counts, 0)
        return counts, counts


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

    def write(self, asked: Asked, cache: Any, found: jax.Array, counts: jax.Array) -> Written:
        """What `look` has found."""
        return Written(cache, found)

    def settle(self, asked: Asked, cache: Any, checked: Checked) -> Any:
        """It learns nothing."""
        return cache


def columns_of(
    attention: AttentionBatch, position: jax.Array, going_on: jax.Array, counts: jax.Array, width: int
) -> AttentionBatch:
    """The batch of steps in which every sequence has `width` tokens, of which the first and `counts` behind it count.

    Args:
        position: i32 [S], of the first.
    """
    seqs = position.shape[0]
    lane = jnp.arange(width, dtype=jnp.int32)
    return dataclasses.replace(
        attention,
        token_seq=jnp.repeat(jnp.arange(seqs, dtype=jnp.int32), width),
        positions=(position[:, None] + lane).reshape(-1),
        token_valid=(going_on[:, None] & (lane <= counts[:, None])).reshape(-1),
        query_start=jnp.arange(seqs + 1, dtype=jnp.int32) * width,
        kv_lens=position + width,
        num_decodes=jnp.int32(0),
        decode_only=False,
        longest=width,
    )
