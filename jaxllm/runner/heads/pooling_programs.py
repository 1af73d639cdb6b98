"""The compiled programs of a pooling engine."""

from __future__ import annotations

import functools
from pathlib import Path

import jax

from jaxllm.models.pooler import PoolingModel
from jaxllm.parallel.rules import CACHE
from jaxllm.runner.buckets import Bucket
from jaxllm.runner.compile.programs import ALLOCATOR, Compiler, Key
from jaxllm.runner.heads.pooling_step import PoolingState, PoolingStepConfig, pooling_step, token_step
from jaxllm.runner.packing import pooling_packing


class PoolingPrograms(Compiler):
    """A pooling step for every bucket, and what makes results of each of its tokens.

    Args:
        params, state: trees of `jax.ShapeDtypeStruct` with shardings.
        max_num_seqs: rows.
        platform, cache_dir: as for `Programs`.
    """

    def __init__(
        self,
        config: PoolingStepConfig,
        buckets: tuple[Bucket, ...],
        table_width: int,
        params: PoolingModel,
        state: PoolingState,
        max_num_seqs: int,
        *,
        platform: str,
        cache_dir: Path | None,
    ):
        made_from = (config, buckets, table_width, params, state, max_num_seqs)
        super().__init__(params, state, platform=platform, cache_dir=cache_dir, source=made_from)
        self._config = config
        self.packings = {b: pooling_packing(b, len(config.groups), table_width) for b in buckets}
        self.max_num_seqs = max_num_seqs

    def lower_pooling(self, bucket: Bucket) -> jax.stages.Lowered:
        packing = self.packings[bucket]
        function = functools.partial(pooling_step, self._config, bucket, packing)
        out = PoolingState(cache=CACHE, pooled=jax.P()), jax.P(), jax.P()  # pyright: ignore[reportArgumentType]
        words = self._words(packing.size)
        return self._lowered(function, self._params, self._state, words, donate=1, out=out)

    def lower_tokens(self, bucket: Bucket) -> jax.stages.Lowered:
        packing = self.packings[bucket]
        function = functools.partial(token_step, self._config, packing)
        hidden = jax.ShapeDtypeStruct(
            (bucket.tokens, self._config.model.hidden_size), self._params.body.embedding.dtype, sharding=self.sharding
        )
        return self._lowered(function, self._params.head, hidden, self._words(packing.size))

    def activation_bytes(self) -> int:
        """Temporaries and outputs of the largest programs, which are compiled for it and kept."""
        largest = next(reversed(self.packings))
        keys: tuple[Key, ...] = (("pool", largest), ("tokens", largest))
        self._compile((*keys, ALLOCATOR), progress=False)
        # what one step returns lives until it is read, which may be after the next was launched
        return sum(self._needed_bytes(key) for key in keys)

    def compile_all(self, progress: bool) -> None:
        """Compile what is missing."""
        self._compile([(kind, bucket) for kind in ("pool", "tokens") for bucket in self.packings], progress)

    def _lower(self, key: Key) -> jax.stages.Lowered:
        lower = {"pool": self.lower_pooling, "tokens": self.lower_tokens, "allocate": self.lower_allocator}
        return lower[key[0]](*key[1:])

    def pool(self, bucket: Bucket) -> jax.stages.Compiled:
        return self._get(("pool", bucket))

    def tokens(self, bucket: Bucket) -> jax.stages.Compiled:
        return self._get(("tokens", bucket))
