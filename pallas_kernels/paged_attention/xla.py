"""Paged attention in plain XLA, in tiles. A tile is a block of sequences with one query each (decode) or a block of
runs of consecutive queries (chunks and prompts); it walks the context in pieces with a running softmax (Milakov and
Gimelshein 2018, arXiv:1805.02867), and both loops have true, data-dependent lengths: neither padding tokens nor the
padded width of the block table costs anything. A tile walks as far as its longest context: decodes are fastest when the
batch has them in order of length.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.batch import AttentionBatch, Layout
from pallas_kernels.fixed_order import row_sum
from pallas_kernels.paged_attention import cpu_ffi
from pallas_kernels.storage import compute_dtype, from_storage

#: sequences of a tile that has one query of each: more overflow a core's cache with what a piece widens to float32
DECODE_ROWS = 8
#: and of the tiles for the last ones, where no more than LAST_SEQS are left: rows of padding cost what others do
LAST_ROWS, LAST_SEQS = 2, 4
#: most sequences of a batch that has such tiles: with more they save less, and take as long to compile
LAST_TILES_SEQS = 8
#: most positions of one piece of context, but that a piece has at least one page
DECODE_CONTEXT = 64
#: (consecutive queries of a run, runs of a tile, positions of a piece) of chunks and prompts: as many runs of each kind
#: as there are, then of the next. XLA:CPU's products are fastest where both are long; what is too long is wasted
RUNS = ((256, 1, 256), (128, 1, 128), (32, 4, 64))
#: positions of a piece where a query's bits must not depend on what kind of tile it is in
DETERMINISTIC_CONTEXT = 128
NEVER = -1e30  # a masked score: finite, so that a fully masked row stays free of NaN


def paged_attention(
    query: jax.Array,
    cache: jax.Array,
    layout: Layout,
    batch: AttentionBatch,
    *,
    scale: float,
    softcap: float | None = None,
    causal: bool = True,
    sinks: jax.Array | None = None,
    kv_scales: jax.Array | None = None,
    value_width: int | None = None,
) -> jax.Array:
    """As `reference.paged_attention`; with `value_width` as `paged_latent_attention.reference`."""
    tokens, heads, dim = query.shape
    kv_heads = cache.shape[1] // 2 if value_width is None else 1
    grouped = query.reshape(tokens, kv_heads, heads // kv_heads, dim)
    args = (cache, layout, batch, scale, softcap, causal, sinks, kv_scales, value_width)
    kernel = None
    if causal and not batch.backend.deterministic:
        kernel = cpu_ffi.kernel_for(query, cache, batch, softcap=softcap, value_width=value_width)
    if kernel is None:
        done = 1
        out = _decode_tiles(grouped, heads * (value_width or dim), *args)
    else:
        done = cpu_ffi.most_queries(kernel[1], batch)
        out = cpu_ffi.attention(
            kernel, query, cache, layout, batch, scale=scale, softcap=softcap, sinks=sinks, kv_scales=kv_scales
        ).reshape(tokens, -1)
    longest = 1 if batch.decode_only else min(batch.longest or tokens, tokens)
    if longest > done:
        out = _prefill_tiles(grouped, out, done, *args)
    return out.reshape(tokens, heads, -1).astype(query.dtype)


def _decode_tiles(query, width, cache, layout, batch, *how):
    """Of each sequence's first `num_decodes` tokens, float32 [T, width]; the other rows are finite."""
    tokens = query.shape[0]
    seqs = batch.kv_lens.shape[0]
    most = min(DECODE_ROWS, seqs)
    # a product of a single row is computed by another kernel, which adds up in another order
    queries = 2 if batch.backend.deterministic and query.shape[2] == 1 else 1

    def tiles(rows, first, out, left_over):
        """Tiles of so many rows, from sequence `first` on, until at most `left_over` sequences are left."""

        def tile(i, out):
            begin = first + i * rows
            nth = begin + jnp.arange(rows, dtype=jnp.int32)
            row, active = jnp.minimum(nth, seqs - 1), nth < batch.num_decodes
            position = jnp.broadcast_to(batch.positions[row][:, None], (rows, queries))
            asked = jnp.pad(query[row][:, None], ((0, 0), (0, queries - 1), (0, 0), (0, 0), (0, 0)))
            attended = _attend(DECODE_CONTEXT, asked, position, position + 1, row, active, cache, layout, batch, *how)
            attended = attended[:, 0]
            attended = jnp.where(active[:, None], attended.reshape(rows, width), 0)
            return lax.dynamic_update_slice(out, attended, (begin, 0))

        count = _cdiv(jnp.maximum(batch.num_decodes - first - left_over, 0), rows)
        return first + count * rows, lax.fori_loop(0, count, tile, out)

    left_over = LAST_SEQS if LAST_SEQS < seqs <= LAST_TILES_SEQS else 0
    first, out = tiles(most, 0, jnp.zeros((-(-seqs // most) * most, width)), left_over)
    if left_over:
        _, out = tiles(LAST_ROWS, first, out, 0)
    out = out[:tokens]
    return jnp.pad(out, ((0, tokens - out.shape[0]), (0, 0)))


def _prefill_tiles(query, out, done, cache, layout, batch, *how):
    """Write the rows of chunks and prompts of more than `done` tokens into `out`."""
    tokens, seqs = query.shape[0], batch.kv_lens.shape[0]
    seq, count = jnp.arange(seqs, dtype=jnp.int32), jnp.diff(batch.query_start)
    prefill = (seq >= batch.num_decodes) & (seq < batch.num_seqs) & (count > done)
    first, rest = batch.query_start[:-1], jnp.where(prefill, count, 0)
    args = (cache, layout, batch, *how)
    for length, rows, context in RUNS[:-1]:
        if tokens >= length:
            runs = _div(rest + length // 4, length)  # the last one may lack a quarter
            out = _run_tiles(query, out, length, rows, context, first, rest, runs, *args)
            first, rest = first + runs * length, jnp.maximum(rest - runs * length, 0)
    length, rows, context = RUNS[-1]
    length = min(length, tokens)
    return _run_tiles(query, out, length, rows, context, first, rest, _cdiv(rest, length), *args)


def _run_tiles(query, out, length, rows, context, first, rest, runs, cache, layout, batch, *how):
    """Of each sequence `runs` [S] runs of `length` queries, from token `first` [S] on; it has `rest` [S] tokens."""
    tokens, seqs = query.shape[0], first.shape[0]
    ends = jnp.cumsum(runs)
    lane = jnp.arange(rows, dtype=jnp.int32)

    def tile(i, out):
        run = i * rows + lane
        # not searchsorted: a loop of its own in every tile, for a few hundred numbers
        row = jnp.minimum(jnp.sum(ends <= run[:, None], axis=1, dtype=jnp.int32), seqs - 1)
        active = run < ends[-1]
        begin = first[row] + (run - (ends[row] - runs[row])) * length
        token = begin[:, None] + jnp.arange(length, dtype=jnp.int32)
        valid = active[:, None] & (token < (first + rest)[row][:, None])
        token = jnp.clip(token, 0, tokens - 1)
        position = jnp.where(valid, batch.positions[token], batch.positions[token[:, :1]])
        seen_to = position + 1
        if batch.seen_to is not None:
            seen_to = jnp.where(valid, batch.seen_to[token], seen_to)
        attended = _attend(context, query[token], position, seen_to, row, active, cache, layout, batch, *how)
        target = jnp.where(valid, token, tokens).reshape(-1)
        return out.at[target].set(attended.reshape(-1, out.shape[1]), mode="drop")

    return lax.fori_loop(0, _cdiv(ends[-1], rows), tile, out)


def _attend(
    context,
    query,
    position,
    seen_to,
    row,
    active,
    cache,
    layout,
    batch,
    scale,
    softcap,
    causal,
    sinks,
    kv_scales,
    value_width,
):
    """Attention of one tile: query [B, Q, kv_heads, G, D], position and seen_to [B, Q], row [B] -> [B, Q, kv_heads, G,
    numbers of a value] in float32.

    Args:
        seen_to: the first position that each query no longer sees, if `causal`.
    """
    blocks, length, kv_heads, groups, dim = query.shape
    pages, block_size = cache.shape[0], cache.shape[-2]
    # each head's keys, then its values; or latents alone
    parts = (2 if value_width is None else 1) * kv_heads
    if batch.backend.deterministic:
        context = DETERMINISTIC_CONTEXT
    width = max(context // block_size, 1)
    context = width * block_size
    flat = cache.reshape(pages * parts, block_size * dim)
    table = batch.block_tables[layout.group]
    scales = None if kv_scales is None else kv_scales.reshape(pages * parts, block_size)
    compute = compute_dtype(cache.dtype)
    narrow = cache.dtype == jnp.uint16 and query.dtype == jnp.bfloat16
    if narrow and length > 1 and not batch.backend.deterministic:
        # of many rows, XLA:CPU's products of bf16 take half the time (of few, they take longer)
        compute = jnp.dtype(jnp.bfloat16)
    q = jnp.swapaxes(query, 1, 2).reshape(blocks, kv_heads, length * groups, dim).astype(compute)
    seen_from = jnp.maximum(position - layout.window + 1, layout.first)  # [B, Q]
    first = _div(jnp.min(jnp.where(active, seen_from[:, 0], jnp.iinfo(jnp.int32).max)), context)
    if not causal:
        seen_to = jnp.broadcast_to(batch.kv_lens[row][:, None], position.shape)
    last = _cdiv(jnp.max(jnp.where(active[:, None], seen_to, 0)), context)
    head = jnp.arange(kv_heads, dtype=jnp.int32)[None, :, None]
    precision = lax.Precision.HIGHEST if compute == jnp.float32 else None
    transposed = value_width is None and batch.backend.transposes_keys(block_size)
    product = "bkqd,bkdc->bkqc" if transposed else "bkqd,bkcd->bkqc"

    def load(index, keep=True, transposed=False):
        """Of pages' heads [B, kv_heads, width]: [B, kv_heads, context, D], or transposed."""
        stored = flat[index]
        if transposed:
            stored = jnp.swapaxes(stored.reshape(*index.shape, dim, block_size), 2, 3)
        shape = (blocks, kv_heads, dim, context) if transposed else (blocks, kv_heads, context, dim)
        # before it is taken for a number: XLA:CPU selects bf16 by way of float32
        kept = jnp.where(keep, stored.reshape(shape), 0)
        numbers = from_storage(kept, compute, batch.backend.numbers(cache.dtype))
        if scales is None:
            return numbers
        scale = scales[index].reshape(blocks, kv_heads, context)
        return numbers * jnp.where(keep, jnp.expand_dims(scale, 2 if transposed else 3), 0)

    def piece(c, state):
        maximum, total, accumulated = state
        column = jnp.minimum(c * width + jnp.arange(width, dtype=jnp.int32), table.shape[1] - 1)
        page = table[row[:, None], column] + layout.page_offset  # [B, width]
        index = page[:, None, :] * parts + head
        at = c * context + jnp.arange(context, dtype=jnp.int32)
        visible = (at < seen_to[..., None]) & (at >= seen_from[..., None])  # [B, Q, context]
        # a weight of zero does not silence a NaN that a page's former owner left behind
        written = (at < jnp.max(seen_to, axis=1, keepdims=True)) & (at >= jnp.min(seen_from, axis=1, keepdims=True))
        if value_width is None:
            k = load(index, transposed=transposed)
            v = load(index + kv_heads, written[:, None, :, None])
        else:
            k = load(index, written[:, None, :, None])
            v = k[..., :value_width]
        scores = jnp.einsum(product, q, k, precision=precision, preferred_element_type=jnp.float32) * scale
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
        return new_maximum, total * keep + row_sum(weights), accumulated * keep + added

    shape = (blocks, kv_heads, length * groups)
    highest, total = jnp.full((*shape, 1), NEVER), jnp.zeros((*shape, 1))
    if sinks is not None:  # as if a position of this score, and no value, came first
        sink = jnp.tile(sinks.astype(jnp.float32).reshape(kv_heads, groups), (1, length))
        highest, total = jnp.broadcast_to(sink[None, :, :, None], highest.shape), jnp.ones((*shape, 1))
    state = (highest, total, jnp.zeros((*shape, value_width or dim)))
    _, total, accumulated = lax.fori_loop(first, last, piece, state)
    attended = accumulated / jnp.maximum(total, 1e-30)
    return jnp.swapaxes(attended.reshape(blocks, kv_heads, length, groups, -1), 1, 2)


def _div(a, b: int):
    """``a // b`` of what is not negative: else a dozen operations more."""
    return lax.div(a, jnp.int32(b) if a.ndim == 0 else jnp.full(a.shape, b, jnp.int32))


def _cdiv(a, b: int):
    return _div(a + (b - 1), b)
