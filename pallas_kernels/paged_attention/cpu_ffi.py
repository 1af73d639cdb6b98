"""Attention on a CPU by a kernel (`cpu_kernel`) that reads pages where they lie, on XLA's threads."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.batch import AttentionBatch, Layout
from pallas_kernels.cpu_ffi import amx
from pallas_kernels.cpu_ffi.compiled import Kernels, target_name
from pallas_kernels.cpu_ffi.work_sharing import UNEVEN_PARTS

#: of the pages, as arrays hold them: what their numbers are
STORED = ("float32", "float16", "bfloat16", "int8", "float8_e4m3fn", "float8_e5m2")
#: query heads that are computed together, and their numbers: more would be too much code, all of them being written out
MOST_GROUP, MOST_NUMBERS = 16, 4096
#: queries of a sequence that take the context together
QUERIES_TILE = 4
#: positions of a page that the form by AMX's tiles takes, queries from which on a sequence is computed so, and most
#: numbers of the queries that are computed at once
TILES_BLOCK, LEAST_TILES_QUERIES, MOST_TILES_NUMBERS = 64, 16, 16384
#: queries of a part of a sequence, which one thread takes, and most parts
PART, MOST_PARTS = 64, 8
#: queries of a sequence that the kernel computes: no limit; and of latents, where XLA's products of more, all heads of
#: which see the same page, are faster
ANY, LATENT_QUERIES = 2**30, 8
#: what the work is cut along has so many numbers for each part of a sequence and KV head (`work_sharing.UNIT`)
_UNIT = 4
_NEVER = -1e30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """What a kernel is written for.

    Args:
        group: query heads that are computed together: those of a KV head, or some of all that see the same latents.
        stored: one of `STORED`.
        transposed: whether pages hold keys as [head_dim, block_size].
        value_width: pages hold latents, the first so many numbers of which are values; 0: keys, and values beside them.
        by_tiles: many queries of a sequence are computed by Intel's AMX, in bfloat16 (`cpu_tiles`).
    """

    group: int
    head_dim: int
    block_size: int
    stored: str
    transposed: bool = False
    has_softcap: bool = False
    value_width: int = 0
    by_tiles: bool = False

    @property
    def name(self) -> str:
        flags = f"{'t' * self.transposed}{'c' * self.has_softcap}{'m' * self.by_tiles}"
        return f"attention_{self.group}_{self.head_dim}_{self.value_width}_{self.block_size}_{self.stored}-{flags}"

    @classmethod
    def named(cls, name: str) -> Form:
        """The form of a kernel's `name`."""
        sizes, _, flags = name.partition("-")
        _, group, head_dim, value_width, block_size, stored = sizes.split("_", 5)
        return cls(
            group=int(group),
            head_dim=int(head_dim),
            block_size=int(block_size),
            stored=stored,
            transposed="t" in flags,
            has_softcap="c" in flags,
            value_width=int(value_width),
            by_tiles="m" in flags,
        )

    @property
    def has_latents(self) -> bool:
        return self.value_width > 0

    @property
    def result_dim(self) -> int:
        """Numbers of a head's result."""
        return self.value_width or self.head_dim

    @property
    def queries(self) -> int:
        """Queries of a sequence that are computed at once."""
        return max(min(QUERIES_TILE, MOST_GROUP // self.group, MOST_NUMBERS // (self.group * self.head_dim)), 1)

    @property
    def tile_queries(self) -> int:
        """Queries of a sequence that are computed at once by AMX's tiles, whose rows they fill."""
        return next(count for count in (64, 32, 16) if count * self.group * self.head_dim <= MOST_TILES_NUMBERS)

    @property
    def can_have_tiles(self) -> bool:
        fits = self.stored == "bfloat16" and self.transposed and self.block_size == TILES_BLOCK
        fits = fits and self.head_dim % 32 == 0 and 16 * self.group * self.head_dim <= MOST_TILES_NUMBERS
        return fits and not (self.has_softcap or self.has_latents)

    @property
    def is_scaled(self) -> bool:
        """Whether pages have scales."""
        return self.itemsize == 1

    @property
    def itemsize(self) -> int:
        return jnp.dtype(self.stored).itemsize

    @property
    def lanes(self) -> int:
        """Numbers of a head that are computed at once."""
        return _lanes(self.head_dim)

    @property
    def result_lanes(self) -> int:
        """Numbers of a head's result that are computed at once."""
        return _lanes(self.result_dim)

    @property
    def position_lanes(self) -> int:
        """Positions that are computed at once."""
        return _lanes(self.block_size)


def _lanes(size: int) -> int:
    return next(lanes for lanes in (16, 8, 4, 2, 1) if size % lanes == 0)


def _module(name: str) -> Any:
    from pallas_kernels.paged_attention.cpu_kernel import module

    return module(name)


# contexts have any lengths, and long ones are often neighbours
KERNELS = Kernels(_module, [Path(__file__).parent], parts=UNEVEN_PARTS)


def form_of(
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    stored: str,
    transposed: bool,
    has_softcap: bool,
    dtype: str,
) -> Form | None:
    """The kernel of a model's attention; None: there is none.

    Args:
        stored: the numbers that pages hold.
        dtype: the queries'.
    """
    group = heads // kv_heads
    fits = group <= MOST_GROUP and group * head_dim <= MOST_NUMBERS and stored in STORED
    if not fits or min(_lanes(head_dim), _lanes(block_size)) < 8:
        return None
    form = Form(
        group=group,
        head_dim=head_dim,
        block_size=block_size,
        stored=stored,
        transposed=transposed,
        has_softcap=has_softcap,
    )
    by_tiles = dtype == "bfloat16" and form.can_have_tiles and amx.is_usable()
    return dataclasses.replace(form, by_tiles=by_tiles)


def latent_form_of(*, heads: int, width: int, value_width: int, block_size: int, stored: str) -> Form | None:
    """The kernel of a model's attention over latents of `width` numbers; None: there is none.

    Args:
        stored: the numbers that pages hold.
    """
    if width > MOST_NUMBERS or stored not in STORED:
        return None
    if min(_lanes(width), _lanes(value_width), _lanes(block_size)) < 8:
        return None
    most = min(MOST_GROUP, MOST_NUMBERS // width, heads)
    group = next(group for group in range(most, 0, -1) if heads % group == 0)
    return Form(group=group, head_dim=width, block_size=block_size, stored=stored, value_width=value_width)


def load(form: Form, folder: Path | None) -> str:
    """Load a kernel (`Kernels.load`): the name by which programs call it (`Backend.cpu_attention`); "": none."""
    version = KERNELS.load([form.name], folder)
    return version and target_name(form.name, version)


def kernel_for(
    query: jax.Array, cache: jax.Array, batch: AttentionBatch, *, softcap: float | None, value_width: int | None = None
) -> tuple[str, Form] | None:
    """What XLA calls the kernel of a step, and its form, where one is loaded; None: none is, for such arrays.

    Args:
        value_width: of a cache of latents.
    """
    stored = jnp.dtype(jnp.bfloat16) if cache.dtype == jnp.uint16 else batch.backend.numbers(cache.dtype)
    heads, block_size, dim = query.shape[1], cache.shape[-2], cache.shape[-1]
    if value_width is not None:
        form = latent_form_of(
            heads=heads, width=dim, value_width=value_width, block_size=block_size, stored=stored.name
        )
    else:
        form = form_of(
            heads=heads,
            kv_heads=cache.shape[1] // 2,
            head_dim=dim,
            block_size=block_size,
            stored=stored.name,
            transposed=batch.backend.transposes_keys(block_size),
            has_softcap=softcap is not None,
            dtype=query.dtype.name,
        )
    if form is None:
        return None
    names = (name for name in batch.backend.cpu_attention if name == target_name(form.name, name[-16:]))
    return next(((name, form) for name in names), None)


def attention(
    kernel: tuple[str, Form],
    query: jax.Array,
    cache: jax.Array,
    layout: Layout,
    batch: AttentionBatch,
    *,
    scale: float,
    softcap: float | None,
    sinks: jax.Array | None,
    kv_scales: jax.Array | None,
) -> jax.Array:
    """Of sequences that have at most `most_queries` tokens, float32 [T, heads, head_dim], or the width of latents'
    values; zeros for the others.

    Args:
        kernel: of these arrays (`kernel_for`).
    """
    name, form = kernel
    tokens, heads, _ = query.shape
    longest = min(batch.longest or tokens, tokens)
    parts = min(-(-longest // PART), MOST_PARTS)
    how = jnp.array([layout.first, most_queries(form, batch), parts], jnp.int32)
    where = jnp.concatenate([jnp.stack([layout.group, layout.page_offset, layout.window]), how])
    if sinks is None:
        start = jnp.stack([jnp.full((heads,), _NEVER, jnp.float32), jnp.zeros((heads,), jnp.float32)])
    else:  # as if a position of this score, and no value, came first
        start = jnp.stack([sinks.astype(jnp.float32), jnp.ones((heads,), jnp.float32)])
    shared = jax.ShapeDtypeStruct((_UNIT * batch.kv_lens.shape[0] * (heads // form.group) * parts,), jnp.int32)
    call = jax.ffi.ffi_call(name, (shared, jax.ShapeDtypeStruct((tokens, heads, form.result_dim), jnp.float32)))
    return call(
        query.astype(jnp.float32) * scale,
        cache,
        batch.block_tables,
        where,
        batch.positions,
        start,
        jnp.float32(1.0 if softcap is None else softcap),
        batch.query_start,
        batch.token_valid,
        *(() if kv_scales is None else (kv_scales,)),
        *((query, jnp.float32(scale)) if form.by_tiles else ()),
    )[1]


def most_queries(form: Form, batch: AttentionBatch) -> int:
    """Of a sequence that the kernel computes: tokens of a picture see what lies behind them, which it does not do."""
    if batch.decode_only or batch.seen_to is not None:
        return 1
    return LATENT_QUERIES if form.has_latents else ANY
