"""Memory that the process holds and has no use for any more."""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable
from pathlib import Path

import jaxlib


@functools.cache
def _trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def give_back() -> None:
    """Give what was freed back to the operating system, with glibc; elsewhere do nothing. Takes some milliseconds.

    Compiling a program, and loading one, frees more than it keeps, in the heaps of several threads, where nobody else
    will ask for it.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


def give_back_code() -> None:
    """Unmap the pages of jaxlib's machine code, and of llvmlite's, which makes kernels for CPUs, on Linux; elsewhere do
    nothing.

    Most of them are the compilers, which have done their work. They hold nothing that is not in the files, stay in the
    page cache, and are mapped again where they run.
    """
    if sys.platform != "linux":
        return
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for start, stop in code_mappings():
        advise(start, stop - start, mmap.MADV_DONTNEED)


def code_mappings() -> list[tuple[int, int]]:
    """Addresses, and those behind them, at which files of jaxlib and of llvmlite are mapped as code: executable and
    never written.
    """
    llvm = sys.modules.get("llvmlite")
    files = [jaxlib.__file__, *([llvm.__file__] if llvm is not None and llvm.__file__ else [])]
    packages = {Path(file).parent for file in files}
    found: list[tuple[int, int]] = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, permissions, _, _, _, *path = line.split(maxsplit=5)
        if permissions == "r-xp" and path and packages & set(Path(path[0]).parents):
            start, stop = addresses.split("-")
            found.append((int(start, 16), int(stop, 16)))
    return found
