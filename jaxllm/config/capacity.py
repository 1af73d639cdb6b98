"""This says how many blocks a request needs, and how many tokens a pool holds.

A group without a window keeps every token. A group with a window keeps, while `max_chunk` tokens are computed in one
step, only those between the first that the chunk's first token sees and the chunk's last one: at most
``live = window - 1 + max_chunk`` tokens, which lie across at most ``(live + block_size - 2) // block_size + 1`` blocks.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxllm.config.cache import CacheConfig, KVCacheGroup


def window_bound(group: KVCacheGroup, block_size: int, max_chunk: int) -> int:
    """Return the most blocks that `group` holds at once for one request of any length; sys.maxsize without a window."""
    if group.sliding_window is None:
        return sys.maxsize
    live = group.sliding_window - 1 + max_chunk
    return (live + block_size - 2) // block_size + 1


def blocks_per_request(
    groups: Sequence[KVCacheGroup], block_size: int, num_tokens: int, *, max_chunk: int | None = None
) -> int:
    """Return the most blocks that one request holds at once until it has `num_tokens` tokens in the cache.

    Args:
        groups: the model's KV-cache groups; each takes blocks of its own.
        block_size: tokens in a block.
        num_tokens: tokens with keys and values.
        max_chunk: most tokens of the request computed in one step; None: all of them.
    """
    chunk = num_tokens if max_chunk is None else min(max_chunk, num_tokens)
    full = -(-num_tokens // block_size)
    return sum(min(full, window_bound(group, block_size, chunk)) for group in groups)


def max_tokens_per_request(config: CacheConfig, *, max_chunk: int, limit: int = 2**31) -> int:
    """Return the most tokens of one request that the whole pool can hold, at most `limit`; 0 when not even one fits."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if blocks_per_request(config.groups, config.block_size, middle, max_chunk=max_chunk) < config.num_blocks:
            low = middle
        else:
            high = middle - 1
    return low


def max_concurrency(config: CacheConfig, num_tokens: int, *, max_chunk: int | None = None) -> float:
    """Return how many requests of `num_tokens` tokens fit into the pool at once (vLLM's "Maximum concurrency")."""
    return (config.num_blocks - 1) / blocks_per_request(
        config.groups, config.block_size, num_tokens, max_chunk=max_chunk
    )
