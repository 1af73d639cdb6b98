"""Hits of the prefix cache that were lost: what it had and gave away, and what it has for somebody else's salt."""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING

from jaxllm.engine.cache.block_hash import BlockHasher

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxllm.engine.request import Request

#: most hashes that are remembered of each kind, about 10 MB
MOST_REMEMBERED = 1 << 16


class LostHits:
    """Remembers the hashes of blocks that were evicted, and what was computed under which salt.

    Of a pool that is used in turn, least recently used first, a block that was evicted `n` evictions ago would still be
    there if the pool had `n` blocks more (Mattson et al. 1970): so the farthest one says how many would have been
    enough.

    Args:
        is_cached: whether the first group of layers has a block with this hash.
    """

    def __init__(self, block_size: int, is_cached: Callable[[bytes], bool]) -> None:
        self._hasher, self._is_cached = BlockHasher(block_size), is_cached
        self._block_size = block_size
        #: hash -> number of its eviction, the oldest first
        self._evicted: collections.OrderedDict[bytes, int] = collections.OrderedDict()
        self._num_evictions = 0
        #: hash of a block without a salt -> the salt under which it was computed first
        self._salts: collections.OrderedDict[bytes, str | None] = collections.OrderedDict()
        self._sees_salts = False
        #: tokens that would have been hits, had nothing been evicted, and blocks that the pool lacked for that
        self.evicted_tokens = self.missing_blocks = 0
        #: tokens that would have been hits, had their requests the same salt, and these requests
        self.salted_tokens = self.salted_requests = 0

    def evicted(self, block_hash: bytes) -> None:
        """A block of the first group is handed out, and no other has what it had cached."""
        self._num_evictions += 1
        self._evicted[block_hash] = self._num_evictions
        self._evicted.move_to_end(block_hash)
        if len(self._evicted) > MOST_REMEMBERED:
            self._evicted.popitem(last=False)

    def count(self, request: Request, num_hits: int) -> None:
        """Take in the first admission of a request, `num_hits` tokens of which the cache had."""
        size = self._block_size
        first, last = num_hits // size, (len(request.all_token_ids) - 1) // size
        lost, farthest = 0, 0
        for index in range(first, min(last, len(request.block_hashes))):
            block_hash = request.block_hashes[index]
            if not self._is_cached(block_hash):
                number = self._evicted.get(block_hash)
                if number is None:
                    break
                farthest = max(farthest, self._num_evictions - number + 1)
            lost += 1
        if farthest:
            self.evicted_tokens += lost * size
            # they are taken out of the free list while the rest of the prompt takes new blocks
            self.missing_blocks = max(self.missing_blocks, farthest + last)
        if request.cache_salt is not None or self._sees_salts:
            self._count_salted(request, first, last)

    def _count_salted(self, request: Request, first: int, last: int) -> None:
        self._sees_salts = True
        if request.prompt_embeds is not None:
            return
        ids = request.all_token_ids[: last * self._block_size]
        hashes = self._hasher.hash_prompt(ids, None, None, request.extra_keys)
        lost = 0
        for index, block_hash in enumerate(hashes):
            salt = self._salts.get(block_hash, request.cache_salt)
            if index >= first and salt != request.cache_salt and lost == index - first:
                lost += 1
            self._salts.setdefault(block_hash, request.cache_salt)
        if lost:
            self.salted_requests += 1
            self.salted_tokens += lost * self._block_size
        while len(self._salts) > MOST_REMEMBERED:
            self._salts.popitem(last=False)

    def forget(self) -> None:
        """The cache was emptied on purpose: what it lacks now was not evicted."""
        self._evicted.clear()
        self._salts.clear()
