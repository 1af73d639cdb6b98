"""What always holds of a scheduler, its pool and its prefix cache, whatever has happened."""

from __future__ import annotations

import collections
import math

from hypothesis.stateful import RuleBasedStateMachine, invariant
from support.fake_device import Done, FakeDevice, prefix_hashes

from jaxllm.config.cache import CacheConfig
from jaxllm.config.scheduler import SchedulerConfig
from jaxllm.engine.cache.block_pool import NULL_BLOCK_ID
from jaxllm.engine.request import Request, RequestStatus
from jaxllm.engine.scheduling.scheduler import Scheduler
from jaxllm.engine.step import SchedulerOutput


class SchedulerInvariants(RuleBasedStateMachine):
    """A machine that has these; nothing is checked before there is a scheduler."""

    scheduler: Scheduler
    config: SchedulerConfig
    cache: CacheConfig
    device: FakeDevice
    in_flight: collections.deque[tuple[SchedulerOutput, Done]]
    requests: list[Request]
    #: block hash -> index of the block in its request, and the device's hashes of its tokens
    contents: dict[bytes, tuple[int, list[int]]]

    def content(self, request: Request) -> list[int]:
        """What the model reads of a request's tokens."""
        return request.all_token_ids

    def salt(self, request: Request) -> str | None:
        """What keys and values depend on besides."""
        return request.cache_salt

    def _waits(self, request: Request) -> bool:
        return request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED)

    @invariant()
    def every_request_is_in_one_place(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        running = [request for request in self.requests if request.status is RequestStatus.RUNNING]
        waiting = [request for request in self.requests if self._waits(request)]
        assert sorted(map(id, running)) == sorted(map(id, self.scheduler.running))
        assert len(waiting) == len(self.scheduler.waiting)
        assert self.scheduler.num_unfinished == len(running) + len(waiting)
        assert len(running) <= (self.config.max_num_active_seqs or self.config.max_num_seqs)
        rows = [request.row for request in running]
        assert sorted(rows + self.scheduler._free_rows) == list(range(self.config.max_num_seqs))
        sampled: collections.Counter[str] = collections.Counter()
        for _, future in self.in_flight:
            sampled.update(future.sampled)
        for request in running + waiting:
            assert request.num_output_placeholders == sampled[request.request_id]
        assert all(
            request.row == -1 and not request.block_tables for request in self.requests if request not in running
        )

    @invariant()
    def every_block_is_in_one_place(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        pool = self.scheduler.kv_cache_manager.pool
        held = collections.Counter(
            block_id
            for request in self.scheduler.running
            for table in request.block_tables
            for block_id in table
            if block_id != NULL_BLOCK_ID
        )
        free = [block.block_id for block in pool.free_queue]
        assert len(set(free)) == len(free) == pool.num_free
        assert NULL_BLOCK_ID not in free
        for block in pool.blocks[1:]:
            assert block.ref_count == held[block.block_id]
            assert (block.ref_count == 0) == (block.block_id in free)
        assert pool.num_used == len(held)
        assert math.isclose(pool.usage, len(held) / (self.cache.num_blocks - 1))
        known = [block for cached in pool._cached for block in cached.values()]
        known += [block for doubles in pool._doubles for same in doubles.values() for block in same]
        assert len(known) == len(set(known))
        assert set(known) == {block for block in pool.blocks if block.block_hash is not None}
        for group, (cached, doubles) in enumerate(zip(pool._cached, pool._doubles, strict=True)):
            assert doubles.keys() <= cached.keys()
            for block_hash, block in cached.items():
                same = [block, *doubles.get(block_hash, ())]
                assert all(block.block_hash == block_hash and block.group == group for block in same)

    @invariant()
    def the_prefix_cache_tells_the_truth(self) -> None:
        """What the cache says that a block holds, the device has written into it."""
        if not hasattr(self, "scheduler"):
            return
        size = self.cache.block_size
        for request in self.requests:
            if request.block_hashes and request.block_hashes[-1] not in self.contents:
                hashes = prefix_hashes(self.content(request), self.salt(request))
                for index, block_hash in enumerate(request.block_hashes):
                    self.contents[block_hash] = (index, hashes[index * size : (index + 1) * size])
        for block in self.scheduler.kv_cache_manager.pool.blocks:
            if block.block_hash is None:
                continue
            index, hashes = self.contents[block.block_hash]
            for offset, token_hash in enumerate(hashes):
                expected = (block.group, index * size + offset, token_hash)
                assert self.device.slots.get((block.block_id, offset)) == expected, "a prefix hit would read rubbish"

    @invariant()
    def the_host_pool_tells_the_truth(self) -> None:
        """What can be hit is there, and every block of the host is free, being filled, or to be hit."""
        if not hasattr(self, "scheduler") or (pool := self.scheduler.kv_cache_manager.host_pool) is None:
            return
        places = [*pool._free, *pool._arriving, *pool._ready.values()]
        assert sorted(places) == list(range(self.cache.num_host_blocks))
        under_way = [host for scheduled, _ in self.in_flight for _, host in scheduled.copies_out]
        assert sorted(pool._arriving) == sorted(under_way)
        assert pool._expected == {key for key in pool._arriving.values() if key is not None}
        assert not pool._expected & pool._ready.keys()
        size = self.cache.block_size
        for (block_hash, group), host in pool._ready.items():
            index, hashes = self.contents[block_hash]
            expected = {offset: (group, index * size + offset, token) for offset, token in enumerate(hashes)}
            assert self.device.host[host] == expected, "a hit would bring rubbish"

    @invariant()
    def windows_hold_no_more_than_promised(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        manager = self.scheduler.kv_cache_manager
        for request in self.scheduler.running:
            held = sum(block_id != NULL_BLOCK_ID for table in request.block_tables for block_id in table)
            assert held <= manager.blocks_needed(request.num_slots)
