"""What was prepared of pictures lately, so that those that come again are not resized and cut again.

A content is known by the bytes that the caller gives, which are read far sooner than pictures are decoded.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.multimodal.items import Media
from jaxllm.multimodal.pictures import lock_of

#: kinds of pictures of Pillow's whose pixels say all of it
_PLAIN_MODES = ("RGB", "RGBA", "L")
#: in which JPEG and others say how a picture is turned
_ORIENTATION = 0x0112


class ProcessorCache:
    """Prepared pictures and videos; what was asked for last stays longest. Safe to use from several threads.

    Args:
        max_bytes: of what is kept.
    """

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._found: OrderedDict[Hashable, tuple[Media, int]] = OrderedDict()
        self._num_bytes = 0
        #: items asked for, and those of them that were there
        self.num_queries = self.num_hits = 0

    def get(self, key: Hashable) -> Media | None:
        with self._lock:
            self.num_queries += 1
            entry = self._found.get(key)
            if entry is None:
                return None
            self.num_hits += 1
            self._found.move_to_end(key)
            return entry[0]

    def put(self, key: Hashable, media: Media) -> None:
        size = sum(item.pixels.nbytes for item in media.items)
        with self._lock:
            if size > self._max_bytes or key in self._found:
                return
            while self._num_bytes + size > self._max_bytes:
                _, (_, gone) = self._found.popitem(last=False)
                self._num_bytes -= gone
            self._found[key] = media, size
            self._num_bytes += size

    def clear(self) -> None:
        """Forget all of it."""
        with self._lock:
            self._found.clear()
            self._num_bytes = 0


def content_key(given: Any) -> Hashable | None:
    """What a picture or a video is known by as the caller gives it; None: it is not known before it is read."""
    if isinstance(given, bytes | bytearray | memoryview):
        return "file", _digest(given)
    if isinstance(given, str | os.PathLike):
        try:
            return "file", _digest(Path(given).expanduser().read_bytes())
        except (OSError, ValueError, RuntimeError):
            return None
    if isinstance(given, np.ndarray):
        if given.dtype.hasobject:
            return None
        return "array", given.dtype.str, given.shape, _digest(np.ascontiguousarray(given).reshape(-1).view(np.uint8))
    if (time := time_key(given)) is not None:
        frames = content_key(given[0])
        return None if frames is None else ("timed", frames, time)
    if isinstance(given, list | tuple):
        # only who gives a path itself has it opened here: texts within lists may be of strangers
        frames = tuple(
            None if isinstance(frame, str | os.PathLike | list | tuple) else content_key(frame) for frame in given
        )
        return None if None in frames else ("frames", frames)
    return _key_of_picture(given)


def time_key(given: Any) -> str | None:
    """What a video that is a pair says of its frames' time; None: it is none."""
    if not (isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], Mapping)):
        return None
    return repr(sorted(given[1].items(), key=repr))


def _key_of_picture(given: Any) -> Hashable | None:
    """Of a picture of Pillow's that is decoded already; others may be anything."""
    if getattr(given, "mode", None) not in _PLAIN_MODES:
        return None
    with lock_of(given):  # another thread may be in the middle of decoding it
        if getattr(given, "_im", None) is None or getattr(given, "is_animated", False):
            return None
        if "transparency" in given.info or given.getexif().get(_ORIENTATION):
            return None
        data = given.tobytes()
    return "picture", given.mode, given.size, _digest(data)


def _digest(data: Any) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
