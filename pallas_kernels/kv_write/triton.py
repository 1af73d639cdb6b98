"""New keys and values into their pages, in place, by Pallas-Triton: one program a token. Padding is not written."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.batch import AttentionBatch, Layout
from pallas_kernels.storage import largest_stored, to_storage
from pallas_kernels.triton_call import next_power_of_two, triton_call

#: numbers of one warp
WARP_NUMBERS = 256


def write_kv(
    cache: jax.Array,
    key: jax.Array,
    value: jax.Array | None,
    layout: Layout,
    batch: AttentionBatch,
    kv_scales: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """As `reference.write_kv`, but that page 0 stays as it is."""
    tokens, kv_heads, dim = key.shape
    heads, lanes = next_power_of_two(kv_heads), next_power_of_two(dim)
    halves = [key] if value is None else [key, value]
    arguments = [*halves, batch.token_seq, batch.positions, batch.token_valid]
    arguments += [batch.block_tables, layout.group.reshape(1), layout.page_offset.reshape(1)]
    pages = [cache.reshape(-1, dim), *([] if kv_scales is None else [kv_scales.reshape(-1)])]
    kernel = functools.partial(
        _kernel,
        heads=heads,
        kv_heads=kv_heads,
        lanes=lanes,
        dim=dim,
        block_size=cache.shape[-2],
        halves=len(halves),
        parts=len(pages),
    )
    call = triton_call(
        kernel,
        name="kv_write",
        out_shape=[jax.ShapeDtypeStruct(array.shape, array.dtype) for array in pages],
        grid=(tokens, len(halves)),
        num_warps=min(max(heads * lanes // WARP_NUMBERS, 1), 8),
        num_stages=1,
        interpret=batch.backend.interpret,
        input_output_aliases={len(arguments) + i: i for i in range(len(pages))},
    )
    written = call(*arguments, *pages)
    return written[0].reshape(cache.shape), None if kv_scales is None else written[1].reshape(kv_scales.shape)


def _kernel(
    *refs,
    heads: int,
    kv_heads: int,
    lanes: int,
    dim: int,
    block_size: int,
    halves: int,
    parts: int,
) -> None:
    new_refs, refs = refs[:halves], refs[halves:]
    token_seq_ref, positions_ref, valid_ref, tables_ref, group_ref, page_offset_ref, *refs = refs
    cache_ref, *scales_ref = refs[parts:]
    token = pl.program_id(0)
    half = pl.program_id(1)

    @pl.when(valid_ref[token])
    def _():
        position = positions_ref[token]
        page = tables_ref[group_ref[0], token_seq_ref[token], position // block_size] + page_offset_ref[0]
        head = jnp.arange(heads, dtype=jnp.int32)
        lane = jnp.arange(lanes, dtype=jnp.int32)
        exists = (head < kv_heads)[:, None] & (lane < dim)[None, :]
        row = ((page * halves + half) * kv_heads + head) * block_size + position % block_size
        # heads that do not exist would have another head's rows, which the interpreter would write back as they were
        row = jnp.where(head < kv_heads, row, cache_ref.shape[0])
        at = (token, head[:, None], lane[None, :])

        def write(new_ref) -> None:
            new = plt.load(new_ref.at[at], mask=exists, other=0.0)
            if scales_ref:
                new, scales = _quantize(new, cache_ref.dtype)
                plt.store(scales_ref[0].at[row], scales, mask=head < kv_heads)
            plt.store(cache_ref.at[row[:, None], lane[None, :]], to_storage(new, cache_ref.dtype), mask=exists)

        for i, new_ref in enumerate(new_refs):
            pl.when(half == i)(functools.partial(write, new_ref))


def _quantize(x: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """As `storage.quantize`, short of the cast."""
    x = x.astype(jnp.float32)
    largest = largest_stored(dtype)
    scales = jnp.max(jnp.abs(x), axis=1) / largest
    scaled = x / jnp.where(scales == 0, 1.0, scales)[:, None]
    if jnp.issubdtype(dtype, jnp.integer):
        scaled = _round(scaled)
    return jnp.minimum(jnp.maximum(scaled, -largest), largest), scales


def _round(x: jax.Array) -> jax.Array:
    """To the nearest integer, halves to even; Triton's lowering has no such operation."""
    up = jnp.floor(x + 0.5)
    is_odd = up - 2 * jnp.floor(up * 0.5)
    return jnp.where(up - x == 0.5, up - is_odd, up)
