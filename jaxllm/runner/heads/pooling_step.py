"""The compiled step of a pooling engine: tokens in, keys and values written, one vector a sequence out."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.api.pooler import Pooler
from jaxllm.config.cache import KVCacheGroup
from jaxllm.engine.step import EMBEDDED
from jaxllm.layers.attention import Cache
from jaxllm.layers.context import Context, StepBatch
from jaxllm.models.adapters import with_slots
from jaxllm.models.bert import BertConfig
from jaxllm.models.model import ModelConfig, forward
from jaxllm.models.pooler import Dense, Head, PoolingModel, finish
from jaxllm.runner.buckets import Bucket
from jaxllm.runner.packing import MediaFields, Packing, forward_fields, step_attention, with_pictures

#: sequences, and tokens of each, that one round of a sum takes
SUM_ROWS = 8
SUM_TOKENS = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolingStepConfig:
    """What a step is compiled for, besides its bucket."""

    model: ModelConfig
    groups: tuple[KVCacheGroup, ...]
    pooler: Pooler
    context: Context = Context()
    #: whether steps bring vectors of prompts
    prompt_embeds: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PoolingState:
    """What stays on the device between steps; donated to every step. R = max_num_seqs."""

    cache: Cache  # of all layers
    #: f32 [R + 1, d]: the first token's state (CLS), or the sum so far (MEAN), of each row; the last row is trash.
    #: None with LAST, which needs nothing of earlier chunks
    pooled: jax.Array | None
    #: [1 + C, d], as `sampling_step.State.encoded`
    encoded: jax.Array | None = None


def pooling_packing(bucket: Bucket, num_groups: int, table_width: int, *, media: MediaFields | None = None) -> Packing:
    """What `pooling_step` reads: `forward_fields`, and some of each sequence.

    Those are the components of its embedding, whether to normalise or activate, and where its second segment begins.
    """
    per_seq = dict.fromkeys(("dimensions", "activate", "segment_starts"), (bucket.seqs,))
    return Packing({**forward_fields(bucket, num_groups, table_width, media=media), **per_seq})


def pooling_step(
    config: PoolingStepConfig,
    bucket: Bucket,
    packing: Packing,
    params: PoolingModel,
    state: PoolingState,
    buffer: jax.Array,
    embeddings: jax.Array | None = None,
) -> tuple[PoolingState, jax.Array, jax.Array]:
    """Compute the scheduled tokens and pool every sequence, as far as it has come.

    Args:
        config, bucket, packing: static.
        buffer: int32, `pooling_packing`'s fields.
        embeddings: [T, d], of the tokens whose id is `EMBEDDED`, where the engine takes such prompts.

    Returns:
        (state, results, hidden): results f32 [S, `output_size`], of use where the step holds a sequence's last token;
        hidden [T, d] of all tokens, for `token_step`.
    """
    fields = packing.unpack(buffer)
    if bucket.adapters:
        params = with_slots(params, fields["adapter_slots"], config.context.backend)
    has_segments = isinstance(config.model, BertConfig) and config.model.has_segments
    batch = StepBatch(
        tokens=fields["token_ids"],
        attention=step_attention(fields, bucket),
        embeddings=embeddings,
        embedded=None if embeddings is None else fields["token_ids"] == EMBEDDED,
        segment_starts=fields["segment_starts"] if has_segments else None,
    )
    batch = with_pictures(batch, fields, state.encoded)
    cache, hidden = forward(config.context, config.model, config.groups, params.body, state.cache, batch)
    pooled, kept = _pool(config.pooler.seq_pooling_type, hidden, state.pooled, fields)
    results = finish(config.context, config.pooler, params.head, pooled, fields["dimensions"], fields["activate"] != 0)
    return dataclasses.replace(state, cache=cache, pooled=kept), results, hidden


def token_step(
    config: PoolingStepConfig,
    packing: Packing,
    head: Head | tuple[Dense, ...] | None,
    hidden: jax.Array,
    buffer: jax.Array,
) -> jax.Array:
    """Results of every token by itself, f32 [T, `output_size`], of the step's hidden [T, d]."""
    fields = packing.unpack(buffer)
    seq = fields["token_seq"]
    return finish(
        config.context,
        config.pooler,
        head,
        hidden.astype(jnp.float32),
        fields["dimensions"][seq],
        fields["activate"][seq] != 0,
    )


def _pool(kind: str, hidden: jax.Array, kept: jax.Array | None, fields) -> tuple[jax.Array, jax.Array | None]:
    """The pooled state of each sequence so far, f32 [S, d], and what is kept of it by row."""
    ends, lengths = fields["query_start"], fields["kv_lens"]
    if kind == "LAST" or kept is None:
        return hidden[ends[1:] - 1].astype(jnp.float32), None
    seqs, trash = lengths.shape[0], kept.shape[0] - 1
    row = jnp.where(jnp.arange(seqs, dtype=jnp.int32) < fields["num_seqs"], fields["rows"], trash)
    begins = (lengths == jnp.diff(ends))[:, None]
    if kind == "CLS":
        first = hidden[jnp.minimum(ends[:-1], hidden.shape[0] - 1)].astype(jnp.float32)
        pooled = jnp.where(begins, first, kept[row])
        return pooled, kept.at[row].set(pooled)
    total = add_tokens(hidden, jnp.where(begins, 0.0, kept[row]), ends, fields["num_seqs"])
    return total / jnp.maximum(lengths, 1)[:, None].astype(jnp.float32), kept.at[row].set(total)


def add_tokens(hidden: jax.Array, sums: jax.Array, query_start: jax.Array, num_seqs: jax.Array) -> jax.Array:
    """Add each sequence's hidden states [T, d] to its sum f32 [S, d], one token after the other.

    In the order of the tokens and with nothing in between, so that a sum has the same bits in any batch and in any
    chunks.

    Args:
        query_start: i32 [S + 1] first token of each sequence.
        num_seqs: i32 [], sequences that count.
    """
    tokens, seqs = hidden.shape[0], sums.shape[0]
    rows = min(SUM_ROWS, seqs)
    lane = jnp.arange(rows, dtype=jnp.int32)
    column = jnp.arange(SUM_TOKENS, dtype=jnp.int32)

    def tile(i, out):
        row = jnp.minimum(i * rows, seqs - rows) + lane
        first = query_start[row]
        count = query_start[row + 1] - first

        def piece(j, acc):
            at = j * SUM_TOKENS + column
            x = hidden[jnp.clip(first[:, None] + at, 0, tokens - 1)].astype(jnp.float32)
            valid = at < count[:, None]
            for k in range(SUM_TOKENS):
                acc = jnp.where(valid[:, k, None], acc + x[:, k], acc)
            return acc

        return out.at[row].set(lax.fori_loop(0, _cdiv(jnp.max(count), SUM_TOKENS), piece, sums[row]))

    return lax.fori_loop(0, _cdiv(num_seqs, rows), tile, sums)


def _cdiv(a: jax.Array, b: int) -> jax.Array:
    return (a + (b - 1)) // b
