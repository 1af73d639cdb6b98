"""What an engine compiles attention for, at the shapes of real models: to compile, to check, to time."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.backend import MOSAIC_COMPUTE_CAPABILITY, Backend
from pallas_kernels.batch import AttentionBatch, Layout
from pallas_kernels.case import KernelCase
from pallas_kernels.paged_attention.mosaic_tiles import ROWS, num_tiles, why_not
from pallas_kernels.storage import is_scaled

#: floats of split contexts' parts may need as much; everything else is as large as the result, or less
PARTS_BYTES = 128 * 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heads:
    """Attention of a model."""

    model: str
    heads: int
    kv_heads: int
    head_dim: int
    softcap: float | None = None
    sinks: bool = False
    causal: bool = True


LLAMA = Heads(model="Llama-3.1-8B", heads=32, kv_heads=8, head_dim=128)
GEMMA_3 = Heads(model="Gemma-3-4B", heads=8, kv_heads=4, head_dim=256)
MODELS = (
    LLAMA,
    GEMMA_3,
    Heads(model="Qwen2.5-7B", heads=28, kv_heads=4, head_dim=128),
    Heads(model="Gemma-2-9B", heads=16, kv_heads=8, head_dim=256, softcap=50.0),
    Heads(model="gpt-oss-20b", heads=64, kv_heads=8, head_dim=64, sinks=True),
    Heads(model="Phi-2", heads=32, kv_heads=32, head_dim=80),
    Heads(model="Phi-3-mini", heads=32, kv_heads=32, head_dim=96),
    Heads(model="Falcon-7B", heads=71, kv_heads=1, head_dim=64),
    Heads(model="StableLM-2-12B", heads=32, kv_heads=8, head_dim=160),
    Heads(model="all-MiniLM-L6", heads=12, kv_heads=12, head_dim=32, causal=False),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """A step that attention is compiled for."""

    heads: Heads
    tokens: int
    seqs: int
    decode_only: bool = False
    #: positions of the longest context
    context: int = 8192
    block_size: int = 16
    query: str = "bfloat16"
    #: dtype of the pages
    stored: str = "bfloat16"
    #: bytes of the cache: larger ones than 4 GiB have longer addresses
    cache_bytes: int = 2**30
    #: whether runs of tokens see each other
    spans: bool = False

    def __str__(self) -> str:
        kind = "decode" if self.decode_only else "mixed"
        size = f"{self.tokens} tokens x {self.seqs} seqs, context {self.context}"
        stored = self.stored if self.stored == self.query else f"{self.query} over {self.stored}"
        spans = ", of pictures" if self.spans else ""
        return f"{self.heads.model} {kind} {size}, pages of {self.block_size} in {stored}{spans}"

    @property
    def pages(self) -> int:
        row = self.heads.head_dim * jnp.dtype(self.stored).itemsize
        return self.cache_bytes // (2 * self.heads.kv_heads * self.block_size * row)

    def cache(self) -> tuple[Any, Any]:
        """Shapes of the cache and its scales (None: it has none)."""
        h = self.heads
        size = (self.pages, 2 * h.kv_heads, self.block_size)
        cache = jax.ShapeDtypeStruct((*size, h.head_dim), jnp.dtype(self.stored))
        return cache, jax.ShapeDtypeStruct(size, jnp.float32) if is_scaled(cache.dtype) else None

    def batch(self, backend: Backend) -> AttentionBatch:
        def ints(*shape: int) -> Any:
            return jax.ShapeDtypeStruct(shape, jnp.int32)

        token_valid: Any = jax.ShapeDtypeStruct((self.tokens,), jnp.bool_)
        return AttentionBatch(
            token_seq=ints(self.tokens),
            positions=ints(self.tokens),
            token_valid=token_valid,
            query_start=ints(self.seqs + 1),
            kv_lens=ints(self.seqs),
            block_tables=ints(1, self.seqs, self.context // self.block_size),
            num_decodes=ints(),
            num_seqs=ints(),
            backend=backend,
            decode_only=self.decode_only,
            seen_to=ints(self.tokens) if self.spans else None,
        )

    @property
    def in_mosaic(self) -> bool:
        """Whether an engine that was asked for Mosaic takes its kernel."""
        h = self.heads
        shape = dict(heads=h.heads, kv_heads=h.kv_heads, head_dim=h.head_dim, block_size=self.block_size)
        return not self.decode_only and why_not(**shape, query_dtype=self.query, cache_dtype=self.stored) is None

    def layout(self) -> Layout:
        scalar: Any = jax.ShapeDtypeStruct((), jnp.int32)
        return Layout(group=scalar, page_offset=scalar, window=scalar)


def steps() -> list[Step]:
    """Every model once in each of its kinds of step; sizes, pages and dtypes of one model each."""
    found = [Step(heads=h, tokens=64, seqs=64, decode_only=True) for h in MODELS if h.causal]
    found += [Step(heads=h, tokens=2048, seqs=64) for h in MODELS]
    for seqs in (1, 8, 256):
        found.append(Step(heads=LLAMA, tokens=seqs, seqs=seqs, decode_only=True, context=131072))
    for tokens, seqs in ((8, 8), (512, 256), (8192, 256)):
        found.append(Step(heads=LLAMA, tokens=tokens, seqs=seqs, context=131072))
    found += [Step(heads=LLAMA, tokens=512, seqs=64, block_size=size) for size in (32, 64, 128)]
    found.append(Step(heads=LLAMA, tokens=512, seqs=64, cache_bytes=2**33))
    found.append(Step(heads=GEMMA_3, tokens=2048, seqs=64, spans=True))
    for heads in (LLAMA, GEMMA_3):
        for query, stored in (
            ("float16", "float16"),
            ("float32", "float32"),
            ("bfloat16", "int8"),
            ("bfloat16", "float8_e4m3fn"),
            ("float16", "float8_e5m2"),
        ):
            found.append(Step(heads=heads, tokens=512, seqs=64, query=query, stored=stored))
    return found


def configurations(device_kind: str = "") -> list[KernelCase]:
    """Attention of each of `steps`, with the tiles of a device; and by Mosaic, of those that it takes."""
    from pallas_kernels.paged_attention.api import paged_attention

    def attend(query, cache, scales, layout, batch, sinks, *, heads: Heads):
        return paged_attention(
            query,
            cache,
            layout,
            batch,
            scale=heads.head_dim**-0.5,
            softcap=heads.softcap,
            causal=heads.causal,
            sinks=sinks,
            kv_scales=scales,
        )

    cases = []
    triton, mosaic = (Backend(implementation=name, device_kind=device_kind) for name in ("triton", "mosaic"))
    for step, backend in [(step, triton) for step in steps()] + [(step, mosaic) for step in steps() if step.in_mosaic]:
        h, is_mosaic = step.heads, backend is mosaic
        query = jax.ShapeDtypeStruct((step.tokens, h.heads, h.head_dim), jnp.dtype(step.query))
        sinks = jax.ShapeDtypeStruct((h.heads,), jnp.float32) if h.sinks else None
        least = (8, 9) if step.stored == "float8_e4m3fn" else (8, 0)
        temporary = 2 * query.size * query.dtype.itemsize + PARTS_BYTES
        if is_mosaic:  # rows and results in its own order
            tiles = num_tiles(step.tokens, step.seqs, h.heads // h.kv_heads)
            temporary += (query.size + tiles * h.kv_heads * ROWS * h.head_dim) * query.dtype.itemsize
        cases.append(
            KernelCase(
                operation="paged_attention",
                label=f"{step}{', prompts in Mosaic' if is_mosaic else ''}",
                function=functools.partial(attend, heads=h),
                arguments=(query, *step.cache(), step.layout(), step.batch(backend), sinks),
                max_temporary_bytes=temporary,
                least_compute_capability=MOSAIC_COMPUTE_CAPABILITY if is_mosaic else least,
                last_compute_capability=MOSAIC_COMPUTE_CAPABILITY if is_mosaic else None,
            )
        )
    return cases
