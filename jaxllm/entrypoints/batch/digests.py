"""Millions of custom_ids are remembered in 12 to 24 bytes each."""

from __future__ import annotations

import hashlib

_EMPTY = 0
#: of the slots, at most this share is taken before the table doubles
_LOAD = 2 / 3


class DigestSet:
    """Remembers strings by 64 bits of their BLAKE2b hash, in an open-addressed table.

    Two different strings are taken for one with probability n^2 / 2^65: 3e-8 for a million of them. A Python set of
    the strings themselves takes about 150 bytes an entry.
    """

    def __init__(self) -> None:
        self._slots = memoryview(bytearray(8 * 1024)).cast("Q")
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def nbytes(self) -> int:
        """Bytes of the table."""
        return self._slots.nbytes

    def __contains__(self, text: str) -> bool:
        digest = _digest(text)
        return self._slots[self._find(digest)] == digest

    def add(self, text: str) -> bool:
        """Remember `text`; False when it was there already."""
        if self._count >= len(self._slots) * _LOAD:
            self._grow()
        digest = _digest(text)
        slot = self._find(digest)
        if self._slots[slot] == digest:
            return False
        self._slots[slot] = digest
        self._count += 1
        return True

    def _find(self, digest: int) -> int:
        """Return the slot of `digest`, or the empty one where it belongs."""
        slots, mask = self._slots, len(self._slots) - 1
        slot = digest & mask
        while slots[slot] not in (digest, _EMPTY):
            slot = (slot + 1) & mask
        return slot

    def _grow(self) -> None:
        old = self._slots
        self._slots = memoryview(bytearray(16 * len(old))).cast("Q")
        for digest in old:
            if digest != _EMPTY:
                self._slots[self._find(digest)] = digest


def _digest(text: str) -> int:
    # JSON can spell lone surrogates
    raw = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(raw, "little") or 1
