"""What lives on the device between steps, besides the weights: its arrays, and their bytes."""
# Trees of shapes have the form of `State`, with other leaves.
# pyright: reportArgumentType=false

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.layers.attention import ScaledPages
from jaxllm.models.model import ModelConfig
from jaxllm.parallel.mesh import TENSOR, own_rows
from jaxllm.parallel.rules import cache_axes
from jaxllm.runner.buckets import draft_buckets
from jaxllm.runner.capacities import array_capacity
from jaxllm.runner.heads.constraints import ConstraintShape
from jaxllm.runner.heads.pooling_step import PoolingState
from jaxllm.runner.heads.sampling_step import DRAFTING_COLUMNS, State
from jaxllm.runner.memory.plan import reservable_memory
from jaxllm.runner.runner_config import RunnerConfig
from jaxllm.speculative.drafter import ReadingDrafter
from jaxllm.speculative.suffix import KEPT_TOKENS
from pallas_kernels.cpu_ffi.untouched import is_large
from pallas_kernels.storage import STORAGE, is_scaled


def device_state(config: RunnerConfig, num_blocks: int) -> State | PoolingState:
    """Shapes of what steps hand on to each other, with their shardings.

    Args:
        num_blocks: of the pool; the cache's arrays may have more (`array_blocks`).
    """
    arrays = _Arrays(config, array_blocks(config, num_blocks))
    rows, cache, encoded = config.row_capacity + 1, arrays.cache(), arrays.encoded()
    pooler, drafter, is_end = config.pooler, config.drafter, _is_first(config) or _is_last(config)
    if pooler is not None:
        keeps = pooler.seq_pooling_type != "LAST"
        pooled = arrays.own((rows, config.model.hidden_size), jnp.float32) if keeps else None
        return PoolingState(cache=cache, pooled=pooled, encoded=encoded)
    return State(
        cache=cache,
        tokens=arrays.own((rows, config.context_capacity), jnp.int32) if is_end else None,
        drafting=None if drafter is None else arrays.own((rows, DRAFTING_COLUMNS), jnp.int32),
        draft_cache=arrays.draft_cache(drafter) if isinstance(drafter, ReadingDrafter) else None,
        outputs=arrays.own((1, 1 + KEPT_TOKENS), jnp.int32) if config.scheduler.keeps_outputs else None,
        encoded=encoded,
    )


def array_blocks(config: RunnerConfig, num_blocks: int) -> int:
    """Blocks that the cache's arrays have, of which the pool hands out `num_blocks`: more where they take no memory
    until they are written, so that engines with other pools find each other's programs.
    """
    # the cache of a model that drafts can be small, and is zeroed then; so are the scales of heads of 128 numbers
    if not config.backend.cpu_untouched or config.target.mesh is not None or config.draft_model is not None:
        return num_blocks
    blocks = array_capacity(num_blocks, config.block_bytes, reservable_memory())
    return blocks if all(map(is_large, jax.tree.leaves(_Arrays(config, blocks).cache()))) else num_blocks


def spare_bytes(config: RunnerConfig, num_blocks: int) -> int:
    """Of a state for a pool of `num_blocks`, the blocks that the pool never hands out: nobody writes them, and they
    take no memory.
    """
    return (array_blocks(config, num_blocks) - num_blocks) * config.block_bytes


def state_bytes(config: RunnerConfig) -> int:
    """Of the state without the cache, of the empty constraint buffers, of prompts' vectors, pictures and adapters."""
    state = device_state(config, 1)
    caches: dict[str, Any] = {"cache": None, **({} if config.draft_model is None else {"draft_cache": None})}
    caches |= {"encoded": None} if config.encoder_patches else {}
    words = jax.tree.leaves(dataclasses.replace(state, **caches))
    samples = config.pooler is None and _is_last(config)
    constraint_row = 0 if not samples else ConstraintShape(config.model.vocab_size).row_size
    own = sum(math.prod(array.shape) for array in words) // config.target.replicas
    # of launches with drafts, of each position
    sizes = [bucket.seqs for bucket in draft_buckets(config.scheduler.max_draft_seqs)]
    rows = config.row_capacity + (1 + config.scheduler.num_drafts) * sum(sizes)
    bytes_of_words = 4 * (own + rows * constraint_row)
    return bytes_of_words + _embeddings_bytes(config) + encoder_bytes(config) + config.adapter_bytes


def encoder_bytes(config: RunnerConfig) -> int:
    """Of the cache of encoded pictures, and of the pixels that two launches bring."""
    if config.vision is None:
        return 0
    numbers = (1 + config.scheduler.encoder_cache_tokens) * config.model.hidden_size
    pixels = 2 * config.encoder_patches * config.vision.patch_numbers
    return numbers * jnp.dtype(config.dtype).itemsize + pixels


def _embeddings_bytes(config: RunnerConfig) -> int:
    """Of the vectors that two steps bring, and of the zeros of every bucket, which double from each to the next."""
    if not config.prompt_embeds or not _is_first(config):
        return 0
    numbers = config.scheduler.max_num_batched_tokens * config.model.hidden_size
    return 4 * numbers * jnp.dtype(config.dtype).itemsize


def _is_first(config: RunnerConfig) -> bool:
    """Whether it has the model's first layers."""
    return config.stage is None or config.stage.is_first


def _is_last(config: RunnerConfig) -> bool:
    return config.stage is None or config.stage.is_last


class _Arrays:
    """Shapes of arrays, each with its sharding."""

    def __init__(self, config: RunnerConfig, num_blocks: int) -> None:
        self.config, self.num_blocks, self.mesh = config, num_blocks, config.target.mesh
        mesh = self.mesh
        self.sharding = config.target.sharding if mesh is None else jax.sharding.NamedSharding(mesh, own_rows(mesh))

    def own(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        """What each replica has one of, on the first axis."""
        replicas = self.config.target.replicas
        return jax.ShapeDtypeStruct((replicas * shape[0], *shape[1:]), dtype, sharding=self.sharding)

    def cache(self) -> Any:
        config = self.config
        return self._cache_of(config.model, config.layers_per_group, config.page_shape)

    def draft_cache(self, drafter: ReadingDrafter) -> Any:
        config, model = self.config, drafter.model
        pages = self._cache_of(model, model.num_layers, config.draft_page_shape(model))
        kept = jnp.dtype(config.dtype)
        kept = STORAGE.get(kept, kept) if config.platform == "cpu" else kept
        return drafter.cache(pages, self.own((self.num_blocks, drafter.kept_numbers), kept))

    def encoded(self) -> jax.ShapeDtypeStruct | None:
        """The vectors of pictures; None: there are none."""
        config = self.config
        if config.vision is None:
            return None
        shape = 1 + config.scheduler.encoder_cache_tokens, config.model.hidden_size
        return self.own(shape, jnp.dtype(config.dtype))

    def _cache_of(self, model: ModelConfig, layers: int, page_shape: tuple[int, ...]) -> Any:
        dtype = self.config.cache_dtype
        numbers = self._pages(model, layers, page_shape, dtype)
        if not is_scaled(dtype):
            return numbers
        return ScaledPages(numbers, self._pages(model, layers, page_shape[:-1], jnp.float32))

    def _pages(self, model: ModelConfig, layers: int, page_shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        found = self.own((layers * self.num_blocks, *page_shape), dtype)
        if self.mesh is None:
            return found
        axes = cache_axes(model, replicas=self.config.target.replicas)
        heads = found.shape[1] * (self.config.target.mesh_sizes[TENSOR] if TENSOR in axes else 1)
        split = jax.sharding.NamedSharding(self.mesh, axes)
        return jax.ShapeDtypeStruct((found.shape[0], heads, *found.shape[2:]), dtype, sharding=split)
