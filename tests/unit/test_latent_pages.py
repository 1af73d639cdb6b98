"""Pages of latents: what a token takes in them, and that they are never copied. By the compiler's own account."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from test_donation import DEEPSEEK, MANY, OPTIONS, size

from jaxllm.config.cache import kv_cache_groups
from jaxllm.models.registry import model_config
from jaxllm.parallel.rules import cache_axes
from pallas_kernels.batch import AttentionBatch, Layout
from pallas_kernels.kv_write.api import write_kv
from pallas_kernels.paged_latent_attention.api import paged_latent_attention
from pallas_kernels.storage import is_scaled

#: (numbers of a latent, of its value), what they are stored as, positions of a block, groups of layers
EVERY = list(itertools.product(((576, 512), (80, 64)), (jnp.float32, jnp.uint16), (16, 64), (1, 2)))
#: every second one: any two values of two columns meet
SHAPES = [shape for i, shape in enumerate(EVERY) if i.bit_count() % 2 == 0]
#: with scales
SHAPES += [((576, 512), jnp.int8, 64, 1), ((80, 64), jnp.uint8, 16, 2)]


def test_a_token_has_one_latent_in_a_layer():
    model = model_config(DEEPSEEK)
    assert model.kv_specs[0].page_shape(16) == (16, 64)
    # DeepSeek-V3: 61 layers of 1,152 bytes
    config = {**DEEPSEEK, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "num_hidden_layers": 61}
    specs = model_config(config).kv_specs
    assert sum(int(np.prod(spec.page_shape(1))) * 2 for spec in specs) == 70_272
    assert len(kv_cache_groups(specs)) == 1
    # every device of a split model has all of it
    assert cache_axes(model) == jax.P()


def test_pages_of_latents_are_not_copied():
    """Loops over two layers, which write a token's latents and attend to what is there: one for each shape."""

    def words(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    queries, caches = [], []
    for (width, _), stored, block_size, groups in SHAPES:
        numbers = jnp.float32 if stored == jnp.float32 else jnp.bfloat16
        queries.append(jax.ShapeDtypeStruct((1, 4, width), numbers))
        pages: Any = jax.ShapeDtypeStruct((2 // groups * MANY, block_size, width), stored)
        scales = jax.ShapeDtypeStruct(pages.shape[:-1], jnp.float32) if is_scaled(stored) else None
        caches.append((pages, scales))
    valid: Any = jax.ShapeDtypeStruct((1,), jnp.bool)
    batch = AttentionBatch(
        token_seq=words(1),
        positions=words(1),
        token_valid=valid,
        query_start=words(2),
        kv_lens=words(1),
        block_tables=words(2, 1, 4),
        num_decodes=words(),
        num_seqs=words(),
        decode_only=True,
    )

    def layers(cache: Any, query: jax.Array, value_width: int, groups: int, batch: AttentionBatch) -> Any:
        batch = dataclasses.replace(batch, block_tables=batch.block_tables[:groups])
        layer: Any = np.arange(2, dtype=np.int32)
        window: Any = np.full(2, 30, np.int32)
        places = Layout(group=layer % groups, page_offset=layer // groups * np.int32(MANY), window=window)

        def one(carry: tuple[Any, jax.Array], place: Layout) -> tuple[tuple[Any, jax.Array], None]:
            cache, query = carry
            cache = write_kv(cache[0], query[:, :1], None, place, batch, cache[1])
            how = {"scale": 1.0, "value_width": value_width, "kv_scales": cache[1]}
            seen = paged_latent_attention(query, cache[0], place, batch, **how)
            return (cache, query.at[..., :value_width].set(seen)), None

        return lax.scan(one, (cache, query), places)[0]

    def step(caches: list[Any], queries: list[jax.Array], batch: AttentionBatch) -> Any:
        return [
            layers(cache, query, value_width, groups, batch)
            for cache, query, ((_, value_width), *_, groups) in zip(caches, queries, SHAPES, strict=True)
        ]

    program = jax.jit(step, donate_argnums=0).lower(caches, queries, batch)
    memory = program.compile(OPTIONS).memory_analysis()
    assert memory is not None and memory.alias_size_in_bytes == size(caches)
    assert memory.temp_size_in_bytes < 2 * MANY
