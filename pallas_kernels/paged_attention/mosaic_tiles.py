"""What a block of threads computes in `mosaic_prefill`: its shape, and which queries of a step are its own."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.batch import AttentionBatch, Layout

#: of one tile of queries: tokens times the heads that share a key
ROWS = 128
#: a row of swizzled shared memory has 64 numbers, and two warpgroups' registers hold results of 256
HEAD_DIMS = (64, 128, 256)
# what a block of threads is told of its tile
(ROW, SEQUENCE, FIRST, LAST, WHOLE_FROM, WHOLE_TO, WRITTEN_FROM, WRITTEN_TO) = range(8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """What one compiled kernel is for."""

    head_dim: int
    block_size: int
    kv_heads: int
    #: heads that share a key
    group: int
    #: of a block table
    width: int
    dtype: Any
    scale: float
    softcap: float | None
    has_sinks: bool
    interpret: bool

    @property
    def tokens(self) -> int:
        """of one tile of queries"""
        return ROWS // self.group

    @property
    def keys(self) -> int:
        """of one tile"""
        return _keys(self.head_dim)

    @property
    def registers(self) -> tuple[int, int]:
        """of a thread that computes, and of one that fetches: twice the one and the other are the 512 that there are"""
        return (224, 64) if self.head_dim <= 128 else (232, 48)

    @property
    def rows_per_copy(self) -> int:
        return min(self.block_size, self.keys)

    @property
    def copies(self) -> int:
        """that bring one tile of keys"""
        return self.keys // self.rows_per_copy


def _keys(head_dim: int) -> int:
    """What a thread's registers and shared memory hold of scores, keys and values beside its results."""
    return 128 if head_dim <= 128 else 64


def num_tiles(tokens: int, seqs: int, group: int) -> int:
    """Tiles that hold any `tokens` of `seqs` sequences, each of which has one that is not full at most."""
    return tokens // (ROWS // group) + min(seqs, tokens)


def why_not(
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    query_dtype: Any,
    cache_dtype: Any,
    scale: float = 1.0,
) -> str | None:
    """Why `mosaic_prefill` does not compute attention of such queries and pages; None: it does."""
    dtypes = jnp.dtype(query_dtype), jnp.dtype(cache_dtype)
    if dtypes[0] != dtypes[1] or dtypes[0] not in (jnp.bfloat16, jnp.float16):
        return f"queries of {dtypes[0]} and pages of {dtypes[1]} are not both bfloat16 or both float16"
    if head_dim not in HEAD_DIMS:
        return f"head_dim {head_dim} is none of {HEAD_DIMS}"
    if heads // kv_heads > ROWS:
        return f"{heads // kv_heads} heads share a key, more than a tile's {ROWS} rows"
    keys = _keys(head_dim)
    if block_size % 8 or max(keys, block_size) % min(keys, block_size):
        return f"block_size {block_size} is no multiple of 8 that divides {keys} or is a multiple of it"
    if scale <= 0:
        return f"scale {scale} is not positive"
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """A step's runs of queries, one a tile."""

    info: jax.Array  # i32 [tiles, 8]
    seen_from: jax.Array  # i32 [tiles, ROWS] first position that a row sees
    seen_to: jax.Array  # i32 [tiles, ROWS] first position after those that a row sees
    tile_of_token: jax.Array  # i32 [T]
    place_of_token: jax.Array  # i32 [T] in its tile

    @classmethod
    def of(cls, batch: AttentionBatch, layout: Layout, *, causal: bool, shape: Shape) -> Tiles:
        tokens, seqs = batch.token_seq.shape[0], batch.kv_lens.shape[0]
        length, keys = shape.tokens, shape.keys
        seq = jnp.arange(seqs, dtype=jnp.int32)
        prefill = (seq >= batch.num_decodes) & (seq < batch.num_seqs)
        runs = jnp.where(prefill, _cdiv(jnp.diff(batch.query_start), length), 0)
        ends = jnp.cumsum(runs)
        tile = jnp.arange(num_tiles(tokens, seqs, shape.group), dtype=jnp.int32)
        row = jnp.minimum(jnp.searchsorted(ends, tile, side="right").astype(jnp.int32), seqs - 1)
        active = tile < ends[-1]
        first = batch.query_start[row] + (tile - (ends[row] - runs[row])) * length
        lane = jnp.minimum(jnp.arange(ROWS, dtype=jnp.int32) // shape.group, length - 1)
        # rows after the sequence's last token do as it does
        token = jnp.minimum(first[:, None] + lane, batch.query_start[row + 1][:, None] - 1)
        token = jnp.clip(token, 0, tokens - 1)
        position = batch.positions[token]
        seen_from = jnp.maximum(position - layout.window + 1, layout.first)
        seen_to = position + 1 if batch.seen_to is None else batch.seen_to[token]
        if not causal:
            seen_to = jnp.broadcast_to(batch.kv_lens[row][:, None], position.shape)
        lowest, highest = jnp.min(seen_from, axis=1), jnp.max(seen_to, axis=1)
        columns = {
            ROW: first * shape.group,
            SEQUENCE: row,
            FIRST: lowest // keys,
            LAST: _cdiv(highest, keys),
            WHOLE_FROM: _cdiv(jnp.max(seen_from, axis=1), keys),
            WHOLE_TO: jnp.min(seen_to, axis=1) // keys,
            WRITTEN_FROM: lowest,
            WRITTEN_TO: batch.kv_lens[row],
        }
        info = jnp.where(active[:, None], jnp.stack([columns[i] for i in range(len(columns))], axis=1), 0)
        place = jnp.arange(tokens, dtype=jnp.int32) - batch.query_start[batch.token_seq]
        of_token = (ends - runs)[batch.token_seq] + place // length
        return cls(
            info=info.astype(jnp.int32),
            seen_from=seen_from,
            seen_to=seen_to,
            tile_of_token=jnp.clip(of_token, 0, tile.shape[0] - 1),
            place_of_token=place % length,
        )


def _cdiv(a: jax.Array, b: int) -> jax.Array:
    return (a + (b - 1)) // b
