"""``python -m pallas_kernels.paged_latent_attention.bench [--device gpu|cpu|interpret-smoke] [--json FILE]``

Times attention over latents at the heads of real models. GB/s counts what a decode must read: the latents of all
contexts. TFLOP/s counts two per product of a query with a latent that it sees, and of a weight with a value.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.backend import Backend, device_backend
from pallas_kernels.batch import Layout
from pallas_kernels.paged_attention.bench import MOST_LAYERS, PAGE_BYTES, UNLIMITED, Workload
from pallas_kernels.paged_attention.configurations import Heads
from pallas_kernels.paged_latent_attention.api import paged_latent_attention
from pallas_kernels.paged_latent_attention.configurations import MODELS
from pallas_kernels.storage import to_storage
from pallas_kernels.timing import parse_arguments, report, seconds_per_call


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentWorkload(Workload):
    """Sequences over pages of latents."""

    #: numbers of a latent that are its value
    value_width: int = 512
    block_size: int = 64

    @property
    def read_bytes(self) -> int:
        return int((self.before + self.queries).sum()) * self.heads.head_dim * jnp.dtype(self.stored).itemsize


def measure(
    backend: Backend, workload: LatentWorkload, *, page_bytes: int = PAGE_BYTES, repeats: int = 10
) -> dict[str, Any]:
    """One line of results; as many layers as have `page_bytes` of pages, at least one and at most `MOST_LAYERS`."""
    w, h = workload, workload.heads
    pages, dtype = w.seqs * w.width, jnp.dtype(w.stored)
    size = (pages, w.block_size, h.head_dim)
    layers = min(max(1, page_bytes // (int(np.prod(size)) * dtype.itemsize)), MOST_LAYERS)
    keys = jax.random.split(jax.random.key(0))
    cache = to_storage(jax.random.normal(keys[0], (layers * pages, *size[1:]), jnp.bfloat16), dtype)
    query = jax.random.normal(keys[1], (w.seqs * w.queries, h.heads, h.head_dim), jnp.dtype(w.query))

    def every_layer(query: jax.Array, cache: jax.Array, batch: Any) -> list[jax.Array]:
        places = [
            Layout(group=jnp.int32(0), page_offset=jnp.int32(layer * pages), window=jnp.int32(w.window))
            for layer in range(layers)
        ]
        how = dict(scale=h.head_dim**-0.5, value_width=w.value_width)
        return [paged_latent_attention(query, cache, place, batch, **how) for place in places]

    seconds = seconds_per_call(every_layer, (query, cache, w.batch(backend)), calls=layers, repeats=repeats)
    return {
        "label": str(w),
        "implementation": backend.implementation,
        "us": seconds * 1e6,
        "GB/s": w.read_bytes / seconds / 1e9,
        "TFLOP/s": 2 * h.heads * (h.head_dim + w.value_width) * w.pairs / seconds / 1e12,
    }


def workloads() -> list[LatentWorkload]:
    """Decodes over short and long contexts, and a prompt, of each model."""
    found = [
        LatentWorkload(heads=heads, seqs=seqs, computed=length - 1, queries=1)
        for heads in MODELS
        for seqs, length in ((1, 4096), (1, 131071), (64, 4096))
    ]
    return found + [LatentWorkload(heads=heads, seqs=1, computed=0, queries=2048) for heads in MODELS]


def main() -> None:
    arguments = parse_arguments(__doc__ or "", ("gpu", "cpu", "interpret-smoke"))
    if arguments.device == "cpu":
        backend = device_backend(jax.devices("cpu")[0])
        small = [LatentWorkload(heads=MODELS[-1], seqs=8, computed=500, queries=n, stored="uint16") for n in (1, 64)]
        report([measure(backend, each) for each in small], arguments.json)
        return
    if arguments.device == "interpret-smoke":
        backend = Backend(implementation="triton", interpret=True)
        heads = Heads(model="smoke", heads=4, kv_heads=1, head_dim=24)
        options: dict[str, Any] = dict(
            heads=heads, seqs=2, value_width=16, block_size=16, query="float32", stored="float32"
        )
        small = [
            LatentWorkload(computed=computed, queries=queries, window=UNLIMITED, **options)
            for computed, queries in ((40, 1), (10, 30))
        ]
        report([measure(backend, each, page_bytes=0, repeats=1) for each in small], arguments.json)
        return
    kernel = device_backend(jax.devices("gpu")[0])
    report([measure(kernel, each) for each in workloads()], arguments.json)


if __name__ == "__main__":
    main()
