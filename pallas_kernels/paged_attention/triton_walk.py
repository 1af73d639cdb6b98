"""What the decode and the prefill kernel share: rows of queries of one sequence and KV head walk over a range of its
positions with a running softmax (Milakov and Gimelshein 2018, arXiv:1805.02867; in tiles: Dao et al. 2022,
arXiv:2205.14135).

The pages are addressed as rows of ``head_dim`` numbers, one address a position: a piece of context is gathered over
as many pages as it touches, so a piece is as large as the multiprocessor likes, whatever the block size is.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plt

from pallas_kernels.storage import from_storage, is_scaled
from pallas_kernels.triton_call import next_power_of_two

LOG2_E = math.log2(math.e)
#: a masked score: finite, so that a row that has seen nothing yet stays free of NaN
NEVER = -1e30
#: tensor cores take no less
LEAST_ROWS = 16


class Lanes(NamedTuple):
    """Numbers of a row that are loaded at once."""

    first: int
    width: int

    @property
    def padded(self) -> int:
        """`width`, as a power of two that tensor cores take."""
        return max(next_power_of_two(self.width), LEAST_ROWS)

    def columns(self, exists: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Their indices i32 [1, padded], and bool [M, padded] which of them there are, in rows that `exists` [M]."""
        lane = jnp.arange(self.padded, dtype=jnp.int32)
        return self.first + lane[None, :], exists[:, None] & (lane < self.width)[None, :]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """Static sizes of one attention call."""

    heads: int
    kv_heads: int
    #: numbers of a query, and of a key
    head_dim: int
    #: of a value
    value_dim: int
    #: pages hold latents: keys alone, whose first `value_dim` numbers are their values
    latents: bool
    block_size: int
    #: what scores are computed in, and weights times values
    score_dtype: jnp.dtype
    value_dtype: jnp.dtype
    scale: float
    softcap: float | None
    causal: bool

    @property
    def group(self) -> int:
        """Query heads of one KV head."""
        return self.heads // self.kv_heads

    @property
    def heads_of_page(self) -> int:
        """Heads of keys, and of values, that a page holds one after the other."""
        return self.kv_heads if self.latents else 2 * self.kv_heads

    @property
    def pieces(self) -> tuple[Lanes, ...]:
        """What queries and keys are multiplied in: whole, or a latent's value and what is behind it."""
        value = Lanes(0, self.value_dim)
        return (value, Lanes(self.value_dim, self.head_dim - self.value_dim)) if self.latents else (value,)

    @property
    def value(self) -> Lanes:
        return self.pieces[0]

    @classmethod
    def of(
        cls,
        query: jax.Array,
        cache: jax.Array,
        *,
        scale: float,
        softcap: float | None,
        causal: bool,
        value_width: int | None = None,
    ) -> Geometry:
        """Of query [T, heads, head_dim] and a cache as in `pallas_kernels.storage`.

        Args:
            value_width: numbers of a latent that are its value; None: the cache has keys and values.
        """
        score_dtype, value_dtype = product_dtypes(query.dtype, cache.dtype)
        return cls(
            heads=query.shape[1],
            kv_heads=cache.shape[1] // 2 if value_width is None else 1,
            head_dim=query.shape[2],
            value_dim=value_width or query.shape[2],
            latents=value_width is not None,
            block_size=cache.shape[-2],
            score_dtype=score_dtype,
            value_dtype=value_dtype,
            scale=scale,
            softcap=softcap,
            causal=causal,
        )


def product_dtypes(query: Any, stored: Any) -> tuple[jnp.dtype, jnp.dtype]:
    """What scores, and weights times values, are multiplied in.

    Numbers of 8 bits are exact in every wider type. Where they have scales, weights are multiplied by those of the
    values, which float16 has no room for.
    """
    query, stored = jnp.dtype(query), jnp.dtype(stored)
    if is_scaled(stored):
        return query, jnp.dtype(jnp.bfloat16) if query == jnp.float16 else query
    if stored == jnp.uint16:
        return jnp.dtype(jnp.float32), jnp.dtype(jnp.float32)
    both = jnp.promote_types(query, stored)
    return both, both


class Pages(NamedTuple):
    """References of a kernel to the cache and its block tables."""

    rows: Any  # [pages * heads_of_page * block_size, head_dim]
    scales: Any  # f32 [pages * heads_of_page * block_size]; None: the pages have none
    tables: Any  # i32 [G, S, W]


class Place(NamedTuple):
    """Whose pages are walked over. All i32 []."""

    group: jax.Array
    page_offset: jax.Array
    seq: jax.Array
    kv_head: jax.Array


#: rows of queries [M, padded], one array for each of `Geometry.pieces`
Queries = tuple[jax.Array, ...]


class Softmax(NamedTuple):
    """What a walk has so far of each row, in powers of two."""

    highest: jax.Array  # f32 [M]
    total: jax.Array  # f32 [M]
    weighted: jax.Array  # f32 [M, lanes]

    @classmethod
    def zero(cls, rows: int, lanes: int) -> Softmax:
        return cls(
            jnp.full((rows,), NEVER, jnp.float32),
            jnp.zeros((rows,), jnp.float32),
            jnp.zeros((rows, lanes), jnp.float32),
        )

    @classmethod
    def of_sinks(cls, sinks: jax.Array, applies: jax.Array, lanes: int) -> Softmax:
        """As if a position of score `sinks` f32 [M], and no value, had come first, where `applies` bool []."""
        rows = sinks.shape[0]
        highest = jnp.where(applies, sinks * LOG2_E, NEVER)
        total = jnp.where(applies, jnp.ones((rows,), jnp.float32), 0.0)
        return cls(highest, total, jnp.zeros((rows, lanes), jnp.float32))

    def result(self) -> jax.Array:
        return self.weighted / jnp.where(self.total == 0, 1.0, self.total)[:, None]


def load_queries(geometry: Geometry, ref: Any, token: Any, head: jax.Array, exists: jax.Array) -> Queries:
    """What `walk` multiplies by: of ref [T, heads, head_dim] the rows of `head` i32 [M], which `exists` bool [M], zeros
    where they do not.

    Args:
        token: i32 [], or [M, 1].
    """
    found = []
    for lanes in geometry.pieces:
        column, there = lanes.columns(exists)
        loaded = plt.load(ref.at[token, head[:, None], column], mask=there, other=0.0)
        found.append(loaded.astype(geometry.score_dtype))
    return tuple(found)


def walk(
    geometry: Geometry,
    block_n: int,
    pages: Pages,
    place: Place,
    query: Queries,
    state: Softmax,
    pieces: tuple[Any, Any],
    *,
    seen_from: Any = None,
    seen_to: Any = None,
    bounds: tuple[Any, Any] | None = None,
) -> Softmax:
    """Take the pieces [pieces[0], pieces[1]) of `block_n` positions each into the softmax.

    Args:
        query: of `load_queries`.
        bounds: i32 [], positions [bounds[0], bounds[1]) may be read, no other; None: every piece may, in full.
        seen_from, seen_to: i32 [M], positions that each row sees, within the bounds; None: all within the bounds.
    """
    g = geometry
    shift = g.block_size.bit_length() - 1
    has_scales = pages.scales is not None
    factor = g.scale * LOG2_E if g.softcap is None else g.scale / g.softcap

    def load(lanes: Lanes, row: jax.Array, inside: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
        ref, lane = pages.rows, jnp.arange(lanes.padded, dtype=jnp.int32)
        mask = None if inside is None else inside[:, None]
        if lanes.padded != lanes.width:
            exists = (lane < lanes.width)[None, :]
            mask = exists if mask is None else mask & exists
        at = ref.at[row[:, None], (lane if lanes.first == 0 else lanes.first + lane)[None, :]]
        if mask is None:
            stored = plt.load(at)
        else:
            mask = jnp.broadcast_to(mask, (block_n, lanes.padded))
            stored = plt.load(at, mask=mask, other=jnp.zeros((), ref.dtype))
        return from_storage(stored, dtype).astype(dtype)

    def piece(i: Any, state: Softmax) -> Softmax:
        position = i * block_n + jnp.arange(block_n, dtype=jnp.int32)
        inside = None if bounds is None else (position >= bounds[0]) & (position < bounds[1])
        entry = pages.tables.at[place.group, place.seq, position >> shift]
        page = plt.load(entry) if inside is None else plt.load(entry, mask=inside, other=0)
        block = (page + place.page_offset) * g.heads_of_page + place.kv_head
        slot = position & (g.block_size - 1)
        key_row = block * g.block_size + slot
        value_row = (block + g.kv_heads) * g.block_size + slot
        keys = [load(lanes, key_row, inside, g.score_dtype) for lanes in g.pieces]
        products = (_dot(q, k, contract=1) for q, k in zip(query, keys, strict=True))
        scores = functools.reduce(operator.add, products) * factor
        if has_scales:
            key_scales = _scales(pages.scales, key_row, inside)[None, :]
            scores = scores * key_scales
        if g.softcap is not None:
            scores = (g.softcap * LOG2_E) * _tanh(scores)
        visible = inside
        if visible is not None:
            visible = visible[None, :]
            if seen_to is not None:
                visible = visible & (position[None, :] < seen_to[:, None])
            if seen_from is not None:
                visible = visible & (position[None, :] >= seen_from[:, None])
            scores = jnp.where(visible, scores, NEVER)
        highest = jnp.maximum(state.highest, jnp.max(scores, axis=1))
        weights = jnp.exp2(scores - highest[:, None])
        keep = jnp.exp2(state.highest - highest)
        total = state.total * keep + jnp.sum(weights, axis=1)
        values = keys[0].astype(g.value_dtype) if g.latents else load(g.value, value_row, inside, g.value_dtype)
        if has_scales:
            weights = weights * (key_scales if g.latents else _scales(pages.scales, value_row, inside)[None, :])
        weighted = state.weighted * keep[:, None] + _dot(weights.astype(g.value_dtype), values, contract=0)
        return Softmax(highest, total, weighted)

    return lax.fori_loop(pieces[0], pieces[1], piece, state)


def _scales(ref: Any, row: jax.Array, inside: jax.Array | None) -> jax.Array:
    return plt.load(ref.at[row]) if inside is None else plt.load(ref.at[row], mask=inside, other=0.0)


def _dot(a: jax.Array, b: jax.Array, *, contract: int) -> jax.Array:
    """a [M, K] times b, over axis `contract` of b, in float32; float32 itself without rounding to TF32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((1,), (contract,)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _tanh(x: jax.Array) -> jax.Array:
    """To 1e-7 of 1, by one exponential: libdevice's has branches."""
    return 1.0 - 2.0 / (jnp.exp2(x * (2.0 * LOG2_E)) + 1.0)
