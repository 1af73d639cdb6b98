"""Paged attention against the formula in float64, over random batches, pages and windows.

Everything in the cache that a query may not see is NaN: pages of others, positions not written yet, positions that the
window has left (their table entries are 0, as the engine leaves them), page 0.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.layers.attention import AttentionBatch, Layout, attention, write_kv

SEQS, MAX_LEN = 20, 384
UNLIMITED = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    heads: int
    kv_heads: int
    dim: int
    block: int
    softcap: float | None = None
    dtype: str = "float32"
    tokens: int = 96

    @property
    def width(self) -> int:
        return MAX_LEN // self.block

    @property
    def num_blocks(self) -> int:
        return 1 + SEQS * self.width


SHAPES = (
    Shape(heads=4, kv_heads=4, dim=8, block=16),
    Shape(heads=6, kv_heads=2, dim=24, block=32, softcap=1.5),
    Shape(heads=3, kv_heads=1, dim=80, block=8, tokens=24),
    Shape(heads=5, kv_heads=1, dim=16, block=128, softcap=4.0),
    Shape(heads=6, kv_heads=3, dim=10, block=64, dtype="uint16"),
)


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Tokens computed before and in this step, one entry a sequence; single tokens first."""

    computed: tuple[int, ...]
    queries: tuple[int, ...]
    window: int
    seed: int


@st.composite
def sequences(draw: st.DrawFn, tokens: int) -> Sequences:
    decodes = draw(st.integers(0, SEQS))
    queries, room = [1] * decodes, tokens - decodes
    while room >= 2 and len(queries) < SEQS and (not queries or draw(st.booleans())):
        queries.append(draw(st.integers(2, room)))
        room -= queries[-1]
    computed = tuple(draw(st.integers(0, MAX_LEN - n)) for n in queries)
    window = draw(st.one_of(st.just(UNLIMITED), st.integers(1, MAX_LEN)))
    return Sequences(computed, tuple(queries), window, draw(st.integers(0, 2**16)))


@functools.partial(jax.jit, static_argnums=0)
def run(shape: Shape, query, key, value, cache, layout: Layout, batch: AttentionBatch):
    cache = write_kv(cache, key, value, layout, batch)
    return cache, attention(query, cache, layout, batch, scale=0.7, softcap=shape.softcap)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.heads}-{s.kv_heads}-{s.dim}-block{s.block}-{s.dtype}")
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_attention_is_the_formula(shape: Shape, data: st.DataObject):
    case = data.draw(sequences(shape.tokens))
    rng = np.random.default_rng(case.seed)
    lengths = [before + new for before, new in zip(case.computed, case.queries, strict=True)]
    keys, values = (
        [_rounded(rng.standard_normal((n, shape.kv_heads, shape.dim)), shape) for n in lengths] for _ in range(2)
    )
    query = rng.standard_normal((shape.tokens, shape.heads, shape.dim), dtype=np.float32)
    batch, tables = _batch(shape, case, lengths, rng)
    layer = 1
    layout = Layout(group=jnp.int32(1), page_offset=jnp.int32(layer * shape.num_blocks), window=jnp.int32(case.window))
    before = _cache(shape, layer, tables, keys, values, [_seen(case, i) for i in range(len(lengths))])
    after = _cache(shape, layer, tables, keys, values, [range(_seen(case, i).start, n) for i, n in enumerate(lengths)])
    new_keys, new_values = (
        _padded([x[n:] for x, n in zip(xs, case.computed, strict=True)], shape) for xs in (keys, values)
    )

    cache, out = run(shape, query, new_keys, new_values, before, layout, batch)

    cache, out = np.asarray(cache), np.asarray(out)
    np.testing.assert_array_equal(cache[1:], after[1:])  # page 0 takes the padding
    assert np.isfinite(out).all()
    first = 0
    for i, count in enumerate(case.queries):
        expected = _reference(shape, query[first : first + count], keys[i], values[i], case.computed[i], case.window)
        np.testing.assert_allclose(out[first : first + count], expected, rtol=0, atol=2e-5)
        first += count


def _reference(shape: Shape, query, keys, values, computed: int, window: int) -> np.ndarray:
    """Row t of softmax(mask(cap(0.7 q k))) v, in float64."""
    groups = shape.heads // shape.kv_heads
    keys, values = (np.repeat(x, groups, axis=1).astype(np.float64) for x in (keys, values))
    scores = 0.7 * np.einsum("qhd,chd->hqc", query.astype(np.float64), keys)
    if shape.softcap is not None:
        scores = shape.softcap * np.tanh(scores / shape.softcap)
    position = computed + np.arange(len(query))[:, None]
    at = np.arange(len(keys))
    scores = np.where((at <= position) & (at > position - window), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("hqc,chd->qhd", weights / weights.sum(axis=-1, keepdims=True), values)


def _seen(case: Sequences, i: int) -> range:
    """Computed positions that the first query still sees."""
    return range(max(0, case.computed[i] - case.window + 1), case.computed[i])


def _batch(shape: Shape, case: Sequences, lengths: list[int], rng) -> tuple[AttentionBatch, np.ndarray]:
    counts, n, total = np.array(case.queries), len(lengths), sum(case.queries)
    tables = np.zeros((2, SEQS, shape.width), np.int32)
    tables[0] = rng.integers(1, shape.num_blocks, tables[0].shape)  # of another group
    free = iter(rng.permutation(np.arange(1, shape.num_blocks)))
    for i, length in enumerate(lengths):
        for column in range(_seen(case, i).start // shape.block, -(-length // shape.block)):
            tables[1, i, column] = next(free)
    token_seq, positions = np.zeros((2, shape.tokens), np.int32)
    token_seq[:total] = np.repeat(np.arange(n), counts)
    positions[:total] = np.concatenate([np.arange(b, b + c) for b, c in zip(case.computed, counts, strict=True)])
    query_start = np.full(SEQS + 1, total, np.int32)
    query_start[:n] = np.cumsum(counts) - counts
    kv_lens = np.zeros(SEQS, np.int32)
    kv_lens[:n] = lengths
    batch = AttentionBatch(
        token_seq=jnp.asarray(token_seq),
        positions=jnp.asarray(positions),
        token_valid=jnp.arange(shape.tokens) < total,
        query_start=jnp.asarray(query_start),
        kv_lens=jnp.asarray(kv_lens),
        block_tables=jnp.asarray(tables),
        num_decodes=jnp.int32(np.count_nonzero(counts == 1)),
        num_seqs=jnp.int32(n),
    )
    return batch, tables[1]


def _cache(shape: Shape, layer: int, tables, keys, values, filled: list[range]) -> np.ndarray:
    """Two layers' pages in the documented layout, NaN but for the `filled` positions of each sequence."""
    size = (2, shape.num_blocks, 2, shape.kv_heads, shape.block, shape.dim)
    cache = np.full(size, np.nan, np.float32)
    for i, positions in enumerate(filled):
        for at in positions:
            page, slot = tables[i, at // shape.block], at % shape.block
            cache[layer, page, 0, :, slot], cache[layer, page, 1, :, slot] = keys[i][at], values[i][at]
    cache = cache.reshape(-1, *size[2:])
    return cache.astype(ml_dtypes.bfloat16).view(np.uint16) if shape.dtype == "uint16" else cache


def _rounded(x: np.ndarray, shape: Shape) -> np.ndarray:
    return x.astype(ml_dtypes.bfloat16 if shape.dtype == "uint16" else np.float32).astype(np.float32)


def _padded(parts: list[np.ndarray], shape: Shape) -> np.ndarray:
    out = np.ones((shape.tokens, shape.kv_heads, shape.dim), np.float32)
    joined = np.concatenate(parts)
    out[: len(joined)] = joined
    return out
