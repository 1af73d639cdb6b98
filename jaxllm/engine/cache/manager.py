"""Which blocks each running request holds, per group of layers, and which prefixes can be had from the cache.

Every request has one block table per KV-cache group, and all its tables have the same length: entry ``i`` is the
block of positions ``i * block_size`` and following. Where a sliding window has passed, the entry is the null block.

A block goes into the prefix cache when its tokens are scheduled *and* known: later requests of the same step may
share it, because the device writes all keys and values of a step before it reads any. A token that is sampled but not
read yet has no hash, so its block waits until it has been read; blocks of outputs also wait for each other.

Where there is a pool of blocks in the host's memory (`cache.host_pool`), a prefix may be had from both: block after
block, from wherever it is.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING

from jaxllm.config.capacity import blocks_per_request, max_tokens_per_request, window_bound
from jaxllm.engine.cache.block_hash import BlockHasher
from jaxllm.engine.cache.block_pool import NULL_BLOCK_ID, BlockPool
from jaxllm.engine.cache.host_pool import HostPool
from jaxllm.engine.cache.lost_hits import LostHits
from jaxllm.engine.cache.prefix_cache_stats import PrefixCacheStats

if TYPE_CHECKING:
    from jaxllm.config.cache import CacheConfig
    from jaxllm.engine.request import Request

#: tokens of outputs that go into the prefix cache together; what is left at a request's end goes then
OUTPUT_LOT = 64


@dataclasses.dataclass(slots=True, kw_only=True)
class PrefixHit:
    """The longest cached prefix of a request. Nobody holds the blocks yet."""

    #: a multiple of the block size, less than the request's tokens
    num_tokens: int
    #: per group ``num_tokens / block_size`` ids; null where the group's window has passed, or the host has the block
    block_ids: tuple[list[int], ...]
    #: (group, index of the block, the host's block): what is to be copied in
    from_host: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)


class KVCacheManager:
    """Gives blocks of one pool to requests.

    Args:
        config: pool and groups.
        max_chunk: most tokens of one request in one step (`max_num_batched_tokens`), which bounds what a group with
            a sliding window holds.
    """

    def __init__(self, config: CacheConfig, *, max_chunk: int) -> None:
        self.config = config
        self.block_size = config.block_size
        self.max_chunk = max_chunk
        #: None: what is evicted is lost
        self.host_pool = HostPool(config.num_host_blocks) if config.num_host_blocks else None
        self.pool = BlockPool(config.num_blocks, len(config.groups), self._evicted)
        self.prefix_cache_stats = PrefixCacheStats()
        #: of what the device's prefix cache did not have, and the host's pool was asked for
        self.external_stats = PrefixCacheStats()
        self._hasher = BlockHasher(config.block_size)
        self._caching = config.enable_prefix_caching
        #: full blocks of outputs that go into the prefix cache together, while their request runs
        self._output_lot = max(OUTPUT_LOT // config.block_size, 1)
        self._num_groups = len(config.groups)
        self._full_groups = [g for g, group in enumerate(config.groups) if group.sliding_window is None]
        self._windows = [
            (g, group.sliding_window) for g, group in enumerate(config.groups) if group.sliding_window is not None
        ]
        self._bounds = [window_bound(group, config.block_size, max_chunk) for group in config.groups]
        #: None: nothing is cached, or all layers have windows
        self.lost_hits: LostHits | None = None
        if self._caching and self._full_groups:
            first = self._full_groups[0]
            self.lost_hits = LostHits(config.block_size, lambda block_hash: self.is_cached(block_hash, first))

    def _evicted(self, block_hash: bytes, group: int, block_id: int) -> None:
        if self.host_pool is not None:
            self.host_pool.store(block_hash, group, block_id)
        if self.lost_hits is not None and group == self._full_groups[0]:
            self.lost_hits.evicted(block_hash)

    @property
    def usage(self) -> float:
        """Share of the pool that requests hold, in [0, 1]."""
        return self.pool.usage

    @property
    def max_tokens_per_request(self) -> int:
        """Most tokens that the whole pool can hold for one request that is alone in it."""
        return max_tokens_per_request(self.config, max_chunk=self.max_chunk)

    def blocks_needed(self, num_tokens: int) -> int:
        """Most blocks that one request holds at once until `num_tokens` of its tokens are in the cache."""
        return blocks_per_request(self.config.groups, self.block_size, num_tokens, max_chunk=self.max_chunk)

    def missing_blocks(self, request: Request) -> int:
        """Blocks that a running request lacks for all the tokens it has, sampled and unread ones included."""
        num_tokens = len(request.all_token_ids) + request.num_output_placeholders
        # The last token of a request is never computed.
        full = -(-min(num_tokens, request.max_total_tokens - 1) // self.block_size)
        return sum(
            max(0, min(full - live, bound) - (len(table) - live))
            for table, live, bound in zip(request.block_tables, request.first_live_blocks, self._bounds, strict=True)
        )

    def prompt_hashes(self, request: Request) -> list[bytes]:
        """Of the blocks of a prompt that the cache may have; [] where it is not asked."""
        if not self._caching or request.skip_reading_prefix_cache:
            return []
        most = (request.num_prompt_tokens - 1) // self.block_size
        return self._hasher.extend(request, most)[:most]

    def get_computed_blocks(self, request: Request) -> PrefixHit:
        """Find the longest cached prefix that every group agrees on. Holds none of its blocks.

        The last token is never part of it, because its logits are wanted. A group without a window needs every block
        of the prefix; a group with one needs only the last ``ceil((window - 1) / block_size)``.
        """
        if not self._caching or request.skip_reading_prefix_cache:
            return PrefixHit(num_tokens=0, block_ids=tuple([] for _ in range(self._num_groups)))
        longest = (len(request.all_token_ids) - 1) // self.block_size
        hashes = self._hasher.extend(request, longest)
        is_cached = self.is_cached
        for group in self._full_groups:
            for index in range(longest):
                if not is_cached(hashes[index], group):
                    longest = index
                    break
        # A shorter prefix can lack blocks that a longer one did not need, so go round until no group objects.
        agreed = False
        while not agreed:
            agreed = True
            for group, window in self._windows:
                length = self._longest_windowed_prefix(hashes, longest, group, window)
                if length < longest:
                    longest = length
                    agreed = False
        num_tokens = longest * self.block_size
        block_ids: list[list[int]] = []
        from_host: list[tuple[int, int, int]] = []
        for group, first in enumerate(self._first_live_blocks(num_tokens)):
            ids = [NULL_BLOCK_ID] * first
            for index in range(first, longest):
                block_id = self.pool.cached_block(hashes[index], group)
                if block_id is None:
                    assert self.host_pool is not None
                    host_id = self.host_pool.find(hashes[index], group)
                    assert host_id is not None
                    from_host.append((group, index, host_id))
                ids.append(NULL_BLOCK_ID if block_id is None else block_id)
            block_ids.append(ids)
        return PrefixHit(num_tokens=num_tokens, block_ids=tuple(block_ids), from_host=from_host)

    def is_cached(self, block_hash: bytes, group: int) -> bool:
        """Whether the device or the host has a block of `group` with these contents."""
        if self.pool.cached_block(block_hash, group) is not None:
            return True
        return self.host_pool is not None and self.host_pool.find(block_hash, group) is not None

    def num_external_tokens(self, hit: PrefixHit) -> int:
        """Tokens of a hit for which a block is copied in from the host."""
        return len({index for _, index, _ in hit.from_host}) * self.block_size

    def _longest_windowed_prefix(self, hashes: list[bytes], longest: int, group: int, window: int) -> int:
        """Largest number of blocks, at most `longest`, whose last blocks within the window are all cached."""
        needed = -(-(window - 1) // self.block_size)
        run = 0
        for index in range(longest - 1, -1, -1):
            if run >= needed:
                return index + 1 + run
            run = run + 1 if self.is_cached(hashes[index], group) else 0
        return run

    def _first_live(self, num_computed_tokens: int, window: int) -> int:
        """Index of the first block that the token at position `num_computed_tokens` still sees."""
        return max(0, num_computed_tokens - window + 1) // self.block_size

    def _first_live_blocks(self, num_computed_tokens: int) -> list[int]:
        return [
            0 if group.sliding_window is None else self._first_live(num_computed_tokens, group.sliding_window)
            for group in self.config.groups
        ]

    def can_fit(self, request: Request, hit: PrefixHit) -> bool:
        """Whether the free blocks hold all tokens of a request that is not running, given what the cache has of it."""
        full = -(-len(request.all_token_ids) // self.block_size)
        needed = 0
        passed = self._first_live_blocks(hit.num_tokens)
        for ids, bound, first in zip(hit.block_ids, self._bounds, passed, strict=True):
            live = [block_id for block_id in ids if block_id != NULL_BLOCK_ID]
            shared = len(live) - self.pool.count_free(live)
            # Past the bound, a shared block may have left the window by the time the last one is needed.
            needed += min(full - first - shared, bound)
        return needed <= self.pool.num_free

    def allocate_slots(
        self, request: Request, num_new_tokens: int, hit: PrefixHit | None = None
    ) -> list[list[int]] | None:
        """Make room for the next `num_new_tokens` tokens of a request.

        Args:
            request: running, or about to be admitted; its `num_computed_tokens` does not count the new tokens yet.
            num_new_tokens: at least 1.
            hit: what the cache has, for a request about to be admitted; None for a running one.

        Returns:
            Per group the ids of the blocks added to its table (with `hit`: behind the hit's blocks), or None when
            too few are free. Then nothing is held that was not held before, and no reference count of a block that
            the request still needs has changed.
        """
        pool = self.pool
        if hit is None:
            if self._windows:
                # Before counting: what the window has passed may be just what is needed.
                self._release_passed_blocks(request)
            missing = -(-(request.num_computed_tokens + num_new_tokens - request.num_slots) // self.block_size)
            if missing <= 0:
                return [[] for _ in request.block_tables]
            needed = missing * self._num_groups
        else:
            missing = -(-num_new_tokens // self.block_size)
            # Cached blocks that nobody holds are in the free list, so taking them uses it up, too.
            needed = missing * self._num_groups + sum(pool.count_free(ids) for ids in hit.block_ids)
            needed += len(hit.from_host)
        if needed > pool.num_free:
            return None
        if hit is not None:
            for ids in hit.block_ids:
                pool.touch(ids)
            self._begin_tables(request, hit)
            if hit.from_host:
                self._copy_in(request, hit)
        ids = pool.get_new_blocks(missing * self._num_groups)
        request.num_slots += missing * self.block_size
        if self._num_groups == 1:
            request.block_tables[0].extend(ids)
            return [ids]
        new_blocks: list[list[int]] = []
        for group, table in enumerate(request.block_tables):
            added = ids[group * missing : (group + 1) * missing]
            table.extend(added)
            new_blocks.append(added)
        return new_blocks

    def _begin_tables(self, request: Request, hit: PrefixHit) -> None:
        num_blocks = hit.num_tokens // self.block_size
        request.block_tables = tuple(list(ids) for ids in hit.block_ids)
        request.first_live_blocks = self._first_live_blocks(hit.num_tokens)
        request.num_slots = request.num_computed_tokens = hit.num_tokens
        request.num_registered_blocks = num_blocks
        request.register_at = (num_blocks + 1) * self.block_size if self._caching else sys.maxsize

    def _copy_in(self, request: Request, hit: PrefixHit) -> None:
        """Have what the host has of a hit copied into new blocks, which can be hit like any others from here on."""
        host_pool = self.host_pool
        assert host_pool is not None
        # before new blocks evict others, which go to the host
        host_pool.hold(host_id for _, _, host_id in hit.from_host)
        block_ids = self.pool.get_new_blocks(len(hit.from_host))
        for block_id, (group, index, _) in zip(block_ids, hit.from_host, strict=True):
            block_hash = request.block_hashes[index]
            request.block_tables[group][index] = block_id
            self.pool.register([block_id], [block_hash], group)
            host_pool.load(block_hash, group, block_id)

    def _release_passed_blocks(self, request: Request) -> None:
        for group, window in self._windows:
            table = request.block_tables[group]
            first = request.first_live_blocks[group]
            # where drafts were wrong, the next query is as far back as this
            sure = request.num_computed_tokens - request.num_unsure_tokens
            live = min(self._first_live(sure, window), len(table))
            if live > first:
                self.pool.free(table[first:live])
                table[first:live] = [NULL_BLOCK_ID] * (live - first)
                request.first_live_blocks[group] = live

    def cache_full_blocks(self, request: Request) -> None:
        """Register the request's full blocks whose tokens are scheduled and known, as far as it is not done yet; none
        where it holds none.
        """
        if not self._caching or not request.block_tables:
            return
        first = request.num_registered_blocks
        full = min(request.num_computed_tokens, len(request.all_token_ids)) // self.block_size
        if full <= first:
            return
        hashes = self._hasher.extend(request, full)[first:full]
        for group, table in enumerate(request.block_tables):
            self.pool.register(table[first:full], hashes, group)
        request.num_registered_blocks = full
        # a call for every block costs more than hashing it
        lot = 1 if full * self.block_size < request.num_prompt_tokens else self._output_lot
        request.register_at = (full + lot) * self.block_size

    def free(self, request: Request) -> None:
        """Give back all blocks of a request; registered ones can be hit until they are handed out again."""
        if not request.block_tables:
            return
        if self._num_groups == 1:
            self.pool.free(request.block_tables[0])
        else:
            # By position, not by group: the tail of every group's table goes before the beginning of any.
            self.pool.free([block_id for ids in zip(*request.block_tables, strict=True) for block_id in ids])
        request.block_tables = ()
        request.first_live_blocks = []
        request.num_slots = 0
        request.num_registered_blocks = 0
        request.register_at = sys.maxsize

    def reset_prefix_cache(self, *, host_pool: bool = False) -> bool:
        """Forget all cached prefixes. Does nothing and returns False while a request holds blocks.

        Args:
            host_pool: those of the host's pool as well, which stay otherwise: they are as right as they were.
        """
        if not self.pool.reset_prefix_cache():
            return False
        self.prefix_cache_stats.forget_recent()
        if self.lost_hits is not None:
            self.lost_hits.forget()
        if host_pool and self.host_pool is not None:
            self.host_pool.reset()
            self.external_stats.forget_recent()
        return True
