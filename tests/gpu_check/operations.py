"""Stage 4: the operations of `pallas_kernels`, each by itself, in the shapes of Llama-3.1-8B."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpu_check import records
from gpu_check.sizes import Sizes, sizes
from gpu_check.stages import seconds_left
from gpu_check.timing import seconds_per_run
from pallas_kernels.backend import Backend, device_backend
from pallas_kernels.batch import AttentionBatch, Layout
from pallas_kernels.kv_write.api import write_kv
from pallas_kernels.paged_attention.api import paged_attention
from pallas_kernels.storage import STORAGE

DECODE_TARGET, PREFILL_TARGET = 0.8, 0.5
#: a window wider than any context
UNLIMITED = 2**30


def main() -> None:
    size = sizes()
    device = jax.devices()[0]
    backend = device_backend(device)
    if records.is_rehearsal():
        backend = Backend(implementation="triton", interpret=True)
    records.fact("backend", {"implementation": backend.implementation, "device_kind": backend.device_kind})
    for sequences, context in size.decode_contexts:
        _attempt(decode_attention, size, backend, sequences, context)
    for length in size.prompts:
        _attempt(prefill_attention, size, backend, length)
    for tokens in size.kv_writes:
        _attempt(kv_write, size, backend, tokens)
    for form in size.quantized_forms:
        _attempt(quant_matmul, size, backend, form, size.matmul_tokens)
    for form in size.expert_forms:
        _attempt(grouped_matmul, size, backend, form, size.matmul_tokens)
    if device.platform != "cpu":  # what the kernels replace
        for sequences, context in size.decode_contexts[:1]:
            _attempt(decode_attention, size, Backend(implementation="xla"), sequences, context)
        for length in size.prompts[:1]:
            _attempt(prefill_attention, size, Backend(implementation="xla"), length)


def _attempt(measure: Any, size: Sizes, backend: Backend, *arguments: Any) -> None:
    """One measurement. What fails is recorded, and leaves the others alone."""
    name = f"{measure.__name__} {arguments} by {backend.implementation}"
    if seconds_left() < 15:
        records.fact("left out: out of time", name)
        return
    try:
        measure(size, backend, *arguments)
    except Exception as error:  # whatever the compiler or the card says
        records.check(name, False, f"{type(error).__name__}: {error}"[:1000])


def decode_attention(size: Sizes, backend: Backend, sequences: int, context: int) -> None:
    """Every sequence has one query; what must be read is all keys and values."""
    heads, _, dim = size.heads
    records.measurement(
        f"decode_attention/{backend.implementation}",
        f"{sequences} sequences x {context:,} tokens",
        decode_attention_seconds(size, backend, sequences, context),
        num_bytes=_context_bytes(size, sequences * context) + 2 * sequences * heads * dim * 2,
        bound="copy",
        target=DECODE_TARGET if backend.implementation != "xla" else None,
    )


def prefill_attention(size: Sizes, backend: Backend, length: int) -> None:
    """One prompt; two products of half a square of queries and keys, for every head."""
    heads, _, dim = size.heads
    records.measurement(
        f"prefill_attention/{backend.implementation}",
        f"a prompt of {length:,} tokens",
        prefill_attention_seconds(size, backend, length),
        flops=2 * 2 * heads * dim * length * (length + 1) / 2,
        bound="matmul",
        target=PREFILL_TARGET if backend.implementation != "xla" else None,
    )


def decode_attention_seconds(size: Sizes, backend: Backend, sequences: int, context: int) -> float:
    """Of one layer."""
    lengths = np.full(sequences, context, np.int32)
    batch, pages = ragged_batch(backend, np.ones(sequences, np.int32), lengths, size.block_size)
    batch = dataclasses.replace(batch, decode_only=True)
    layers = max(1, size.cache_bytes // _context_bytes(size, sequences * context))
    return _attention_seconds(size, batch, pages, sequences, layers)


def prefill_attention_seconds(size: Sizes, backend: Backend, length: int) -> float:
    """Of one layer."""
    lengths = np.full(1, length, np.int32)
    batch, pages = ragged_batch(backend, lengths, lengths, size.block_size)
    return _attention_seconds(size, batch, pages, length, size.prefill_layers)


def _context_bytes(size: Sizes, tokens: int) -> int:
    """Of one layer's keys and values in bfloat16."""
    _, kv_heads, dim = size.heads
    return 2 * tokens * kv_heads * dim * 2


def kv_write(size: Sizes, backend: Backend, tokens: int) -> None:
    """One token of each sequence, in the middle of its page, into every layer. Small: this measures a launch."""
    ones = np.ones(tokens, np.int32)
    batch, pages = ragged_batch(backend, ones, np.full(tokens, size.block_size // 2, np.int32), size.block_size)
    _, kv_heads, dim = size.heads
    layers = size.write_layers
    cache, (key, value) = _cache(size, layers * pages), _normal(2, tokens, kv_heads, dim)

    @functools.partial(jax.jit, donate_argnums=0)
    def every_layer(cache: jax.Array, key: jax.Array, value: jax.Array, batch: AttentionBatch) -> jax.Array:
        for layer in range(layers):
            cache, _ = write_kv(cache, key, value, _layout(layer * pages), batch)
        return cache

    compiled = every_layer.lower(cache, key, value, batch).compile()
    seconds = seconds_per_run(compiled, (cache, key, value, batch), repeats=size.repeats, launches=10, carried=1)
    records.measurement(
        f"kv_write/{backend.implementation}",
        f"{tokens:,} tokens of as many sequences",
        seconds / layers,
        num_bytes=4 * tokens * kv_heads * dim * 2,
        bound="copy",
    )


def quant_matmul(size: Sizes, backend: Backend, form: str, tokens: tuple[int, ...]) -> None:
    """A weight as a checkpoint stores it, or in bfloat16, multiplied as an engine does; the ratio is of bandwidth."""
    bench = importlib.import_module("pallas_kernels.quant_matmul.bench")
    layers, n, k = (16, 28672, 4096) if not records.is_rehearsal() else (2, 64, 256)
    weight = bench.random_weight(bench.FORMS.get(form), n, k, layers)
    for rows in tokens:
        row = bench.measure(
            bench.chosen_product(backend),
            backend.implementation if form in bench.FORMS else "bfloat16",
            label="",
            tokens=rows,
            weight=weight,
            repeats=size.repeats,
        )
        _record_row("quant_matmul", f"{form} {n} x {k}, {rows} tokens", row)


def grouped_matmul(size: Sizes, backend: Backend, form: str, tokens: tuple[int, ...]) -> None:
    """Two experts of eight, Mixtral's, in bfloat16 or as a checkpoint stores them."""
    bench = importlib.import_module("pallas_kernels.grouped_matmul.bench")
    shape = {"active": 2, "experts": 8, "layers": 4, "n": 28672, "k": 4096}
    if records.is_rehearsal():
        shape = {"active": 2, "experts": 4, "layers": 2, "n": 64, "k": 256}
    for rows in tokens:
        row = bench.measure(backend, label="", tokens=rows, repeats=size.repeats, form=bench.FORMS.get(form), **shape)
        label = f"{form}, {shape['experts']} experts, {shape['n']} x {shape['k']}, {rows} tokens"
        _record_row("grouped_matmul", label, row)


def _record_row(operation: str, label: str, row: dict[str, Any]) -> None:
    """Take over a row of the operation's own benchmark."""
    seconds = row["us"] / 1e6
    moved = row["GB/s"] * 1e9 * seconds
    records.measurement(f"{operation}/{row['implementation']}", label, seconds, num_bytes=moved, bound="copy")


def ragged_batch(
    backend: Backend, queries: np.ndarray, lengths: np.ndarray, block_size: int
) -> tuple[AttentionBatch, int]:
    """Sequences of `lengths` tokens whose last `queries` are computed; their pages lie scattered, page 0 is trash.

    Returns:
        The batch, and how many pages it needs, page 0 included.
    """
    count, total = len(queries), int(queries.sum())
    width = -(-int(lengths.max()) // block_size)
    pages = 1 + np.random.default_rng(0).permutation(count * width).astype(np.int32).reshape(1, count, width)
    first = np.cumsum(queries) - queries
    batch = AttentionBatch(
        token_seq=jnp.asarray(np.repeat(np.arange(count, dtype=np.int32), queries)),
        positions=jnp.asarray(np.arange(total, dtype=np.int32) - np.repeat(first - (lengths - queries), queries)),
        token_valid=jnp.ones(total, bool),
        query_start=jnp.asarray(np.append(first, total).astype(np.int32)),
        kv_lens=jnp.asarray(lengths.astype(np.int32)),
        block_tables=jnp.asarray(pages),
        num_decodes=jnp.int32(np.count_nonzero(queries == 1)),
        num_seqs=jnp.int32(count),
        backend=backend,
    )
    return batch, 1 + count * width


def _attention_seconds(size: Sizes, batch: AttentionBatch, pages: int, tokens: int, layers: int) -> float:
    """Of one layer. Every layer has pages of its own, so that none finds the last one's in a cache."""
    heads, _, dim = size.heads
    (query,) = _normal(1, tokens, heads, dim)
    cache = _cache(size, layers * pages)

    def every_layer(query: jax.Array, cache: jax.Array, batch: AttentionBatch) -> list[jax.Array]:
        layouts = [_layout(layer * pages) for layer in range(layers)]
        return [paged_attention(query, cache, layout, batch, scale=dim**-0.5) for layout in layouts]

    compiled = jax.jit(every_layer).lower(query, cache, batch).compile()
    return seconds_per_run(compiled, (query, cache, batch), repeats=size.repeats, launches=8) / layers


def _layout(page_offset: int) -> Layout:
    return Layout(group=jnp.int32(0), page_offset=jnp.int32(page_offset), window=jnp.int32(UNLIMITED))


def _cache(size: Sizes, pages: int) -> jax.Array:
    """Random keys and values, in the form in which this device keeps bf16."""
    shape = (pages, 2 * size.heads[1], size.block_size, size.heads[2])
    stored = STORAGE[jnp.dtype(jnp.bfloat16)] if jax.default_backend() == "cpu" else jnp.bfloat16

    @jax.jit
    def draw(key: jax.Array) -> jax.Array:
        # the exponent's upper bits are those of 1.x, so that all numbers are ordinary
        bits = jax.random.bits(key, shape, jnp.uint16) & 0x80FF | 0x3F00
        return bits if stored == jnp.uint16 else jax.lax.bitcast_convert_type(bits, stored)

    return draw(jax.random.key(0, impl="rbg"))


def _normal(count: int, *shape: int) -> list[jax.Array]:
    return [jax.random.normal(key, shape, jnp.bfloat16) for key in jax.random.split(jax.random.key(1), count)]


if __name__ == "__main__":
    main()
