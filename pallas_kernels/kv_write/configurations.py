"""What an engine compiles writing for, at the shapes of real models."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.backend import Backend
from pallas_kernels.case import KernelCase
from pallas_kernels.paged_attention.configurations import steps
from pallas_kernels.paged_latent_attention import configurations as latents


def configurations(device_kind: str = "") -> list[KernelCase]:
    """Writing of each step of attention over pages of keys and values, and of latents, in place."""
    from pallas_kernels.kv_write.api import write_kv

    def write(cache, scales, key, value, layout, batch):
        return write_kv(cache, key, value, layout, batch, scales)

    cases = []
    for step in (*steps(), *latents.steps()):
        new = jax.ShapeDtypeStruct((step.tokens, step.heads.kv_heads, step.heads.head_dim), jnp.dtype(step.query))
        value = None if isinstance(step, latents.LatentStep) else new
        cache, scales = step.cache()
        backend = Backend(implementation="triton", device_kind=device_kind)
        cases.append(
            KernelCase(
                operation="kv_write",
                label=str(step),
                function=write,
                arguments=(cache, scales, new, value, step.layout(), step.batch(backend)),
                donated=(0,) if scales is None else (0, 1),
                # XLA's table of several results
                max_temporary_bytes=64,
                least_compute_capability=(8, 9) if step.stored == "float8_e4m3fn" else (8, 0),
            )
        )
    return cases
