"""The pool of KV-cache blocks: who holds them, which are free, and what the free ones still contain.

Block 0 is the null block: tables point at it where a sliding window has passed, the device writes padding there, and
it is never free. A block whose reference count falls to zero keeps its contents and its hash until it is handed out
again, so a later request with the same prefix can take it back from the middle of the free list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

NULL_BLOCK_ID = 0


class Block:
    """One block of the pool, and its own node of the free list (linked to itself when it is not free)."""

    __slots__ = ("block_hash", "block_id", "group", "next", "prev", "ref_count")

    def __init__(self, block_id: int) -> None:
        self.block_id = block_id
        self.ref_count = 0
        #: hash of the contents while the prefix cache knows the block
        self.block_hash: bytes | None = None
        #: KV-cache group that the hash belongs to
        self.group = -1
        self.prev = self
        self.next = self

    def __repr__(self) -> str:
        return f"Block({self.block_id}, ref_count={self.ref_count}, cached={self.block_hash is not None})"


class FreeBlockQueue:
    """Doubly linked list through the blocks themselves: O(1) removal from the middle, no allocation.

    The head is handed out next. A sentinel closes the ring, so no operation has a special case for an empty list.
    """

    __slots__ = ("_sentinel", "num_blocks")

    def __init__(self, blocks: Iterable[Block] = ()) -> None:
        self._sentinel = Block(-1)
        self.num_blocks = 0
        self.append_n(blocks)

    def __len__(self) -> int:
        return self.num_blocks

    def __iter__(self) -> Iterator[Block]:
        block = self._sentinel.next
        while block is not self._sentinel:
            yield block
            block = block.next

    def popleft_n(self, count: int) -> list[Block]:
        """Remove and return the first `count` blocks. Raises IndexError when there are fewer."""
        if count > self.num_blocks:
            raise IndexError(f"{count} free blocks asked for, {self.num_blocks} there")
        block = self._sentinel.next
        taken: list[Block] = []
        for _ in range(count):
            taken.append(block)
            following = block.next
            block.prev = block.next = block
            block = following
        self._sentinel.next = block
        block.prev = self._sentinel
        self.num_blocks -= count
        return taken

    def remove(self, block: Block) -> None:
        """Remove a block from anywhere in the list. Raises ValueError when it is not in it."""
        if block.next is block:
            raise ValueError(f"{block!r} is not in the free list")
        block.prev.next = block.next
        block.next.prev = block.prev
        block.prev = block.next = block
        self.num_blocks -= 1

    def append_n(self, blocks: Iterable[Block]) -> None:
        """Put blocks at the tail, in order: the last one is handed out last."""
        self._insert_before(self._sentinel, blocks)

    def prepend_n(self, blocks: Iterable[Block]) -> None:
        """Put blocks at the head, in order: the first one is handed out next."""
        self._insert_before(self._sentinel.next, blocks)

    def _insert_before(self, following: Block, blocks: Iterable[Block]) -> None:
        last, count = following.prev, 0
        for block in blocks:
            last.next = block
            block.prev = last
            last = block
            count += 1
        last.next = following
        following.prev = last
        self.num_blocks += count


class BlockPool:
    """All blocks of one KV cache, shared by its groups.

    Args:
        num_blocks: blocks of the device array, the null block included; at least 2.
        num_groups: KV-cache groups; the prefix cache keeps them apart.
        evicted: told the hash, the group and the id of a block that is handed out, where no other block has what it
            had cached; None: nobody is.

    Raises:
        ValueError: `num_blocks` leaves no block to use.
    """

    def __init__(
        self, num_blocks: int, num_groups: int = 1, evicted: Callable[[bytes, int, int], None] | None = None
    ) -> None:
        if num_blocks < 2:
            raise ValueError(f"num_blocks must be at least 2, block 0 is not usable; got {num_blocks}")
        self.blocks = [Block(block_id) for block_id in range(num_blocks)]
        self.blocks[NULL_BLOCK_ID].ref_count = 1
        self.free_queue = FreeBlockQueue(self.blocks[1:])
        self._evicted = evicted
        self._cached: tuple[dict[bytes, Block], ...] = tuple({} for _ in range(num_groups))
        # Two requests that compute the same tokens at the same time each fill a block of their own, and neither may
        # swap it for the other's, because the device has the block table already: the others of a hash, which are few.
        self._doubles: tuple[dict[bytes, list[Block]], ...] = tuple({} for _ in range(num_groups))

    @property
    def num_usable(self) -> int:
        """Blocks of the pool without the null block."""
        return len(self.blocks) - 1

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, those with cached contents included."""
        return self.free_queue.num_blocks

    @property
    def num_used(self) -> int:
        return self.num_usable - self.free_queue.num_blocks

    @property
    def usage(self) -> float:
        """Share of the blocks that somebody holds, in [0, 1]."""
        return self.num_used / self.num_usable

    def cached_block(self, block_hash: bytes, group: int) -> int | None:
        """Id of a block of `group` with these contents, or None."""
        found = self._cached[group].get(block_hash)
        return None if found is None else found.block_id

    def get_new_blocks(self, count: int) -> list[int]:
        """Take `count` blocks from the head of the free list; what they had cached is forgotten.

        Raises IndexError when fewer are free.
        """
        taken = self.free_queue.popleft_n(count)
        for block in taken:
            if block.block_hash is not None:
                self._forget(block, block.block_hash)
            block.ref_count = 1
        return [block.block_id for block in taken]

    def count_free(self, block_ids: Iterable[int]) -> int:
        """How many of these blocks are in the free list, the null block not counted."""
        blocks = self.blocks
        return sum(blocks[block_id].ref_count == 0 for block_id in block_ids)

    def touch(self, block_ids: Iterable[int]) -> None:
        """Hold these blocks once more; those in the free list leave it. Null blocks are passed over."""
        for block_id in block_ids:
            if block_id == NULL_BLOCK_ID:
                continue
            block = self.blocks[block_id]
            if block.ref_count == 0:
                self.free_queue.remove(block)
            block.ref_count += 1

    def free(self, block_ids: Sequence[int]) -> None:
        """Hold these blocks once less, the last one first. Null blocks are passed over.

        Those that nobody holds any more go back: without cached contents to the head of the free list, to be used
        next; with them to the tail, so that the end of a sequence is evicted before its beginning.

        Raises ValueError when nobody holds one of them.
        """
        blocks = self.blocks
        cached: list[Block] = []
        uncached: list[Block] = []
        for block_id in reversed(block_ids):
            if block_id == NULL_BLOCK_ID:
                continue
            block = blocks[block_id]
            block.ref_count = count = block.ref_count - 1
            if count == 0:
                (uncached if block.block_hash is None else cached).append(block)
            elif count < 0:
                block.ref_count = 0
                raise ValueError(f"block {block_id} is freed, but nobody holds it")
        self.free_queue.append_n(cached)
        self.free_queue.prepend_n(uncached)

    def register(self, block_ids: Iterable[int], block_hashes: Iterable[bytes], group: int) -> None:
        """Tell the prefix cache what full blocks contain. Null blocks are passed over."""
        blocks, cached = self.blocks, self._cached[group]
        for block_id, block_hash in zip(block_ids, block_hashes, strict=True):
            if block_id == NULL_BLOCK_ID:
                continue
            block = blocks[block_id]
            block.block_hash = block_hash
            block.group = group
            if cached.setdefault(block_hash, block) is not block:
                self._doubles[group].setdefault(block_hash, []).append(block)

    def _forget(self, block: Block, block_hash: bytes) -> None:
        cached, doubles = self._cached[block.group], self._doubles[block.group]
        if block_hash not in doubles:
            del cached[block_hash]
            if self._evicted is not None:
                self._evicted(block_hash, block.group, block.block_id)
        else:
            others = doubles[block_hash]
            if cached[block_hash] is block:
                cached[block_hash] = others.pop(0)
            else:
                others.remove(block)
            if not others:
                del doubles[block_hash]
        block.block_hash = None
        block.group = -1

    def reset_prefix_cache(self) -> bool:
        """Forget every block's contents. Does nothing and returns False while any block is held."""
        if self.num_used:
            return False
        for block in self.blocks:
            block.block_hash = None
            block.group = -1
        for cached in (*self._cached, *self._doubles):
            cached.clear()
        return True
