"""What ptxas made of each kernel, read out of a cubin: no GPU, no disassembler.

A cubin is an ELF file. Registers and stack frames are in its ``.nv.info`` section, static shared memory is the size of
``.nv.shared.<kernel>``. NVIDIA does not document the attributes of ``.nv.info``; their numbers are those that
``cuobjdump --dump-elf`` gives names to.
"""

from __future__ import annotations

import dataclasses
import struct

MAGIC = b"\x7fELF\x02\x01"
_SYMBOL_TABLE, _NO_CONTENT = 2, 8
_FUNCTION = 2
_CUDA = 190
#: how an attribute holds its value: as many bytes as two more bytes say; all other forms hold two bytes
_SIZED = 4
_REGISTER_COUNT, _FRAME_SIZE = 0x2F, 0x11


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelCode:
    """One kernel of a cubin."""

    #: 32-bit registers of each thread
    registers: int
    #: bytes of each thread's stack frame: registers that were spilled, and arrays that are indexed at run time
    stack: int
    #: bytes of shared memory that are fixed in the code; more may be asked for at launch
    static_shared: int


def is_cubin(elf: bytes) -> bool:
    """Whether an ELF file is for a GPU; an executable may hold some for the host too."""
    return struct.unpack_from("<H", elf, 18)[0] == _CUDA


def kernels(cubin: bytes) -> dict[str, KernelCode]:
    """The kernels of a cubin, by name; `cubin` may be longer than the file.

    Raises:
        ValueError: a kernel's registers are not told.
    """
    sections_at = struct.unpack_from("<Q", cubin, 40)[0]
    entry_size, count, names_index = struct.unpack_from("<HHH", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQIIQQ", cubin, sections_at + i * entry_size) for i in range(count)]

    def text(table: int, offset: int) -> str:
        at = headers[table][4] + offset
        return cubin[at : cubin.index(b"\0", at)].decode()

    sections = {text(names_index, header[0]): header for header in headers}
    symbols: list[tuple[str, int]] = []
    for _, kind, _, _, at, size, names, *_ in headers:
        if kind == _SYMBOL_TABLE:
            entries = (struct.unpack_from("<IB", cubin, entry) for entry in range(at, at + size, 24))
            symbols += [(text(names, name), info & 15) for name, info in entries]
    info = sections.get(".nv.info")
    told = _attributes(cubin[info[4] : info[4] + info[5]] if info and info[1] != _NO_CONTENT else b"")
    found: dict[str, KernelCode] = {}
    for index, (name, kind) in enumerate(symbols):
        # functions that a kernel calls have a frame and registers too, but no launch of their own
        if kind != _FUNCTION or f".nv.constant0.{name}" not in sections:
            continue
        if (_REGISTER_COUNT, index) not in told:
            raise ValueError(f"the cubin does not tell the registers of {name!r}")
        shared = sections.get(f".nv.shared.{name}")
        found[name] = KernelCode(
            registers=told[_REGISTER_COUNT, index],
            stack=told.get((_FRAME_SIZE, index), 0),
            static_shared=shared[5] if shared else 0,
        )
    return found


def _attributes(info: bytes) -> dict[tuple[int, int], int]:
    """(attribute, symbol) -> value, of those attributes that are a symbol's number."""
    found: dict[tuple[int, int], int] = {}
    at = 0
    while at + 4 <= len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if form == _SIZED:
            if size == 8:
                symbol, value = struct.unpack_from("<II", info, at)
                found[attribute, symbol] = value
            at += size
    return found
