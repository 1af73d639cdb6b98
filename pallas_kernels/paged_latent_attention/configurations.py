"""What an engine compiles attention over latents for, at the shapes of real models."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.backend import Backend
from pallas_kernels.case import KernelCase
from pallas_kernels.paged_attention.configurations import PARTS_BYTES, Heads, Step
from pallas_kernels.storage import is_scaled


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentStep(Step):
    """A step over pages of latents; its heads have one KV head, and the latents' width."""

    #: numbers of a latent that are its value
    value_width: int
    block_size: int = 64

    @property
    def pages(self) -> int:
        return self.cache_bytes // (self.block_size * self.heads.head_dim * jnp.dtype(self.stored).itemsize)

    def cache(self) -> tuple[Any, Any]:
        shape = (self.pages, self.block_size, self.heads.head_dim)
        cache = jax.ShapeDtypeStruct(shape, jnp.dtype(self.stored))
        return cache, jax.ShapeDtypeStruct(shape[:-1], jnp.float32) if is_scaled(cache.dtype) else None


def _heads(model: str, heads: int) -> Heads:
    return Heads(model=model, heads=heads, kv_heads=1, head_dim=576)


#: all heads on one device, and those of one of eight
DEEPSEEK_V3, DEEPSEEK_V3_OF_8 = _heads("DeepSeek-V3", 128), _heads("DeepSeek-V3 on 8", 16)
MODELS = (
    DEEPSEEK_V3,
    DEEPSEEK_V3_OF_8,
    _heads("DeepSeek-V2-Lite", 16),
)


def steps() -> list[LatentStep]:
    """Single tokens, and chunks beside them, of each model; longer contexts, other pages and dtypes of one."""
    found = [
        LatentStep(heads=heads, tokens=tokens, seqs=64, decode_only=tokens == 64, value_width=512)
        for heads in MODELS[:2]
        for tokens in (64, 2048)
    ]
    one = functools.partial(LatentStep, heads=DEEPSEEK_V3_OF_8, value_width=512)
    found += [one(tokens=seqs, seqs=seqs, decode_only=True, context=131072) for seqs in (1, 256)]
    found += [one(tokens=512, seqs=64, block_size=16), one(tokens=512, seqs=64, cache_bytes=2**33)]
    found += [one(tokens=512, seqs=64, query=dtype, stored=dtype) for dtype in ("float16", "float32")]
    found += [one(tokens=512, seqs=64, stored=dtype) for dtype in ("int8", "float8_e4m3fn")]
    return found


def configurations(device_kind: str = "") -> list[KernelCase]:
    """Attention of each of `steps`, with the tiles of a device."""
    from pallas_kernels.paged_latent_attention.api import paged_latent_attention

    def attend(query, cache, scales, layout, batch, *, value_width: int):
        return paged_latent_attention(
            query, cache, layout, batch, scale=192**-0.5, value_width=value_width, kv_scales=scales
        )

    cases = []
    backend = Backend(implementation="triton", device_kind=device_kind)
    for step in steps():
        query = jax.ShapeDtypeStruct((step.tokens, step.heads.heads, step.heads.head_dim), jnp.dtype(step.query))
        cases.append(
            KernelCase(
                operation="paged_latent_attention",
                label=str(step),
                function=functools.partial(attend, value_width=step.value_width),
                arguments=(query, *step.cache(), step.layout(), step.batch(backend)),
                max_temporary_bytes=2 * query.size * query.dtype.itemsize + PARTS_BYTES,
                least_compute_capability=(8, 9) if step.stored == "float8_e4m3fn" else (8, 0),
            )
        )
    return cases
