"""The host sees the KV cache as blocks and groups of layers."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCacheGroup:
    """Layers that share one block table.

    Every group takes its blocks from the one pool; a block holds `block_size` tokens of as many layers as the largest
    group has, so all blocks have the same size in bytes.
    """

    #: indices of the model's layers in this group, in order
    layers: tuple[int, ...]
    #: tokens a layer sees, itself included; None: all
    sliding_window: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheConfig:
    block_size: int
    #: blocks of the pool, block 0 (trash) included
    num_blocks: int
    groups: tuple[KVCacheGroup, ...]
    enable_prefix_caching: bool = True


def kv_cache_groups(windows: tuple[int | None, ...]) -> tuple[KVCacheGroup, ...]:
    """Layers by their sliding window, in groups of one size, so that blocks of all groups have the same bytes.

    Args:
        windows: one entry a layer; None: the layer sees everything.

    The group size is the smallest number of layers that share a window; a kind with more layers fills several groups
    (the last one perhaps not whole). When the kinds are nearly equal in number, the larger number wastes less.
    """
    kinds: dict[int | None, list[int]] = {}
    for layer, window in enumerate(windows):
        kinds.setdefault(window, []).append(layer)
    counts = [len(layers) for layers in kinds.values()]
    size = max(counts) if max(counts) < 1.25 * min(counts) else min(counts)
    return tuple(
        KVCacheGroup(layers=tuple(layers[first : first + size]), sliding_window=window)
        for window, layers in kinds.items()
        for first in range(0, len(layers), size)
    )
