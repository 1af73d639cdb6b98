"""The programs that copy blocks of the KV cache out of it and into it, in lots of a few sizes.

One gathers a lot into an array of its own, the other scatters such an array into the cache, which is donated: neither
copies the cache. What a lot does not fill comes from the trash block, or goes there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

#: blocks of a lot
LOT_SIZES = (2, 16)
#: lots under way, in each direction
MOST_LOTS = 4
#: blocks that there is room for beside the cache
STAGED_BLOCKS = 2 * (MOST_LOTS + 1) * LOT_SIZES[-1]
GATHER, SCATTER = "gather blocks", "scatter blocks"


def gather_blocks(num_layers: int, cache: Any, block_ids: jax.Array) -> Any:
    """The contents of blocks, of every array of a cache: [N, num_layers, ...] of [num_layers * num_blocks, ...].

    Args:
        num_layers: layers of a block; static.
        block_ids: i32 [N].
    """
    return jax.tree.map(lambda pages: pages[_pages(num_layers, pages, block_ids)], cache)


def scatter_blocks(num_layers: int, cache: Any, block_ids: jax.Array, blocks: Any) -> tuple[Any, jax.Array]:
    """The cache, donated, with contents that `gather_blocks` has returned; and `block_ids`, there when it is done."""

    def one(pages: jax.Array, new: jax.Array) -> jax.Array:
        return pages.at[_pages(num_layers, pages, block_ids)].set(new, mode="promise_in_bounds")

    return jax.tree.map(one, cache, blocks), block_ids


def _pages(num_layers: int, pages: jax.Array, block_ids: jax.Array) -> jax.Array:
    """i32 [N, num_layers]: where the cache has each layer's part of the blocks (`pallas_kernels.storage`)."""
    num_blocks = pages.shape[0] // num_layers
    return block_ids[:, None] + jnp.arange(num_layers, dtype=jnp.int32) * num_blocks


class BlockCopies:
    """How they are lowered.

    Args:
        num_layers: layers of a block.
        cache: a tree of `jax.ShapeDtypeStruct` with shardings.
        words, lower: `Programs._words` and `Programs._lowered`.
    """

    KEYS = tuple((kind, size) for kind in (GATHER, SCATTER) for size in LOT_SIZES)

    def __init__(
        self, num_layers: int, cache: Any, words: Callable[[int], jax.ShapeDtypeStruct], lower: Callable[..., Any]
    ):
        self._num_layers, self._cache, self._words, self._lower = num_layers, cache, words, lower

    def shapes(self, lot_size: int) -> Any:
        """Of a lot's contents, with shardings: a tree as the cache is."""

        def one(pages: Any) -> jax.ShapeDtypeStruct:
            sharding = pages.sharding
            if isinstance(sharding, jax.sharding.NamedSharding):
                # each device has its part of a page
                axes = jax.P(None, None, *sharding.spec[1:])
                sharding = jax.sharding.NamedSharding(sharding.mesh, axes)
            shape = lot_size, self._num_layers, *pages.shape[1:]
            return jax.ShapeDtypeStruct(shape, pages.dtype, sharding=sharding)

        return jax.tree.map(one, self._cache)

    def lowerings(self) -> Mapping[str, Callable[[int], jax.stages.Lowered]]:
        """What lowers the program of each kind, of the size of a lot."""
        return {GATHER: self._lower_gather, SCATTER: self._lower_scatter}

    def _lower_gather(self, lot_size: int) -> jax.stages.Lowered:
        function = functools.partial(gather_blocks, self._num_layers)
        return self._lower(function, self._cache, self._words(lot_size), out=_specs(self.shapes(lot_size)))

    def _lower_scatter(self, lot_size: int) -> jax.stages.Lowered:
        function = functools.partial(scatter_blocks, self._num_layers)
        args = self._cache, self._words(lot_size), self.shapes(lot_size)
        return self._lower(function, *args, donate=0, out=(_specs(self._cache), jax.P()))


def _specs(shapes: Any) -> Any:
    return jax.tree.map(lambda shape: getattr(shape.sharding, "spec", jax.P()), shapes)
