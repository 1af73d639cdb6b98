"""Files that are kept for later processes: one is there as a whole or not at all, and what is read of it is what was
written. Several processes may write and read one at the same time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
import uuid
from pathlib import Path

#: how the name of a file begins that is not whole yet
UNFINISHED = ".new-"
#: seconds
DAY = 86400.0
_DIGEST_BYTES = hashlib.sha256().digest_size


def write(path: Path, content: bytes, *, magic: bytes = b"") -> None:
    """Keep a content, which `read` finds. Raises OSError.

    Args:
        magic: the file's first bytes, which tell its form.
    """
    write_whole(path, magic + hashlib.sha256(content).digest() + content)


def read(path: Path, *, magic: bytes = b"") -> bytes | None:
    """What `write` kept; None: it is something else, or damaged. Raises OSError.

    The file's times tell the day of its last use: where the system keeps none of reading, it is noted here.
    """
    stored = path.read_bytes()
    start = len(magic) + _DIGEST_BYTES
    content = stored[start:]
    if stored[:start] != magic + hashlib.sha256(content).digest():
        return None
    with contextlib.suppress(OSError):  # it is another user's, or has been removed
        status = path.stat()
        if time.time() - max(status.st_atime, status.st_mtime) > DAY:
            os.utime(path)
    return content


def write_whole(path: Path, stored: bytes) -> None:
    """Write a file, and its folder where there is none, so that nobody sees a part of it. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # made with the user's umask, unlike files of tempfile: whoever shares the folder shall read it
    new = path.with_name(f"{UNFINISHED}{uuid.uuid4().hex}")
    try:
        new.write_bytes(stored)
        os.replace(new, path)
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink()
        raise
