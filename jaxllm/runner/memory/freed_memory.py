"""Memory that the process holds and has no use for any more."""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import jaxlib

_SMAPS = Path("/proc/self/smaps")
#: `_without_own_pages` of mappings that were met; asking takes some milliseconds
_unwritten: dict[str, bool] = {}


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
    """Unmap the pages of jaxlib's machine code and tables, and of llvmlite's, which makes kernels for CPUs, on Linux;
    elsewhere do nothing.

    Most of them are the compilers, which have done their work. They hold nothing that is not in the files, stay in the
    page cache, and are mapped again where they are used.
    """
    if sys.platform != "linux":
        return
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for start, stop in code_mappings():
        advise(start, stop - start, mmap.MADV_DONTNEED)


def code_mappings() -> list[tuple[int, int]]:
    """Addresses, and those behind them, at which files of jaxlib and of llvmlite are mapped as code or tables: never
    written, not even by the loader, which puts addresses into some tables.
    """
    llvm = sys.modules.get("llvmlite")
    files = [jaxlib.__file__, *([llvm.__file__] if llvm is not None and llvm.__file__ else [])]
    packages = tuple(f"{Path(file).parent}/" for file in files)
    lines: list[tuple[str, str, str]] = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        _, permissions, _, _, _, *path = line.split(maxsplit=5)
        if path and path[0].startswith(packages):
            lines.append((line, permissions, path[0]))
    # the loader maps what is written last
    written = [line for line, permissions, _ in lines if permissions == "rw-p"]
    whole = {path for _, permissions, path in lines if permissions == "rw-p"}
    tables = [line for line, permissions, path in lines if permissions == "r--p" and path in whole]
    if not _unwritten.keys() >= set(tables):
        _unwritten.update({**dict.fromkeys(tables, False), **_without_own_pages(written)})
    found = [line for line, permissions, _ in lines if permissions == "r-xp"]
    found += [line for line in tables if _unwritten.get(line)]
    addresses = (line.split(maxsplit=1)[0].split("-") for line in found)
    return [(int(start, 16), int(stop, 16)) for start, stop in addresses]


def _without_own_pages(written: Iterable[str]) -> dict[str, bool]:
    """Of each line of /proc/self/maps whether none of its pages is other than in the file, in memory or swapped out;
    nothing where nobody counts them: some kernels do not, and QEMU tells programs of another processor 0 of any file.

    Args:
        written: lines of which some have such pages.
    """
    try:
        lines = _SMAPS.read_text().splitlines()
    except OSError:
        return {}
    found: dict[str, bool] = {}
    mapping = ""
    for line in lines:
        name, _, value = line.partition(":")
        if "-" in name:
            mapping = line
            found[mapping] = True
        elif name in ("Anonymous", "Swap") and not value.strip().startswith("0 "):
            found[mapping] = False
    return {} if all(found.get(line, True) for line in written) else found
