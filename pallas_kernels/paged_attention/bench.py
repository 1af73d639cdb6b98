"""``python -m pallas_kernels.paged_attention.bench [--device gpu|cpu|interpret-smoke] [--json FILE]``

Times attention at the heads of real models. GB/s counts what a decode must read: keys and values of all contexts.
TFLOP/s counts two per product of a query with a key that it sees, and of a weight with a value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.backend import MOSAIC_COMPUTE_CAPABILITY, Backend, device_backend
from pallas_kernels.batch import AttentionBatch, Layout
from pallas_kernels.paged_attention.api import paged_attention
from pallas_kernels.paged_attention.configurations import GEMMA_3, LLAMA, MODELS, Heads, Step
from pallas_kernels.storage import is_scaled, to_storage
from pallas_kernels.timing import parse_arguments, report, seconds_per_call

#: bytes of pages that the timed calls go through in turn: more than any cache holds
PAGE_BYTES = 2 * 2**30
#: each call is compiled
MOST_LAYERS = 16
#: a window wider than any context
UNLIMITED = 2**30
SMOLLM2 = Heads(model="SmolLM2-135M", heads=9, kv_heads=3, head_dim=64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """Sequences, each with as many tokens in the step."""

    heads: Heads
    seqs: int
    #: tokens computed before, and in this step
    computed: int
    queries: int
    #: what is computed before lies between 0 and twice `computed`, as far on average, in any order
    mixed: bool = False
    block_size: int = 16
    window: int = UNLIMITED
    query: str = "bfloat16"
    stored: str = "bfloat16"

    def __str__(self) -> str:
        what = "decode" if self.queries == 1 else f"{self.queries} tokens"
        window = "" if self.window == UNLIMITED else f", window {self.window}"
        after = f"0 to {2 * self.computed}" if self.mixed else self.computed
        pages = f"{self.stored}, blocks of {self.block_size}"
        return f"{self.heads.model} {self.seqs} x {what} after {after}{window}, {pages}"

    @property
    def before(self) -> np.ndarray:
        """Tokens computed before, i32 [seqs]."""
        if not self.mixed:
            return np.full(self.seqs, self.computed, np.int32)
        return np.random.default_rng(1).permutation(np.linspace(0, 2 * self.computed, self.seqs).astype(np.int32))

    @property
    def width(self) -> int:
        return -(-(int(self.before.max()) + self.queries) // self.block_size)

    @property
    def pairs(self) -> int:
        """Queries times keys that each sees."""
        return int(np.minimum(self.before[:, None] + np.arange(1, self.queries + 1), self.window).sum())

    @property
    def read_bytes(self) -> int:
        """Of keys and values that some query sees."""
        first = np.maximum(self.before - self.window + 1, 0)
        row = 2 * self.heads.kv_heads * (self.heads.head_dim * jnp.dtype(self.stored).itemsize + 4 * self.has_scales)
        return int((self.before + self.queries - first).sum()) * row

    @property
    def in_mosaic(self) -> bool:
        step = Step(
            heads=self.heads,
            tokens=self.seqs * self.queries,
            seqs=self.seqs,
            decode_only=self.queries == 1,
            block_size=self.block_size,
            query=self.query,
            stored=self.stored,
        )
        return step.in_mosaic

    @property
    def has_scales(self) -> bool:
        return is_scaled(jnp.dtype(self.stored))

    def batch(self, backend: Backend) -> AttentionBatch:
        """One step of it; the pages of each sequence lie anywhere."""
        tokens = self.seqs * self.queries
        pages = np.random.default_rng(0).permutation(self.seqs * self.width).astype(np.int32)
        starts = np.arange(self.seqs + 1, dtype=np.int32) * self.queries
        positions = (self.before[:, None] + np.arange(self.queries, dtype=np.int32)).reshape(-1)
        decode = self.queries == 1
        return AttentionBatch(
            token_seq=jnp.asarray(np.repeat(np.arange(self.seqs, dtype=np.int32), self.queries)),
            positions=jnp.asarray(positions),
            token_valid=jnp.ones(tokens, bool),
            query_start=jnp.asarray(starts),
            kv_lens=jnp.asarray(self.before + self.queries),
            block_tables=jnp.asarray(pages.reshape(1, self.seqs, self.width)),
            num_decodes=jnp.int32(self.seqs if decode else 0),
            num_seqs=jnp.int32(self.seqs),
            backend=backend,
            decode_only=decode,
        )


def measure(
    backend: Backend,
    workload: Workload,
    *,
    attend: Callable[..., jax.Array] = paged_attention,
    page_bytes: int = PAGE_BYTES,
    repeats: int = 10,
) -> dict[str, Any]:
    """One line of results; as many layers as have `page_bytes` of pages, at least one and at most `MOST_LAYERS`."""
    w, h = workload, workload.heads
    pages = w.seqs * w.width
    size = (pages, 2 * h.kv_heads, w.block_size, h.head_dim)
    dtype = jnp.dtype(w.stored)
    layers = min(max(1, page_bytes // (int(np.prod(size)) * dtype.itemsize)), MOST_LAYERS)

    def numbers(key: jax.Array) -> jax.Array:
        drawn = jax.random.normal(key, (layers * pages, *size[1:]), jnp.bfloat16)
        return jnp.round(drawn * 32).astype(dtype) if w.has_scales else to_storage(drawn, dtype)

    keys = jax.random.split(jax.random.key(0))
    cache = jax.jit(numbers)(keys[0])
    scales = jnp.full(cache.shape[:-1], 1 / 32, jnp.float32) if w.has_scales else None
    query = jax.random.normal(keys[1], (w.seqs * w.queries, h.heads, h.head_dim), jnp.dtype(w.query))

    def every_layer(query: jax.Array, cache: jax.Array, scales: jax.Array | None, batch: AttentionBatch):
        return [
            attend(
                query,
                cache,
                Layout(group=jnp.int32(0), page_offset=jnp.int32(layer * pages), window=jnp.int32(w.window)),
                batch,
                scale=h.head_dim**-0.5,
                softcap=h.softcap,
                kv_scales=scales,
            )
            for layer in range(layers)
        ]

    arguments = (query, cache, scales, w.batch(backend))
    seconds = seconds_per_call(every_layer, arguments, calls=layers, repeats=repeats)
    return {
        "label": str(w),
        "implementation": backend.implementation,
        "us": seconds * 1e6,
        "GB/s": w.read_bytes / seconds / 1e9,
        "TFLOP/s": 4 * h.heads * h.head_dim * w.pairs / seconds / 1e12,
    }


def workloads() -> list[Workload]:
    """Decodes over short and long contexts, prompts, and chunks of long prompts."""
    decodes = [(1, 4096), (1, 131071), (8, 32768), (16, 4096), (64, 4096), (256, 2048)]
    prompts = [(1, 0, 8192), (4, 0, 2048), (64, 0, 128), (1, 30720, 2048)]
    found = [Workload(heads=LLAMA, seqs=seqs, computed=length - 1, queries=1) for seqs, length in decodes]
    found += [
        Workload(heads=LLAMA, seqs=seqs, computed=computed, queries=queries) for seqs, computed, queries in prompts
    ]
    for heads in MODELS[1:]:
        if heads.causal and not heads.sinks:
            found.append(Workload(heads=heads, seqs=64, computed=4095, queries=1))
            found.append(Workload(heads=heads, seqs=1, computed=0, queries=8192))
    found.append(Workload(heads=GEMMA_3, seqs=64, computed=4095, queries=1, window=1024))
    found.append(Workload(heads=GEMMA_3, seqs=1, computed=0, queries=8192, window=1024))
    for stored in ("int8", "float8_e4m3fn"):
        found.append(Workload(heads=LLAMA, seqs=64, computed=4095, queries=1, stored=stored))
        found.append(Workload(heads=LLAMA, seqs=1, computed=0, queries=8192, stored=stored))
    found += [Workload(heads=LLAMA, seqs=64, computed=4095, queries=1, block_size=size) for size in (64, 128)]
    return found


def cpu_workloads() -> list[Workload]:
    """Decodes of a model that a CPU serves, with small blocks and with the default ones, whose keys are transposed."""
    return [
        Workload(heads=SMOLLM2, seqs=seqs, computed=computed, queries=1, mixed=mixed, block_size=size, stored="uint16")
        for seqs, computed, mixed in ((32, 64, False), (64, 250, False), (200, 320, False), (200, 320, True))
        for size in (16, 64)
    ]


def main() -> None:
    arguments = parse_arguments(__doc__ or "", ("gpu", "cpu", "interpret-smoke"))
    if arguments.device == "cpu":
        backend = device_backend(jax.devices("cpu")[0])
        report([measure(backend, each) for each in cpu_workloads()], arguments.json)
        return
    if arguments.device == "interpret-smoke":
        backend = Backend(implementation="triton", interpret=True)
        heads = Heads(model="smoke", heads=4, kv_heads=2, head_dim=16)
        small = [
            Workload(heads=heads, seqs=2, computed=computed, queries=queries, query="float32", stored="float32")
            for computed, queries in ((40, 1), (10, 30))
        ]
        report([measure(backend, each, page_bytes=0, repeats=1) for each in small], arguments.json)
        return
    kernel = device_backend(jax.devices("gpu")[0])
    results = [measure(kernel, each) for each in workloads()]
    if kernel.compute_capability == MOSAIC_COMPUTE_CAPABILITY:
        mosaic = dataclasses.replace(kernel, implementation="mosaic")
        results += [measure(mosaic, each) for each in workloads() if each.in_mosaic]
    report(results, arguments.json)


if __name__ == "__main__":
    main()
