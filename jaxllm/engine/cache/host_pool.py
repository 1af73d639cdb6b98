"""Blocks that have left the device's prefix cache and lie in the host's memory (`kv_offloading_size`).

The pool knows only what each of its blocks contains; the contents are the runner's. A block that is evicted from the
device is copied out by the step that gives it to somebody else, before that step writes into it. It can be hit once
that step has been read: until then its copy may be under way. A hit is copied into a new block of the device by the
step that admits the request, and stays here, so that it need not be copied out again.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable

#: (a block of the device, a block of the host)
Copy = tuple[int, int]


class HostPool:
    """Contents of the host's blocks by hash and KV-cache group; the least recently used ones give way.

    Args:
        num_blocks: at least 1.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        #: the least recently used first
        self._ready: collections.OrderedDict[tuple[bytes, int], int] = collections.OrderedDict()
        #: host block -> what is being copied into it; None: what nobody wants any more
        self._arriving: dict[int, tuple[bytes, int] | None] = {}
        self._expected: set[tuple[bytes, int]] = set()
        #: of the step that is being decided
        self._copies_out: list[Copy] = []
        self._copies_in: list[Copy] = []
        self._sources: set[int] = set()
        #: evicted blocks that found no room, as all of the pool was under way
        self.num_skipped = 0

    @property
    def usage(self) -> float:
        """Share of the pool that has contents, in [0, 1]."""
        return 1 - len(self._free) / self.num_blocks

    def find(self, block_hash: bytes, group: int) -> int | None:
        """The host block with these contents, or None."""
        return self._ready.get((block_hash, group))

    def store(self, block_hash: bytes, group: int, block_id: int) -> None:
        """Have the device's block copied out, whose contents are about to be overwritten, unless they are here."""
        key = block_hash, group
        if key in self._ready:
            self._ready.move_to_end(key)
            return
        if key in self._expected:
            return
        host_id = self._free.pop() if self._free else self._evict()
        if host_id is None:
            self.num_skipped += 1
            return
        self._arriving[host_id] = key
        self._expected.add(key)
        self._copies_out.append((block_id, host_id))

    def _evict(self) -> int | None:
        """The least recently used block that this step does not copy in; None: there is none."""
        for key, host_id in self._ready.items():
            if host_id not in self._sources:
                del self._ready[key]
                return host_id
        return None

    def hold(self, host_ids: Iterable[int]) -> None:
        """Keep these blocks until the step that is being decided has copied them in."""
        self._sources.update(host_ids)

    def load(self, block_hash: bytes, group: int, block_id: int) -> None:
        """Have contents that are held copied into a block of the device."""
        key = block_hash, group
        self._ready.move_to_end(key)
        self._copies_in.append((block_id, self._ready[key]))

    def take_copies(self) -> tuple[list[Copy], list[Copy]]:
        """(out, in): what the step that has been decided copies. All that goes out does so before anything comes in."""
        copies = self._copies_out, self._copies_in
        self._copies_out, self._copies_in = [], []
        self._sources.clear()
        return copies

    def arrived(self, copies_out: Iterable[Copy]) -> None:
        """A step with these copies has been read: what they brought can be hit."""
        for _, host_id in copies_out:
            key = self._arriving.pop(host_id)
            if key is None:
                self._free.append(host_id)
            else:
                self._expected.remove(key)
                self._ready[key] = host_id

    def lose_arriving(self) -> None:
        """The steps under way will not be read; what is here stays."""
        self._free += self._arriving
        self._arriving.clear()
        self._expected.clear()
        self.take_copies()

    def reset(self) -> None:
        """Forget everything; steps may be under way."""
        self._free += self._ready.values()
        self._ready.clear()
        self._arriving = dict.fromkeys(self._arriving)
        self._expected.clear()
