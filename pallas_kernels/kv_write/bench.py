"""``python -m pallas_kernels.kv_write.bench [--device gpu|interpret-smoke] [--json FILE]``

Times writing at the heads of real models. GB/s counts each new number's reading and writing.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.backend import Backend, device_backend
from pallas_kernels.batch import Layout
from pallas_kernels.kv_write.api import write_kv
from pallas_kernels.paged_attention.bench import UNLIMITED, Workload
from pallas_kernels.paged_attention.configurations import GEMMA_3, LLAMA, Heads
from pallas_kernels.timing import parse_arguments, report, seconds_per_call

#: times that all layers are written in one run
ROUNDS = 8


def measure(backend: Backend, workload: Workload, *, layers: int = 32, repeats: int = 10) -> dict[str, Any]:
    """One line of results, of one layer; all layers are written one after the other, as in a step."""
    w, h = workload, workload.heads
    pages, tokens = w.seqs * w.width, w.seqs * w.queries
    size = (layers * pages, 2 * h.kv_heads, w.block_size, h.head_dim)
    dtype = jnp.dtype(w.stored)
    new = jax.random.normal(jax.random.key(0), (2, tokens, h.kv_heads, h.head_dim), jnp.dtype(w.query))
    batch = w.batch(backend)

    def every_layer(key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        # made here, so that it can be written in place; to write often makes its making small
        cache = jnp.zeros(size, dtype)
        scales = jnp.zeros(size[:-1], jnp.float32) if w.has_scales else None
        for _ in range(ROUNDS):
            for layer in range(layers):
                layout = Layout(group=jnp.int32(0), page_offset=jnp.int32(layer * pages), window=jnp.int32(UNLIMITED))
                cache, scales = write_kv(cache, key, value, layout, batch, scales)
        return cache, scales

    seconds = seconds_per_call(every_layer, (new[0], new[1]), calls=layers * ROUNDS, repeats=repeats)
    moved = 2 * tokens * h.kv_heads * h.head_dim * (dtype.itemsize + new.dtype.itemsize)
    return {
        "label": str(w),
        "implementation": backend.implementation,
        "us": seconds * 1e6,
        "GB/s": moved / seconds / 1e9,
    }


def main() -> None:
    arguments = parse_arguments(__doc__ or "")
    if arguments.device == "interpret-smoke":
        backend = Backend(implementation="triton", interpret=True)
        heads = Heads(model="smoke", heads=4, kv_heads=2, head_dim=16)
        small = Workload(heads=heads, seqs=2, computed=10, queries=3, query="float32", stored="float32")
        report([measure(backend, small, layers=2, repeats=1)], arguments.json)
        return
    kernel = device_backend(jax.devices("gpu")[0])
    results = []
    for heads in (LLAMA, GEMMA_3):
        for seqs, queries in ((64, 1), (256, 1), (1, 2048)):
            for stored in ("bfloat16", "int8"):
                load = Workload(heads=heads, seqs=seqs, computed=100, queries=queries, stored=stored)
                results += [measure(backend, load) for backend in (kernel, Backend(implementation="xla"))]
    report(results, arguments.json)


if __name__ == "__main__":
    main()
