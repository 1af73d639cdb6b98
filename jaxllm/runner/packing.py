"""One int32 buffer carries all that a step needs to know: a launch costs per argument, and an upload per array.

It holds `forward_fields`, then those of the runner's head. Floats travel as their bits. `Packing` knows the offsets of
the fields, on the host and inside the compiled program.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm.layers.context import StepBatch
from jaxllm.runner.buckets import Bucket
from pallas_kernels.batch import AttentionBatch


class Field(NamedTuple):
    """Where a field lies in the buffer, in words."""

    start: int
    stop: int
    shape: tuple[int, ...]
    is_float: bool


class Views(Mapping[str, np.ndarray]):
    """Views into a host buffer, made when they are first asked for: most steps set few of the fields."""

    def __init__(self, buffer: np.ndarray, fields: Mapping[str, Field]):
        self._buffer, self._fields = buffer, fields
        self._views: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        view = self._views.get(name)
        if view is None:
            field = self._fields[name]
            view = self._buffer[field.start : field.stop]
            if len(field.shape) != 1:
                view = view.reshape(field.shape)
            self._views[name] = view = view.view(np.float32) if field.is_float else view
        return view

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def together(self, names: Sequence[str]) -> np.ndarray:
        """Fields that follow each other and have one length as rows of one array, int32 [len(names), length]."""
        first, last = self._fields[names[0]], self._fields[names[-1]]
        return self._buffer[first.start : last.stop].reshape(len(names), *first.shape)


class Packing:
    """Named fields of one int32 buffer.

    Args:
        shapes: name -> shape, in the order of the buffer.
        floats: names of the fields that are float32; the others are int32.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], floats: Collection[str] = ()):
        self._fields: dict[str, Field] = {}
        #: int32 words of the buffer
        self.size = 0
        for name, shape in shapes.items():
            start, self.size = self.size, self.size + math.prod(shape)
            self._fields[name] = Field(start, self.size, shape, name in floats)

    def views(self, buffer: np.ndarray) -> Views:
        """The fields of a host buffer int32 [size]."""
        return Views(buffer, self._fields)

    def unpack(self, buffer: jax.Array) -> dict[str, jax.Array]:
        """The fields of a device buffer, inside jit."""
        fields = {}
        for name, (start, stop, shape, is_float) in self._fields.items():
            field = buffer[start:stop].reshape(shape)
            fields[name] = lax.bitcast_convert_type(field, np.float32) if is_float else field
        return fields


class MediaFields(NamedTuple):
    """What steps bring of prompts' pictures."""

    #: whether tokens have positions of three axes, and whether those of a picture see each other
    has_axes: bool
    has_spans: bool


def forward_fields(
    bucket: Bucket, num_groups: int, table_width: int, *, media: MediaFields | None = None
) -> dict[str, tuple[int, ...]]:
    """What every forward pass reads. The T tokens and S sequences of the bucket, G KV-cache groups, W blocks a table
    row.

    Args:
        media: what of pictures; None: there are none.
    """
    tokens, seqs = bucket.tokens, bucket.seqs
    own: dict[str, tuple[int, ...]] = {}
    if media is not None:
        # tokens: row of the cache of encoded items, 0: a token of the vocabulary; positions of three axes, less
        # `positions`; the first position behind a token's picture, 0: it is in none
        own["encoded_rows"] = (tokens,)
        if media.has_axes:
            own["rope_offsets"] = (3, tokens)
        if media.has_spans:
            own["picture_ends"] = (tokens,)
    if bucket.adapters:
        # tokens: the slot of each one's adapter, -1: it has none
        own["adapter_slots"] = (tokens,)
    return {
        "num_decodes": (),
        "num_seqs": (),
        # tokens: id (-1: sampled by an earlier step), position, sequence
        "token_ids": (tokens,),
        "positions": (tokens,),
        "token_seq": (tokens,),
        # sequences: their row, first token, context length
        "rows": (seqs,),
        "query_start": (seqs + 1,),
        "kv_lens": (seqs,),
        "block_tables": (num_groups, seqs, table_width),
        **own,
    }


def attention_batch(fields: dict[str, jax.Array], bucket: Bucket) -> AttentionBatch:
    """What attention must know, of `forward_fields` inside the compiled program."""
    token = jnp.arange(bucket.tokens, dtype=jnp.int32)
    return AttentionBatch(
        token_seq=fields["token_seq"],
        positions=fields["positions"],
        token_valid=token < fields["query_start"][-1],
        query_start=fields["query_start"],
        kv_lens=fields["kv_lens"],
        block_tables=fields["block_tables"],
        num_decodes=fields["num_decodes"],
        num_seqs=fields["num_seqs"],
        decode_only=bucket.decode_only,
    )


def step_attention(fields: dict[str, jax.Array], bucket: Bucket) -> AttentionBatch:
    """`attention_batch` of a step that may compute prompts, where the tokens of a picture may see each other."""
    attention = attention_batch(fields, bucket)
    if "picture_ends" not in fields or bucket.decode_only:
        return attention
    return dataclasses.replace(attention, seen_to=jnp.maximum(fields["picture_ends"], attention.positions + 1))


def with_pictures(batch: StepBatch, fields: dict[str, jax.Array], encoded: jax.Array | None) -> StepBatch:
    """A step's batch with what its fields say of pictures.

    Args:
        encoded: [1 + C, d], the vectors of encoded items; None: the step's tokens have none, or others put them in.
    """
    if encoded is not None:
        rows = fields["encoded_rows"]
        batch = dataclasses.replace(batch, embedded=rows > 0, embeddings=encoded[rows])
    if "rope_offsets" in fields:
        attention = batch.attention
        assert isinstance(attention, AttentionBatch)
        batch = dataclasses.replace(batch, rope_positions=attention.positions + fields["rope_offsets"])
    return batch
