"""Encoded items have rows of the device's array, as long as there is room."""

from __future__ import annotations

import numpy as np

from jaxllm.engine.cache.encoder_cache import EncoderCache
from jaxllm.multimodal.items import Grid, MediaItem


def test_encoded_items_stay_until_their_rows_are_wanted():
    def item(name: str, size: int) -> MediaItem:
        return MediaItem(content_hash=name, grid=Grid(2, 2 * size), num_tokens=size, pixels=np.zeros(0))

    cache, (a, b, c, d) = EncoderCache(10), (item(name, size) for name, size in zip("abcd", (4, 4, 4, 10), strict=True))
    rows = {x.content_hash: cache.allocate(x) for x in (a, b)}
    assert sorted([*rows["a"], *rows["b"]]) == sorted(set(rows["a"]) | set(rows["b"])) and min(rows["a"]) > 0
    assert not cache.can_hold(4) and cache.num_used == 8
    cache.release(a)
    assert cache.can_hold(4) and np.array_equal(cache.acquire(a), rows["a"])  # pyright: ignore
    cache.release(a)
    cache.release(b)
    assert cache.acquire(b) is not None
    assert set(cache.allocate(c)) <= {*range(1, 11)} - set(rows["b"])
    assert cache.acquire(a) is None and cache.acquire(b) is not None
    for x in (b, b, c):
        cache.release(x)
    assert not cache.num_used and sorted(cache.allocate(d)) == list(range(1, 11))
    cache.release(d)
    cache.forget(d)
    assert cache.acquire(d) is None and cache.can_hold(10)
