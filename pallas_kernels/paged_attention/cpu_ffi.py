"""Attention on a CPU by a kernel (`cpu_kernel`) that reads pages where they lie, on XLA's threads."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.batch import AttentionBatch, Layout
from pallas_kernels.cpu_ffi.compiled import Kernels, target_name
from pallas_kernels.cpu_ffi.work_sharing import UNEVEN_PARTS

#: of the pages, as arrays hold them: what their numbers are
STORED = ("float32", "float16", "bfloat16", "int8", "float8_e4m3fn", "float8_e5m2")
#: query heads of a KV head, and their numbers: more would be too much code, all of them being written out
MOST_GROUP, MOST_NUMBERS = 16, 4096
#: queries of a sequence that take the context together
QUERIES_TILE = 4
#: queries of a part of a sequence, which one thread takes, and most parts
PART, MOST_PARTS = 64, 8
#: no limit to queries of a sequence
ANY = 2**30
#: what the work is cut along has so many numbers for each part of a sequence and KV head (`work_sharing.UNIT`)
_UNIT = 4
_NEVER = -1e30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """What a kernel is written for.

    Args:
        group: query heads of a KV head.
        stored: one of `STORED`.
        transposed: whether pages hold keys as [head_dim, block_size].
    """

    group: int
    head_dim: int
    block_size: int
    stored: str
    transposed: bool
    has_softcap: bool

    @property
    def name(self) -> str:
        flags = f"{'t' * self.transposed}{'c' * self.has_softcap}"
        return f"attention_{self.group}_{self.head_dim}_{self.block_size}_{self.stored}-{flags}"

    @classmethod
    def named(cls, name: str) -> Form:
        """The form of a kernel's `name`."""
        sizes, _, flags = name.partition("-")
        _, group, head_dim, block_size, stored = sizes.split("_", 4)
        return cls(
            group=int(group),
            head_dim=int(head_dim),
            block_size=int(block_size),
            stored=stored,
            transposed="t" in flags,
            has_softcap="c" in flags,
        )

    @property
    def queries(self) -> int:
        """Queries of a sequence that are computed at once."""
        return max(min(QUERIES_TILE, MOST_GROUP // self.group, MOST_NUMBERS // (self.group * self.head_dim)), 1)

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
    *, heads: int, kv_heads: int, head_dim: int, block_size: int, stored: str, transposed: bool, has_softcap: bool
) -> Form | None:
    """The kernel of a model's attention; None: there is none.

    Args:
        stored: the numbers that pages hold.
    """
    group = heads // kv_heads
    fits = group <= MOST_GROUP and group * head_dim <= MOST_NUMBERS and stored in STORED
    if not fits or min(_lanes(head_dim), _lanes(block_size)) < 8:
        return None
    return Form(
        group=group,
        head_dim=head_dim,
        block_size=block_size,
        stored=stored,
        transposed=transposed,
        has_softcap=has_softcap,
    )


def load(form: Form, folder: Path | None) -> str:
    """Load a kernel (`Kernels.load`): the name by which programs call it (`Backend.cpu_attention`); "": none."""
    version = KERNELS.load([form.name], folder)
    return version and target_name(form.name, version)


def kernel_for(query: jax.Array, cache: jax.Array, batch: AttentionBatch, *, softcap: float | None) -> str | None:
    """What XLA calls the kernel of a step, where one is loaded; None: none is, for such arrays."""
    stored = jnp.dtype(jnp.bfloat16) if cache.dtype == jnp.uint16 else batch.backend.numbers(cache.dtype)
    form = form_of(
        heads=query.shape[1],
        kv_heads=cache.shape[1] // 2,
        head_dim=cache.shape[3],
        block_size=cache.shape[2],
        stored=stored.name,
        transposed=batch.backend.transposes_keys(cache.shape[2]),
        has_softcap=softcap is not None,
    )
    if form is None:
        return None
    return next((name for name in batch.backend.cpu_attention if name == target_name(form.name, name[-16:])), None)


def attention(
    kernel: str,
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
    """Of sequences that have at most `most_queries` tokens, float32 [T, heads, head_dim]; zeros for the others.

    Args:
        kernel: of these arrays (`kernel_for`).
    """
    tokens, heads, dim = query.shape
    longest = min(batch.longest or tokens, tokens)
    parts = min(-(-longest // PART), MOST_PARTS)
    how = jnp.array([layout.first, most_queries(batch), parts], jnp.int32)
    where = jnp.concatenate([jnp.stack([layout.group, layout.page_offset, layout.window]), how])
    if sinks is None:
        start = jnp.stack([jnp.full((heads,), _NEVER, jnp.float32), jnp.zeros((heads,), jnp.float32)])
    else:  # as if a position of this score, and no value, came first
        start = jnp.stack([sinks.astype(jnp.float32), jnp.ones((heads,), jnp.float32)])
    shared = jax.ShapeDtypeStruct((_UNIT * batch.kv_lens.shape[0] * (cache.shape[1] // 2) * parts,), jnp.int32)
    call = jax.ffi.ffi_call(kernel, (shared, jax.ShapeDtypeStruct((tokens, heads, dim), jnp.float32)))
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
    )[1]


def most_queries(batch: AttentionBatch) -> int:
    """Of a sequence that the kernel computes: tokens of a picture see what lies behind them, which it does not do."""
    return 1 if batch.decode_only or batch.seen_to is not None else ANY
