"""Drives `models.decoder` alone, the way the runner does, over pages that a hostile allocator hands out.

Pages come in random order. What nobody may read is NaN: pages never written, pages that a window has left, page 0.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.config.cache import KVCacheGroup, kv_cache_groups
from jaxllm.layers.attention import Cache, ScaledPages
from jaxllm.layers.context import Context, StepBatch
from jaxllm.models.decoder import forward, logits
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.params import Params
from pallas_kernels.backend import Backend
from pallas_kernels.batch import AttentionBatch
from pallas_kernels.storage import STORAGE, is_scaled


class PagedModel:
    """Sequences of one model, by name; `step` computes some tokens of some of them.

    Args:
        buckets: token counts that steps are padded to; each is compiled once.
        num_seqs: what the sequences of a step are padded to.
        max_len: tokens of the longest sequence.
        cache_dtype: float32, bfloat16, or uint16 (bfloat16's bits); int8 or a float8, with scales, as a CPU has them.
    """

    def __init__(
        self,
        config: DecoderConfig,
        params: Params,
        *,
        block_size: int,
        max_len: int,
        buckets: Sequence[int],
        num_seqs: int = 8,
        cache_dtype: jnp.dtype | type = jnp.float32,
        seed: int = 0,
    ):
        self._config, self._params, self._block_size = config, params, block_size
        self._groups = kv_cache_groups(config.kv_specs)
        self._width = -(-max_len // block_size)
        self._num_seqs, self._buckets = num_seqs, tuple(sorted(buckets))
        self._num_blocks = 1 + num_seqs * self._width * len(self._groups)
        layers = max(len(group.layers) for group in self._groups)
        shape = (layers * self._num_blocks, *config.kv_specs[0].page_shape(block_size))
        self._context, dtype = Context(), jnp.dtype(cache_dtype)
        if is_scaled(dtype):
            backend = Backend() if dtype == jnp.int8 else Backend(float8=dtype.name)
            self._context = Context(backend=backend)
            cache = ScaledPages(jnp.zeros(shape, STORAGE.get(dtype, dtype)), jnp.full(shape[:-1], jnp.nan))
        else:
            cache = jnp.full(shape, _nan(dtype))
        # where it stays, as steps return it: otherwise the first one has a program of its own
        self._cache: Cache = jax.device_put(cache, jax.devices()[0])
        self._free = list(np.random.default_rng(seed).permutation(np.arange(1, self._num_blocks)))
        self._tables: dict[str, list[list[int]]] = {}
        self._lengths: dict[str, int] = {}

    def step(self, work: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
        """Append tokens to sequences. Returns the logits at each of these tokens, float32 [n, vocabulary]."""
        order = sorted(work, key=lambda name: len(work[name]) > 1)
        starts = {name: self._lengths.get(name, 0) for name in order}
        self._release_passed(order)
        for name in order:
            self._reserve(name, starts[name] + len(work[name]))
        total = sum(len(ids) for ids in work.values())
        bucket = next(size for size in self._buckets if size >= total)
        batch = self._pack(work, order, starts, bucket)
        self._cache, scores = _step(self._context, self._config, self._groups, self._params, self._cache, batch)
        scores, out, first = np.asarray(scores), {}, 0
        for name in order:
            out[name] = scores[first : first + len(work[name])]
            first += len(work[name])
        return out

    def _reserve(self, name: str, length: int) -> None:
        self._lengths[name] = length
        for table in self._tables.setdefault(name, [[] for _ in self._groups]):
            while len(table) * self._block_size < length:
                table.append(int(self._free.pop()))

    def _release_passed(self, names: Sequence[str]) -> None:
        """Give back what no later token sees, and poison it."""
        released = []
        for name in names:
            for group, table in zip(self._groups, self._tables.get(name, ()), strict=False):
                if group.sliding_window is None:
                    continue
                live = max(0, self._lengths[name] - group.sliding_window + 1) // self._block_size
                released += [page for page in table[:live] if page]
                table[:live] = [0] * live
        for first in range(0, max(len(released), 1), 16):
            pages = np.zeros(16, np.int32)  # those not needed poison page 0 again
            part = released[first : first + 16]
            pages[: len(part)] = part
            self._cache = _poison(self._num_blocks, self._cache, pages)
        self._free = released + self._free

    def _pack(self, work, order, starts, bucket: int) -> StepBatch:
        counts = np.array([len(work[name]) for name in order], np.int32)
        total, n = int(counts.sum()), len(order)
        tokens, positions, token_seq = np.zeros((3, bucket), np.int32)
        tokens[:total] = np.concatenate([np.asarray(work[name]) for name in order])
        positions[:total] = np.concatenate([starts[name] + np.arange(len(work[name])) for name in order])
        token_seq[:total] = np.repeat(np.arange(n), counts)
        query_start = np.full(self._num_seqs + 1, total, np.int32)
        query_start[:n] = np.cumsum(counts) - counts
        kv_lens = np.zeros(self._num_seqs, np.int32)
        kv_lens[:n] = [self._lengths[name] for name in order]
        tables = np.zeros((len(self._groups), self._num_seqs, self._width), np.int32)
        for row, name in enumerate(order):
            for group, table in enumerate(self._tables[name]):
                tables[group, row, : len(table)] = table
        attention = AttentionBatch(
            token_seq=jnp.asarray(token_seq),
            positions=jnp.asarray(positions),
            token_valid=jnp.arange(bucket) < total,
            query_start=jnp.asarray(query_start),
            kv_lens=jnp.asarray(kv_lens),
            block_tables=jnp.asarray(tables),
            num_decodes=jnp.int32(np.count_nonzero(counts == 1)),
            num_seqs=jnp.int32(n),
        )
        return StepBatch(tokens=jnp.asarray(tokens), attention=attention)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _step(
    context: Context,
    config: DecoderConfig,
    groups: tuple[KVCacheGroup, ...],
    params: Params,
    cache: Cache,
    batch: StepBatch,
) -> tuple[Cache, jax.Array]:
    cache, hidden = forward(context, config, groups, params, cache, batch)
    return cache, logits(context, config, params, hidden)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _poison(num_blocks: int, cache: Cache, pages: jax.Array) -> Cache:
    if isinstance(cache, ScaledPages):
        return dataclasses.replace(cache, scales=_poison(num_blocks, cache.scales, pages))
    layered = cache.reshape(-1, num_blocks, *cache.shape[1:])
    return layered.at[:, pages].set(_nan(cache.dtype)).reshape(cache.shape)


def _nan(dtype: jnp.dtype):
    return jnp.asarray(0x7FC0, dtype) if dtype == jnp.uint16 else jnp.asarray(jnp.nan, dtype)
