"""Block tables, prefix hits and capacity, with every number worked out by hand or by brute force."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.api.sampling_params import SamplingParams
from jaxllm.config.cache import CacheConfig, KVCacheGroup
from jaxllm.config.capacity import blocks_per_request, max_concurrency, max_tokens_per_request, window_bound
from jaxllm.engine.cache.manager import KVCacheManager
from jaxllm.engine.cache.prefix_cache_stats import PrefixCacheStats
from jaxllm.engine.request import Request


def cache(*windows: int | None, num_blocks: int = 100, block_size: int = 4, caching: bool = True) -> CacheConfig:
    groups = tuple(KVCacheGroup(layers=(index,), sliding_window=window) for index, window in enumerate(windows))
    return CacheConfig(block_size=block_size, num_blocks=num_blocks, groups=groups, enable_prefix_caching=caching)


def manager(*windows: int | None, max_chunk: int = 1000, **kwargs: int | bool) -> KVCacheManager:
    return KVCacheManager(cache(*windows, **kwargs), max_chunk=max_chunk)  # type: ignore[arg-type]


def request(tokens: int | list[int], **kwargs: object) -> Request:
    ids = list(range(tokens)) if isinstance(tokens, int) else tokens
    return Request("r", ids, SamplingParams(), **kwargs)  # type: ignore[arg-type]


def admit(kv: KVCacheManager, new: Request, count: int | None = None) -> int:
    """Admit a request and schedule `count` of its tokens (default: all); returns its prefix hits."""
    hit = kv.get_computed_blocks(new)
    count = len(new.all_token_ids) - hit.num_tokens if count is None else count
    assert kv.allocate_slots(new, count, hit) is not None
    advance(kv, new, count)
    return hit.num_tokens


def advance(kv: KVCacheManager, running: Request, count: int) -> None:
    running.num_computed_tokens += count
    kv.cache_full_blocks(running)


@pytest.mark.parametrize(
    ("length", "hits"),
    [(4, 0), (5, 4), (7, 4), (8, 4), (9, 8), (16, 12), (17, 16), (30, 16)],
)
def test_the_last_token_is_never_a_hit(length: int, hits: int) -> None:
    kv = manager(None)
    admit(kv, request(16))
    assert kv.get_computed_blocks(request(length)).num_tokens == hits


def test_hits_share_blocks_and_are_usable_in_the_step_that_fills_them() -> None:
    kv = manager(None)
    first, second = request(16), request([*range(8), 50, 51, 52])
    admit(kv, first)
    assert admit(kv, second) == 8
    assert first.block_tables[0] == [1, 2, 3, 4]
    assert second.block_tables[0] == [1, 2, 5]
    assert kv.usage == 5 / 99
    kv.free(first)
    assert kv.usage == 3 / 99
    kv.free(second)
    assert kv.usage == 0.0
    assert kv.reset_prefix_cache()


def test_generated_tokens_are_cached_once_they_are_known() -> None:
    kv = manager(None)
    running = request(6)
    admit(kv, running)
    # Two steps sampled and computed on the device; the host has read nothing yet.
    advance(kv, running, 2)
    follow_up = request([*range(6), 70, 71, 9])
    assert kv.get_computed_blocks(follow_up).num_tokens == 4
    running.all_token_ids += [70, 71]
    kv.cache_full_blocks(running)
    assert kv.get_computed_blocks(follow_up).num_tokens == 8


def test_a_block_that_the_window_passed_before_its_tokens_were_read_is_not_cached() -> None:
    kv = manager(2, block_size=1)
    running = request(2)
    admit(kv, running)
    for _ in range(4):
        assert kv.allocate_slots(running, 1) is not None
        advance(kv, running, 1)
    assert running.block_tables[0][:4] == [0, 0, 0, 0]
    running.all_token_ids += [70, 71, 72, 73]
    kv.cache_full_blocks(running)
    hashes = kv._hasher.extend(running, 6)
    assert [kv.pool.cached_block(block_hash, 0) for block_hash in hashes[2:4]] == [None, None]
    assert [kv.pool.cached_block(block_hash, 0) for block_hash in hashes[4:]] == running.block_tables[0][4:]
    assert kv.pool.blocks[0].block_hash is None


def test_a_token_that_is_known_but_not_computed_is_not_cached() -> None:
    kv = manager(None)
    running = request(7)
    admit(kv, running)
    running.all_token_ids.append(99)
    kv.cache_full_blocks(running)
    kv.free(running)
    assert kv.get_computed_blocks(request([*range(7), 99, 1])).num_tokens == 4


@pytest.mark.parametrize("skip", [{"skip_reading_prefix_cache": True}, {"cache_salt": "other"}])
def test_no_hits_for_other_salts_and_whoever_does_not_want_them(skip: dict[str, object]) -> None:
    kv = manager(None)
    admit(kv, request(16))
    assert kv.get_computed_blocks(request(16, **skip)).num_tokens == 0


def test_no_hits_without_prefix_caching() -> None:
    kv = manager(None, caching=False)
    admit(kv, request(16))
    assert kv.get_computed_blocks(request(16)).num_tokens == 0


def test_too_few_blocks_change_nothing() -> None:
    kv = manager(None, num_blocks=6)
    old = request(8)
    admit(kv, old)
    kv.free(old)
    free = [block.block_id for block in kv.pool.free_queue]
    # One hit of four tokens in the free list and five new blocks: six of the five there are.
    new = request([*range(4), *range(100, 120)])
    hit = kv.get_computed_blocks(new)
    assert hit.num_tokens == 4
    assert not kv.can_fit(new, hit)
    assert kv.allocate_slots(new, 20, hit) is None
    assert new.block_tables == ()
    assert [block.block_id for block in kv.pool.free_queue] == free
    assert all(block.ref_count == 0 for block in kv.pool.blocks[1:])
    # With one block less to fill it fits exactly.
    assert kv.allocate_slots(new, 16, hit) is not None
    assert kv.pool.num_free == 0


def test_a_hit_that_somebody_holds_costs_nothing() -> None:
    kv = manager(None, num_blocks=6)
    admit(kv, request(12))
    new = request([*range(8), *range(100, 108)])
    assert kv.can_fit(new, kv.get_computed_blocks(new))
    assert not kv.can_fit(request(range_of(100, 112)), kv.get_computed_blocks(request(range_of(100, 112))))
    assert admit(kv, new) == 8


def range_of(start: int, stop: int) -> list[int]:
    return list(range(start, stop))


def test_a_window_gives_back_what_it_has_passed_before_it_asks_for_more() -> None:
    kv = manager(5, num_blocks=4, max_chunk=4)
    running = request(4)
    admit(kv, running)
    tables = [list(running.block_tables[0])]
    for _ in range(5):
        running.all_token_ids += [1, 2, 3, 4]
        assert kv.allocate_slots(running, 4) is not None
        advance(kv, running, 4)
        tables.append(list(running.block_tables[0]))
    # The first token of a chunk at position c sees c-4 .. c: one block behind the chunk's own, never more.
    assert tables[1] == [1, 2]
    assert [sum(block_id > 0 for block_id in table) for table in tables] == [1, 2, 2, 2, 2, 2]
    assert tables[5][:4] == [0, 0, 0, 0]
    kv.free(running)
    assert kv.usage == 0.0


def test_a_windowed_group_needs_only_the_end_of_a_prefix() -> None:
    kv = manager(None, 6, num_blocks=40)
    old = request(32)
    admit(kv, old, 16)
    assert kv.allocate_slots(old, 16) is not None
    # Position 16 sees 11 and later: blocks 0 and 1 have been given back, 2 and 3 have not.
    assert old.block_tables[1][:2] == [0, 0] and 0 not in old.block_tables[1][2:]
    advance(kv, old, 16)
    hit = kv.get_computed_blocks(request(30))
    assert hit.num_tokens == 28
    assert hit.block_ids[0] == old.block_tables[0][:7]
    # ceil((6 - 1) / 4) = 2 blocks before position 28
    assert hit.block_ids[1] == [0, 0, 0, 0, 0, *old.block_tables[1][5:7]]


def test_the_groups_shrink_the_prefix_until_all_agree() -> None:
    kv = manager(None, 6, num_blocks=40)
    old = request(24)
    admit(kv, old)
    kv.free(old)
    hashes = kv._hasher.extend(request(24), 6)
    forget(kv, hashes[4], group=1)
    # Blocks 4 and 5 of the windowed group would be needed for 24 tokens, 3 and 4 for 20, 2 and 3 for 16.
    assert kv.get_computed_blocks(request(25)).num_tokens == 16
    forget(kv, hashes[3], group=0)
    assert kv.get_computed_blocks(request(25)).num_tokens == 12
    forget(kv, hashes[1], group=1)
    # 12 tokens need blocks 1 and 2, 8 need 0 and 1, 4 need only block 0.
    assert kv.get_computed_blocks(request(25)).num_tokens == 4


def test_a_group_that_agreed_is_asked_again_when_another_shrinks_the_prefix() -> None:
    kv = manager(5, 5, num_blocks=40)
    old = request(24)
    admit(kv, old)
    kv.free(old)
    hashes = kv._hasher.extend(request(24), 6)
    for group, index in ((0, 5), (0, 2), (1, 4), (1, 3)):
        forget(kv, hashes[index], group)
    # Each group needs the block before the prefix's end. 6 blocks: group 0 lacks 5; 5 and 4: group 1 lacks 4 and 3;
    # 3: group 0, content with 5 before, lacks 2; 2: both have block 1.
    assert kv.get_computed_blocks(request(25)).num_tokens == 8


def forget(kv: KVCacheManager, block_hash: bytes, group: int) -> None:
    block_id = kv.pool.cached_block(block_hash, group)
    assert block_id is not None
    kv.pool._forget(kv.pool.blocks[block_id], block_hash)


@settings(max_examples=300, deadline=None)
@given(
    windows=st.lists(st.one_of(st.none(), st.integers(1, 14)), min_size=1, max_size=3),
    block_size=st.integers(1, 4),
    length=st.integers(1, 40),
    data=st.data(),
)
def test_the_longest_prefix_is_the_one_that_brute_force_finds(
    windows: list[int | None], block_size: int, length: int, data: st.DataObject
) -> None:
    kv = manager(*windows, block_size=block_size, num_blocks=400)
    # A window of one token needs nothing of the past, so that even an empty cache has a prefix for it.
    old = request(40, skip_reading_prefix_cache=True)
    admit(kv, old)
    kv.free(old)
    num_blocks = 40 // block_size
    hashes = kv._hasher.extend(request(40), num_blocks)
    gone = data.draw(st.sets(st.tuples(st.integers(0, len(windows) - 1), st.integers(0, num_blocks - 1)), max_size=8))
    for group, index in gone:
        forget(kv, hashes[index], group)

    def usable(tokens: int) -> bool:
        """Whether every earlier position that the token at `tokens` sees is cached, group by group."""
        for group, window in enumerate(windows):
            first = 0 if window is None else max(0, tokens - window + 1)
            if any((group, position // block_size) in gone for position in range(first, tokens)):
                return False
        return True

    candidates = range(0, length, block_size)
    assert kv.get_computed_blocks(request(length)).num_tokens == max(tokens for tokens in candidates if usable(tokens))


@settings(max_examples=300, deadline=None)
@given(window=st.integers(1, 20), block_size=st.integers(1, 8), chunk=st.integers(1, 20))
def test_the_window_bound_is_exact(window: int, block_size: int, chunk: int) -> None:
    """The worst chunk, by trying them all: blocks between the first token seen and the last one computed."""
    worst = max(
        (start + chunk - 1) // block_size - max(0, start - window + 1) // block_size + 1
        for start in range(0, 4 * (window + block_size))
    )
    group = KVCacheGroup(layers=(0,), sliding_window=window)
    assert window_bound(group, block_size, chunk) == worst


def test_capacity() -> None:
    groups = cache(None, 6).groups
    # 25 full blocks, and for the window 6 - 1 + 8 = 13 tokens across at most 4 blocks of 4
    assert blocks_per_request(groups, 4, 100, max_chunk=8) == 25 + 4
    assert blocks_per_request(groups, 4, 100) == 25 + 25
    assert blocks_per_request(groups, 4, 3, max_chunk=8) == 2
    assert max_tokens_per_request(cache(None, num_blocks=11), max_chunk=8) == 40
    assert max_tokens_per_request(cache(None, 6, num_blocks=30), max_chunk=8) == 100
    assert max_tokens_per_request(cache(None, None, num_blocks=2), max_chunk=8) == 0
    assert max_tokens_per_request(cache(6, num_blocks=5), max_chunk=8, limit=10**6) == 10**6
    assert max_concurrency(cache(None, num_blocks=26), 40) == 2.5


def test_missing_blocks_counts_what_the_tokens_still_need() -> None:
    kv = manager(None, 6, max_chunk=8)
    running = request(20)
    running.max_total_tokens = 30
    admit(kv, running, 8)
    # 5 blocks each, 2 held; the windowed group holds at most 4 at once
    assert kv.missing_blocks(running) == 3 + 2
    running.num_output_placeholders = 10
    # 29 of 30 tokens are ever computed: 8 blocks
    assert kv.missing_blocks(running) == 6 + 2


def test_hit_rate_looks_at_recent_requests_and_apart_at_resumed_ones() -> None:
    stats = PrefixCacheStats(recent_requests=2)
    assert stats.hit_rate == 0.0
    stats.record(10, 0, resumed=False)
    stats.record(10, 4, resumed=False)
    stats.record(30, 16, resumed=False)
    stats.record(99, 99, resumed=True)
    assert stats.hit_rate == 20 / 40
    assert (stats.requests, stats.queries, stats.hits) == (3, 50, 20)
    assert (stats.preempted_queries, stats.preempted_hits) == (99, 99)
    stats.forget_recent()
    assert (stats.hit_rate, stats.hits) == (0.0, 20)
