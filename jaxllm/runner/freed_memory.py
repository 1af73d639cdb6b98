"""Memory that was freed and that the process still holds."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable


@functools.cache
def _trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def give_back() -> None:
    """Give it back to the operating system, with glibc; elsewhere do nothing. Takes some milliseconds.

    Compiling a program, and loading one, frees more than it keeps, in the heaps of several threads, where nobody else
    will ask for it.
    """
    trim = _trim()
    if trim is not None:
        trim(0)
