"""What the encoder has made of pictures stays on the device, by the content of each, as long as there is room."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxllm.multimodal.items import MediaItem


class _Entry:
    __slots__ = ("num_users", "rows")

    def __init__(self, rows: np.ndarray) -> None:
        self.rows, self.num_users = rows, 0


class EncoderCache:
    """Which rows of the device's array hold which item. Row 0 holds none.

    An item that nobody uses any more stays until its rows are wanted; the one that was left first goes first.

    Args:
        num_rows: rows besides row 0, one for each vector.
    """

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self._free = np.arange(num_rows, 0, -1, dtype=np.int32)
        self._num_free = num_rows
        self._entries: dict[str, _Entry] = {}
        #: those without users, in the order in which they were left
        self._unused: OrderedDict[str, _Entry] = OrderedDict()
        self._num_unused = 0
        #: items asked for, and those of them that were there
        self.num_queries = self.num_hits = 0

    def acquire(self, item: MediaItem) -> np.ndarray | None:
        """The rows of an item that is there, which has one user more; None: it is not."""
        self.num_queries += 1
        entry = self._entries.get(item.content_hash)
        if entry is None:
            return None
        self.num_hits += 1
        if not entry.num_users:
            del self._unused[item.content_hash]
            self._num_unused -= len(entry.rows)
        entry.num_users += 1
        return entry.rows

    def can_hold(self, num_tokens: int) -> bool:
        """Whether there is room for one item more."""
        return num_tokens <= self._num_free + self._num_unused

    def allocate(self, item: MediaItem) -> np.ndarray:
        """Rows for an item that is not there, which `can_hold` has room for; it has one user."""
        while self._num_free < item.num_tokens:
            content_hash, entry = self._unused.popitem(last=False)
            self._num_unused -= len(entry.rows)
            self._drop(content_hash, entry)
        self._num_free -= item.num_tokens
        entry = _Entry(self._free[self._num_free : self._num_free + item.num_tokens].copy())
        entry.num_users = 1
        self._entries[item.content_hash] = entry
        return entry.rows

    def release(self, item: MediaItem) -> None:
        """One user less."""
        entry = self._entries[item.content_hash]
        entry.num_users -= 1
        if not entry.num_users:
            self._unused[item.content_hash] = entry
            self._num_unused += len(entry.rows)

    def forget(self, item: MediaItem) -> None:
        """An item that nobody uses is not there."""
        entry = self._unused.pop(item.content_hash, None)
        if entry is not None:
            self._num_unused -= len(entry.rows)
            self._drop(item.content_hash, entry)

    def _drop(self, content_hash: str, entry: _Entry) -> None:
        del self._entries[content_hash]
        self._free[self._num_free : self._num_free + len(entry.rows)] = entry.rows
        self._num_free += len(entry.rows)

    def forget_unused(self) -> None:
        """What the device holds is not what was said: all that nobody uses is gone."""
        for content_hash, entry in self._unused.items():
            self._drop(content_hash, entry)
        self._unused.clear()
        self._num_unused = 0

    @property
    def num_used(self) -> int:
        """Rows of items that somebody uses."""
        return self.num_rows - self._num_free - self._num_unused
