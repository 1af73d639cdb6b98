"""Paged attention over a ragged batch: what the models call, and its plain XLA implementation.

The cache is one array for all layers, ``[layers_per_group * num_blocks, 2, kv_heads, block_size, head_dim]``: a page
holds keys, then values, head-major, so that one page row of one head is contiguous and gathers straight into ``[..,
kv_heads, positions, head_dim]``. A layer's pages are at ``layer * num_blocks + block id``. Page 0 is trash: padding
tokens write there and it is never read.

The XLA implementation runs in tiles. A tile is a block of sequences with one query each (decode) or a block of runs
of consecutive queries (chunks and prompts); it walks the context in pieces with a running softmax (Milakov and
Gimelshein 2018, arXiv:1805.02867), and both loops have true, data-dependent lengths: neither padding tokens nor the
padded width of the block table costs anything.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.layers.linear import matmul_precision

#: pages hold bf16 as uint16 on CPU: XLA:CPU's bf16 scatter converts the whole cache
STORAGE = {jnp.dtype(jnp.bfloat16): jnp.uint16}

DECODE_ROWS = 8
PREFILL_QUERIES = 32
PREFILL_ROWS = 4
CONTEXT = 128  # positions of one piece of context; a multiple of every block size up to itself
NEVER = -1e30  # a masked score: finite, so that a fully masked row stays free of NaN


@flax.struct.dataclass
class AttentionBatch:
    """Where each token of a step belongs. T: token bucket, S: sequence bucket, G: KV-cache groups, W: table width.

    Sequences with one query token come first, in the order of their tokens: for i < num_decodes token i belongs to
    sequence i.
    """

    token_seq: jax.Array  # i32 [T] sequence of each token; padding: 0
    positions: jax.Array  # i32 [T] position in its sequence; padding: 0
    token_valid: jax.Array  # bool [T]
    query_start: jax.Array  # i32 [S + 1] first token of each sequence
    kv_lens: jax.Array  # i32 [S] tokens in the cache after this step; padding: 0
    block_tables: jax.Array  # i32 [G, S, W]
    num_decodes: jax.Array  # i32 []
    num_seqs: jax.Array  # i32 []
    #: i32 [S] position at which each sequence's second segment begins (BERT's token types); None: there is only one
    segment_starts: jax.Array | None = None


@flax.struct.dataclass
class Layout:
    """Where one layer's keys and values are. Traced, so that one compiled layer serves all."""

    group: jax.Array  # i32 [] which block table
    page_offset: jax.Array  # i32 [] layer's first page
    window: jax.Array  # i32 [] positions a query sees, itself included


def write_kv(cache: jax.Array, key: jax.Array, value: jax.Array, layout: Layout, batch: AttentionBatch) -> jax.Array:
    """Write this step's keys and values [T, kv_heads, head_dim] into their pages; in place, as the cache is donated."""
    pages, _, heads, block_size, dim = cache.shape
    tokens = key.shape[0]
    block = batch.block_tables[layout.group, batch.token_seq, batch.positions // block_size]
    page = jnp.where(batch.token_valid, block + layout.page_offset, 0)
    head = jnp.arange(2 * heads, dtype=jnp.int32)
    rows = (page[:, None] * (2 * heads) + head) * block_size + (batch.positions % block_size)[:, None]
    new = _store(jnp.concatenate([key, value], axis=1), cache.dtype)
    flat = cache.reshape(pages * 2 * heads * block_size, dim)
    flat = flat.at[rows.reshape(-1)].set(new.reshape(tokens * 2 * heads, dim), mode="promise_in_bounds")
    return flat.reshape(cache.shape)


def attention(
    query: jax.Array,
    cache: jax.Array,
    layout: Layout,
    batch: AttentionBatch,
    *,
    scale: float,
    softcap: float | None = None,
    causal: bool = True,
) -> jax.Array:
    """Attention of every query token over its sequence's pages (this step's keys and values included).

    Args:
        query: [T, heads, head_dim]; heads is a multiple of the cache's kv_heads.
        cache: see the module's docstring.
        scale: factor on the scores.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        causal: a token sees itself and those before it; otherwise the whole sequence, which this step must complete.

    Returns:
        [T, heads, head_dim] in query's dtype; rows of padding tokens hold anything finite.
    """
    tokens, heads, dim = query.shape
    kv_heads = cache.shape[2]
    out = jnp.zeros((tokens, heads, dim), query.dtype)
    grouped = query.reshape(tokens, kv_heads, heads // kv_heads, dim)
    args = (cache, layout, batch, scale, softcap, causal)
    return _prefill_tiles(grouped, _decode_tiles(grouped, out, *args), *args)


def _decode_tiles(query, out, cache, layout, batch, *how):
    seqs = batch.kv_lens.shape[0]
    rows = min(DECODE_ROWS, seqs)
    lane = jnp.arange(rows, dtype=jnp.int32)

    def tile(i, out):
        row = jnp.minimum(i * rows, seqs - rows) + lane
        active = row < batch.num_decodes
        attended = _attend(query[row][:, None], batch.positions[row][:, None], row, active, cache, layout, batch, *how)
        return out.at[jnp.where(active, row, out.shape[0])].set(attended.reshape(rows, *out.shape[1:]), mode="drop")

    return lax.fori_loop(0, cdiv(batch.num_decodes, rows), tile, out)


def _prefill_tiles(query, out, cache, layout, batch, *how):
    tokens, seqs = query.shape[0], batch.kv_lens.shape[0]
    if tokens < 2:
        return out
    length = min(PREFILL_QUERIES, tokens)
    # runs of `length` queries, numbered through the sequences that are not decodes
    seq = jnp.arange(seqs, dtype=jnp.int32)
    prefill = (seq >= batch.num_decodes) & (seq < batch.num_seqs)
    runs = jnp.where(prefill, cdiv(jnp.diff(batch.query_start), length), 0)
    ends = jnp.cumsum(runs)
    lane = jnp.arange(PREFILL_ROWS, dtype=jnp.int32)

    def tile(i, out):
        run = i * PREFILL_ROWS + lane
        row = jnp.minimum(jnp.searchsorted(ends, run, side="right").astype(jnp.int32), seqs - 1)
        active = run < ends[-1]
        first = batch.query_start[row] + (run - (ends[row] - runs[row])) * length
        token = first[:, None] + jnp.arange(length, dtype=jnp.int32)
        valid = active[:, None] & (token < batch.query_start[row + 1][:, None])
        token = jnp.clip(token, 0, tokens - 1)
        position = jnp.where(valid, batch.positions[token], batch.positions[token[:, :1]])
        attended = _attend(query[token], position, row, active, cache, layout, batch, *how)
        target = jnp.where(valid, token, tokens).reshape(-1)
        return out.at[target].set(attended.reshape(-1, *out.shape[1:]), mode="drop")

    return lax.fori_loop(0, cdiv(ends[-1], PREFILL_ROWS), tile, out)


def _attend(query, position, row, active, cache, layout, batch, scale, softcap, causal):
    """Attention of one tile: query [B, Q, kv_heads, G, D], position [B, Q], row [B] -> [B, Q, kv_heads * G * D]."""
    blocks, length, kv_heads, groups, dim = query.shape
    pages, _, _, block_size, _ = cache.shape
    context = max(CONTEXT, block_size)
    width = context // block_size
    flat = cache.reshape(pages * 2 * kv_heads, block_size * dim)
    table = batch.block_tables[layout.group]
    compute = jnp.float32 if cache.dtype == jnp.uint16 else cache.dtype
    q = jnp.swapaxes(query, 1, 2).reshape(blocks, kv_heads, length * groups, dim).astype(compute)
    seen_from = jnp.maximum(position - layout.window + 1, 0)  # [B, Q]
    first = jnp.min(jnp.where(active, seen_from[:, 0], jnp.iinfo(jnp.int32).max)) // context
    seen_to = position + 1 if causal else jnp.broadcast_to(batch.kv_lens[row][:, None], position.shape)  # [B, Q]
    last = cdiv(jnp.max(jnp.where(active[:, None], seen_to, 0)), context)
    head = jnp.arange(kv_heads, dtype=jnp.int32)[None, :, None]
    precision = matmul_precision(compute)

    def piece(c, state):
        maximum, total, accumulated = state
        column = jnp.minimum(c * width + jnp.arange(width, dtype=jnp.int32), table.shape[1] - 1)
        page = table[row[:, None], column] + layout.page_offset  # [B, width]
        index = page[:, None, :] * (2 * kv_heads) + head
        k = _load(flat[index], compute).reshape(blocks, kv_heads, context, dim)
        v = _load(flat[index + kv_heads], compute).reshape(blocks, kv_heads, context, dim)
        at = c * context + jnp.arange(context, dtype=jnp.int32)
        visible = (at < seen_to[..., None]) & (at >= seen_from[..., None])  # [B, Q, context]
        # a weight of zero does not silence a NaN that a page's former owner left behind
        written = (at < jnp.max(seen_to, axis=1, keepdims=True)) & (at >= jnp.min(seen_from, axis=1, keepdims=True))
        v = jnp.where(written[:, None, :, None], v, 0)
        scores = jnp.einsum("bkqd,bkcd->bkqc", q, k, precision=precision, preferred_element_type=jnp.float32) * scale
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        visible = jnp.broadcast_to(visible[:, None, :, None], (blocks, 1, length, groups, context)).reshape(
            blocks, 1, length * groups, context
        )
        scores = jnp.where(visible, scores, NEVER)
        new_maximum = jnp.maximum(maximum, jnp.max(scores, axis=-1, keepdims=True))
        weights = jnp.exp(scores - new_maximum)
        keep = jnp.exp(maximum - new_maximum)
        added = jnp.einsum(
            "bkqc,bkcd->bkqd", weights.astype(compute), v, precision=precision, preferred_element_type=jnp.float32
        )
        return new_maximum, total * keep + jnp.sum(weights, axis=-1, keepdims=True), accumulated * keep + added

    shape = (blocks, kv_heads, length * groups)
    state = (jnp.full((*shape, 1), NEVER), jnp.zeros((*shape, 1)), jnp.zeros((*shape, dim)))
    _, total, accumulated = lax.fori_loop(first, last, piece, state)
    attended = (accumulated / jnp.maximum(total, 1e-30)).astype(query.dtype)
    return jnp.swapaxes(attended.reshape(blocks, kv_heads, length, groups, dim), 1, 2)


def _store(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16) if dtype == jnp.uint16 else x.astype(dtype)


def _load(x: jax.Array, compute: jnp.dtype) -> jax.Array:
    if x.dtype == jnp.uint16:  # bf16 is the upper half of a float32
        return lax.bitcast_convert_type(x.astype(jnp.uint32) << 16, jnp.float32)
    return x.astype(compute)


def cdiv(a, b: int):
    return (a + (b - 1)) // b
