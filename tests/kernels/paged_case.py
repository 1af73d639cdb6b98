"""Ragged batches over pages, drawn at random, and attention over them by the formula, in float64.

Everything in the cache that no query may see is NaN (or has a scale of NaN): pages of others, positions not written
yet, positions that the window has left (their table entries are 0, as the engine leaves them), page 0.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from hypothesis import strategies as st

from pallas_kernels.backend import Backend
from pallas_kernels.batch import AttentionBatch, Layout

MAX_LEN = 384
UNLIMITED = 2**30
SCALE = 0.7
#: there are two block tables and two layers, of which the kernels must take the second
GROUP = LAYER = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """What a program is compiled for."""

    heads: int
    kv_heads: int
    dim: int
    block: int
    tokens: int = 96
    #: room for so many sequences
    seqs: int = 20
    query: str = "float32"
    #: of the pages; "uint16": bfloat16, as a CPU has it
    stored: str = "float32"
    softcap: float | None = None
    causal: bool = True
    sinks: bool = False
    decode_only: bool = False
    #: whether runs of a step's tokens see each other (`AttentionBatch.seen_to`)
    spans: bool = False

    def __str__(self) -> str:
        options = ("" if self.causal else "-bidirectional") + ("-sinks" if self.sinks else "")
        options += ("-decode" if self.decode_only else "") + ("-spans" if self.spans else "")
        return f"{self.heads}:{self.kv_heads}x{self.dim}-block{self.block}-{self.query}-{self.stored}{options}"

    @property
    def width(self) -> int:
        return MAX_LEN // self.block

    @property
    def num_blocks(self) -> int:
        return 1 + self.seqs * self.width

    @property
    def number(self) -> np.dtype:
        """What the pages' bits are read as."""
        return np.dtype(ml_dtypes.bfloat16) if self.stored == "uint16" else np.dtype(jnp.dtype(self.stored))

    @property
    def has_scales(self) -> bool:
        return self.number.itemsize == 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sequences:
    """Tokens computed before and in this step, one entry a sequence; single tokens first."""

    computed: tuple[int, ...]
    queries: tuple[int, ...]
    window: int
    #: positions that all sequences share with the first, as far as both have them
    shared: int
    #: factor on the queries: how extreme the scores are
    magnitude: float
    seed: int
    #: see `Layout.first`
    first: int = 0


@st.composite
def sequences(draw: st.DrawFn, shape: Shape) -> Sequences:
    decodes = draw(st.integers(0, min(shape.seqs, shape.tokens)))
    queries, room = [1] * decodes, shape.tokens - decodes
    while not shape.decode_only and room >= 2 and len(queries) < shape.seqs and (not queries or draw(st.booleans())):
        queries.append(draw(st.integers(2, room)))
        room -= queries[-1]
    # who sees the whole sequence sees what this step computes: all of it
    computed = tuple(draw(st.integers(0, MAX_LEN - n)) if shape.causal else 0 for n in queries)
    return Sequences(
        computed=computed,
        queries=tuple(queries),
        window=draw(st.one_of(st.just(UNLIMITED), st.integers(1, MAX_LEN))),
        shared=draw(st.sampled_from((0, 100, MAX_LEN))),
        magnitude=draw(st.sampled_from((1.0, 1.0, 30.0, 1000.0))),
        seed=draw(st.integers(0, 2**16)),
    )


class PagedCase:
    """A batch, its cache, and what its attention is."""

    def __init__(self, shape: Shape, drawn: Sequences):
        self.shape, self.drawn = shape, drawn
        self._random = np.random.default_rng(drawn.seed)
        self.lengths = [before + new for before, new in zip(drawn.computed, drawn.queries, strict=True)]
        self.query = (drawn.magnitude * self._random.standard_normal((shape.tokens, shape.heads, shape.dim))).astype(
            jnp.dtype(shape.query)
        )
        self.sinks = self._random.standard_normal(shape.heads).astype(np.float32) * 3 if shape.sinks else None
        self.table = self._tables()
        self.cache, self.scales, self.keys, self.values = self._pages()

    @property
    def layout(self) -> Layout:
        offset = LAYER * self.shape.num_blocks
        window = jnp.int32(self.drawn.window)
        return Layout(group=jnp.int32(GROUP), page_offset=jnp.int32(offset), window=window, first=self.drawn.first)

    @property
    def batch(self) -> AttentionBatch:
        shape, counts, n = self.shape, np.array(self.drawn.queries, np.int32), len(self.lengths)
        total = int(counts.sum())
        token_seq, positions = np.zeros((2, shape.tokens), np.int32)
        token_seq[:total] = np.repeat(np.arange(n), counts)
        before = self.drawn.computed
        positions[:total] = np.concatenate([np.arange(b, b + c) for b, c in zip(before, counts, strict=True)] or [[]])
        query_start = np.full(shape.seqs + 1, total, np.int32)
        query_start[:n] = np.cumsum(counts) - counts
        kv_lens = np.zeros(shape.seqs, np.int32)
        kv_lens[:n] = self.lengths
        tables = self._random.integers(1, shape.num_blocks, (2, *self.table.shape)).astype(np.int32)
        tables[GROUP] = self.table
        return AttentionBatch(
            token_seq=jnp.asarray(token_seq),
            positions=jnp.asarray(positions),
            token_valid=jnp.arange(shape.tokens) < total,
            query_start=jnp.asarray(query_start),
            kv_lens=jnp.asarray(kv_lens),
            block_tables=jnp.asarray(tables),
            num_decodes=jnp.int32(np.count_nonzero(counts == 1)),
            num_seqs=jnp.int32(n),
            decode_only=shape.decode_only,
            seen_to=jnp.asarray(self.seen_to) if shape.spans else None,
        )

    @functools.cached_property
    def seen_to(self) -> np.ndarray:
        """i32 [T], the first position that each token does not see."""
        found, random = np.zeros(self.shape.tokens, np.int32), np.random.default_rng(self.drawn.seed)
        for seq, (before, count) in enumerate(zip(self.drawn.computed, self.drawn.queries, strict=True)):
            own = np.arange(before, before + count) + 1
            if self.shape.spans and count > 1:
                ends = np.flatnonzero(random.random(count) < 2 / count)
                for first, last in itertools.pairwise((0, *ends.tolist())):
                    if random.random() < 0.7:
                        own[first:last] = before + last
            found[self.tokens(seq)] = own
        return found

    def visible(self, seq: int) -> range:
        """Positions that some query of a sequence sees."""
        return range(max(self.drawn.first, self.drawn.computed[seq] - self.drawn.window + 1), self.lengths[seq])

    def tokens(self, seq: int) -> slice:
        first = sum(self.drawn.queries[:seq])
        return slice(first, first + self.drawn.queries[seq])

    def expected(self, seq: int) -> tuple[np.ndarray, np.ndarray]:
        """Attention of one sequence's queries [n, heads, dim], in float64, and by how much it may be missed."""
        shape, group = self.shape, self.shape.heads // self.shape.kv_heads
        query = np.asarray(self.query[self.tokens(seq)], np.float64)
        keys, values = (np.repeat(x[seq], group, axis=1) for x in (self.keys, self.values))
        scores = SCALE * np.einsum("qhd,chd->qhc", query, keys)
        # each product and sum of a score rounds once, in float32
        error = SCALE * np.einsum("qhd,chd->qhc", abs(query), abs(keys)) * (shape.dim + 8) * 2.0**-24
        if shape.softcap is not None:
            scores = shape.softcap * np.tanh(scores / shape.softcap)
            error = np.minimum(error, 2 * shape.softcap) + shape.softcap * 2.0**-21
        position = self.drawn.computed[seq] + np.arange(len(query))[:, None]
        at = np.arange(len(keys))
        seen_to = self.seen_to[self.tokens(seq)][:, None]
        seen = (at > position - self.drawn.window) & ((at < seen_to) | (not shape.causal)) & (at >= self.drawn.first)
        sees_none = ~seen.any(axis=1)
        scores = np.where(seen[:, None], scores, -np.inf)
        error = np.where(seen[:, None], error, 0).max(axis=-1)
        highest = scores.max(axis=-1, keepdims=True)
        sink = 0.0
        if self.sinks is not None:
            sinks = self.sinks.astype(np.float64)[None, :, None]
            highest = np.maximum(highest, sinks)
            sink = np.exp(sinks - highest)
        highest[sees_none] = 0
        weights = np.exp(scores - highest)
        weights = weights / np.maximum(weights.sum(axis=-1, keepdims=True) + sink, 1e-300)
        out = np.einsum("qhc,chd->qhd", weights, values)
        largest = abs(values).max(initial=0)
        rounding = float(ml_dtypes.finfo(self._weight_dtype).eps)
        relative = np.minimum(np.expm1(np.minimum(2 * error, 1)), 2) + 2 * rounding + len(keys) * 2.0**-23
        bound = (relative * largest)[..., None] + rounding * abs(out) + 1e-30
        # what sees nothing is anything finite
        bound[sees_none] = np.inf
        return out, bound

    @property
    def _weight_dtype(self) -> np.dtype:
        """The coarsest that weights are rounded to: what the query is, but for scaled pages with no room for scales."""
        query = jnp.dtype(self.shape.query)
        return np.dtype(ml_dtypes.bfloat16) if self.shape.has_scales and query == np.float16 else query

    def _tables(self) -> np.ndarray:
        """Block table [seqs, width] of all sequences: pages in any order, those of shared positions the first's."""
        shape = self.shape
        free = iter(self._random.permutation(np.arange(1, shape.num_blocks)))
        table = np.zeros((shape.seqs, shape.width), np.int32)
        for seq, length in enumerate(self.lengths):
            for column in range(self.visible(seq).start // shape.block, -(-length // shape.block)):
                shared = self._shares(seq, column) and table[0, column]
                table[seq, column] = shared or next(free)
        return table

    def _shares(self, seq: int, column: int) -> bool:
        """Whether a block of a sequence is the first sequence's: both must have computed it before this step."""
        computed = min(self.drawn.computed[seq], self.drawn.computed[0], self.drawn.shared)
        return seq > 0 and (column + 1) * self.shape.block <= computed

    def _pages(self) -> tuple[np.ndarray, np.ndarray | None, list[np.ndarray], list[np.ndarray]]:
        """The cache, its scales, and the keys and values of each sequence as they can be read from it, in float64."""
        shape = self.shape
        size = (2, shape.num_blocks, 2, shape.kv_heads, shape.block, shape.dim)
        new = self._random.standard_normal(size, dtype=np.float32)
        scales = None
        if shape.has_scales:
            integer = np.issubdtype(shape.number, np.integer)
            largest = 127 if integer else float(ml_dtypes.finfo(shape.number).max)
            scales = self._random.uniform(0.5, 2, size[:-1]).astype(np.float32) * 3 / largest
            new = np.clip(new / 3 * largest, -largest, largest)
        cache = new.astype(shape.number)
        numbers = cache.astype(np.float64) if scales is None else cache.astype(np.float64) * scales[..., None]
        written = np.zeros(size[:-1], bool)
        keys, values = [], []
        for seq, length in enumerate(self.lengths):
            both = np.zeros((2, length, shape.kv_heads, shape.dim))
            for at in self.visible(seq):
                place = (LAYER, self.table[seq, at // shape.block], slice(None), slice(None), at % shape.block)
                written[place] = True
                both[:, at] = numbers[place]
            keys.append(both[0])
            values.append(both[1])
        if scales is None:
            cache[~written] = np.nan
        else:
            scales[~written] = np.nan
            scales = scales.reshape(-1, 2 * shape.kv_heads, shape.block)
        cache = cache.reshape(-1, 2 * shape.kv_heads, shape.block, shape.dim)
        return cache.view(np.uint16) if shape.stored == "uint16" else cache, scales, keys, values


def as_stored(cache: np.ndarray, backend: Backend) -> np.ndarray:
    """A cache whose keys are rows, as programs of `backend` have it."""
    if not backend.transposes_keys(cache.shape[2]):
        return cache
    keys, values = np.split(cache, 2, axis=1)
    return np.concatenate([np.swapaxes(keys, 2, 3).reshape(keys.shape), values], axis=1)


def arguments(case: PagedCase) -> dict[str, Any]:
    """What `paged_attention` takes by name."""
    return dict(
        scale=SCALE,
        softcap=case.shape.softcap,
        causal=case.shape.causal,
        sinks=None if case.sinks is None else jnp.asarray(case.sinks),
        kv_scales=None if case.scales is None else jnp.asarray(case.scales),
    )
