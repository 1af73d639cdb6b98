"""The pool against plain Python containers, and its eviction order against vLLM's, worked out by hand."""

from __future__ import annotations

import collections

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.engine.cache.block_pool import NULL_BLOCK_ID, Block, BlockPool, FreeBlockQueue


def ids(pool: BlockPool) -> list[int]:
    return [block.block_id for block in pool.free_queue]


@given(st.lists(st.tuples(st.sampled_from(("pop", "append", "prepend", "remove")), st.integers(0, 7)), max_size=60))
def test_free_queue_is_a_deque(operations: list[tuple[str, int]]) -> None:
    blocks = [Block(index) for index in range(8)]
    queue = FreeBlockQueue(blocks)
    model = collections.deque(range(8))
    outside: list[int] = []
    for operation, number in operations:
        if operation == "pop":
            if number > len(model):
                with pytest.raises(IndexError, match="free blocks asked for"):
                    queue.popleft_n(number)
                continue
            expected = [model.popleft() for _ in range(number)]
            assert [block.block_id for block in queue.popleft_n(number)] == expected
            outside += expected
        elif operation == "remove":
            if number in model:
                model.remove(number)
                queue.remove(blocks[number])
                outside.append(number)
            else:
                with pytest.raises(ValueError, match="not in the free list"):
                    queue.remove(blocks[number])
        else:
            back, outside = outside[:number], outside[number:]
            if operation == "append":
                queue.append_n(blocks[index] for index in back)
                model.extend(back)
            else:
                queue.prepend_n(blocks[index] for index in back)
                model.extendleft(reversed(back))
        assert [block.block_id for block in queue] == list(model)
        assert len(queue) == len(model)


def test_block_zero_is_never_handed_out() -> None:
    pool = BlockPool(4)
    assert pool.num_usable == pool.num_free == 3
    assert pool.get_new_blocks(3) == [1, 2, 3]
    assert pool.usage == 1.0
    with pytest.raises(IndexError):
        pool.get_new_blocks(1)
    pool.free([0, 1, 2, 3])
    assert pool.usage == 0.0
    assert 0 not in ids(pool)


@pytest.mark.parametrize("num_blocks", (0, 1))
def test_a_pool_without_a_usable_block_is_refused(num_blocks: int) -> None:
    with pytest.raises(ValueError, match=f"at least 2.*got {num_blocks}"):
        BlockPool(num_blocks)


def test_uncached_blocks_go_to_the_head_and_cached_ones_to_the_tail_last_first() -> None:
    pool = BlockPool(8)
    taken = pool.get_new_blocks(5)
    assert ids(pool) == [6, 7]
    pool.register([1, 2, 3], [b"a", b"b", b"c"], 0)
    pool.free(taken)
    # 5 and 4 hold nothing; of the cached ones the end of the sequence is evicted first.
    assert ids(pool) == [5, 4, 6, 7, 3, 2, 1]


def test_a_freed_cached_block_can_be_had_until_it_is_handed_out() -> None:
    pool = BlockPool(4)
    pool.register(pool.get_new_blocks(1), [b"a"], 0)
    pool.free([1])
    assert pool.cached_block(b"a", 0) == 1
    assert pool.get_new_blocks(2) == [2, 3]
    assert pool.cached_block(b"a", 0) == 1
    assert pool.get_new_blocks(1) == [1]
    assert pool.cached_block(b"a", 0) is None


def test_touch_takes_a_block_out_of_the_middle_and_counts_holders() -> None:
    pool = BlockPool(5)
    for block_id in pool.get_new_blocks(3):
        pool.register([block_id], [bytes([block_id])], 0)
    pool.free([1, 2, 3])
    assert ids(pool) == [4, 3, 2, 1]
    assert pool.count_free([0, 2, 3]) == 2
    pool.touch([0, 2])
    pool.touch([2])
    assert ids(pool) == [4, 3, 1]
    assert pool.count_free([0, 2, 3]) == 1
    pool.free([2])
    assert ids(pool) == [4, 3, 1]
    pool.free([2])
    assert ids(pool) == [4, 3, 1, 2]


def test_freeing_what_nobody_holds_is_an_error() -> None:
    pool = BlockPool(3)
    with pytest.raises(ValueError, match="block 2 is freed, but nobody holds it"):
        pool.free([2])


def test_equal_contents_in_several_blocks_and_groups_are_kept_apart() -> None:
    pool = BlockPool(6, num_groups=2)
    first, second, other = pool.get_new_blocks(3)
    pool.register([first, second], [b"same", b"same"], 0)
    assert pool.cached_block(b"same", 1) is None
    pool.register([NULL_BLOCK_ID, other], [b"passed", b"same"], 1)
    assert pool.cached_block(b"passed", 1) is None
    pool.free([first])
    pool.get_new_blocks(3)
    assert pool.cached_block(b"same", 0) == second
    assert pool.cached_block(b"same", 1) == other


def test_reset_only_when_nothing_is_held() -> None:
    pool = BlockPool(4)
    pool.register(pool.get_new_blocks(1), [b"a"], 0)
    assert not pool.reset_prefix_cache()
    assert pool.cached_block(b"a", 0) == 1
    pool.free([1])
    assert pool.reset_prefix_cache()
    assert pool.cached_block(b"a", 0) is None
    # Without its contents the block is like any other, and its hash is not in the way when it is used again.
    assert sorted(pool.get_new_blocks(3)) == [1, 2, 3]
