"""How much of compiled programs, kernels and tokenizers is kept: what was not used for longest goes first."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

from jaxllm.config.argument_checks import size
from jaxllm.config.cache_folder import cache_folder
from pallas_kernels.kept_files import DAY, UNFINISHED, write_whole

logger = logging.getLogger("jaxllm")

VARIABLE = "JAXLLM_CACHE_SIZE"
DEFAULT = "10GB"
_UNBOUNDED = "none"
#: in jaxllm's folder, those of which each file can be made anew
FOLDERS = ("xla", "kernels", "tokenizers")
_SUFFIXES = (".program", ".name", ".o", ".tokenizer")
#: the file that says when all files were looked at last, and for which bound
_STAMP = "bound"
#: seconds after which nobody is still writing a file
_ABANDONED = 3600.0


def cache_bound() -> int | None:
    """Bytes that may be kept: ``$JAXLLM_CACHE_SIZE``, such as 500MB, or 10 GB; None, of "none": any number.

    Raises ValidationError for something else.
    """
    given = os.environ.get(VARIABLE) or DEFAULT
    return None if given.lower() == _UNBOUNDED else size(VARIABLE, given)


def keep_within(bound: int | None) -> None:
    """Remove kept files until no more than `bound` bytes are left, where nobody has done so within a day: to look at
    all files takes a moment. Other processes may read, write and remove some meanwhile: what one has opened it reads to
    its end, and what it misses it makes anew. A file that cannot be removed stays.
    """
    folder = cache_folder()
    # whose parent may be hidden
    if bound is None or not os.path.isdir(folder) or not _is_time(folder / _STAMP, bound):
        return
    # a reader who may not change a file's time leaves the system's own
    files = [(max(status.st_mtime, status.st_atime), path, status.st_size) for path, status in _kept(folder)]
    total = sum(num_bytes for _, _, num_bytes in files)
    removed = 0
    for _, path, num_bytes in sorted(files):
        if total - removed <= bound:
            break
        with contextlib.suppress(OSError):
            os.unlink(path)
            removed += num_bytes
    if removed:
        logger.info(
            "Removed %.1f MB that were not used for longest from %s: %.1f MB were kept there, and at most %.1f MB "
            "shall be (%s).",
            removed / 1e6,
            folder,
            total / 1e6,
            bound / 1e6,
            VARIABLE,
        )


def _is_time(stamp: Path, bound: int) -> bool:
    """Whether to look at all files now; then nobody else does so within a day, unless the bound is another one."""
    content = str(bound).encode()
    try:
        if time.time() - stamp.stat().st_mtime < DAY and stamp.read_bytes() == content:
            return False
    except OSError:
        pass  # there is none
    try:
        write_whole(stamp, content)
    except OSError:  # where nothing can be written, nothing can be removed
        return False
    return True


def _kept(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    for name in FOLDERS:
        for place, _, files in os.walk(folder / name):
            for file in files:
                path = os.path.join(place, file)
                with contextlib.suppress(OSError):  # another process has removed it
                    status = os.stat(path)
                    abandoned = file.startswith(UNFINISHED) and time.time() - status.st_mtime > _ABANDONED
                    if abandoned or file.endswith(_SUFFIXES):
                        yield path, status
