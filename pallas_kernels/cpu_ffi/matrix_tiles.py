"""Tiles of bfloat16 or int8 numbers, multiplied by Intel's AMX in LLVM code, where a process may (`amx.is_usable`).

A tile has 16 rows of 64 bytes. `Tiles.multiply` adds to a tile of float32 [16, 16] a tile a [16, 32] times one of pairs
b: row r of b has, of each of 16 columns, the numbers 2 r and 2 r + 1. Each number of the result is added up alone, pair
by pair, so its bits depend on no other; those too small for a normal float32 count as zeros.

`Tiles.multiply_bytes` does so with int8 numbers, of which four take the place of a pair: a is [16, 64], row r of b has
the numbers 4 r to 4 r + 3 of each column, and sums are i32, so they are exact.
"""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir

from pallas_kernels.cpu_ffi.vectors import BYTE, HALF_WORD, LONG, Code, Value

#: rows of a tile, and its columns of float32, each of which is a pair of bfloat16 numbers
SIDE = 16
#: numbers of bfloat16 in a tile's row
DEPTH = 2 * SIDE
#: bytes of a row, and of a tile
ROW_BYTES = 64
TILE_BYTES = SIDE * ROW_BYTES
#: tiles that a processor has
NUM_TILES = 8


class Tiles:
    """Writes a function's instructions on tiles, which `configure` comes before and `release` after."""

    def __init__(self, code: Code):
        self._code = code
        self._layout = code.scratch(ROW_BYTES // 4)

    def configure(self, rows: Value, shortened: Sequence[int] = ()) -> None:
        """All tiles get 16 rows, those with some numbers `rows` (i64)."""
        code, count = self._code, self._code.builder.trunc(rows, BYTE)
        # the palette, the bytes of each tile's rows, of 16 bits, and from byte 48 on their number
        code.store(ir.Constant(ir.VectorType(LONG, 8), [1] + [0] * 7), self._layout)
        for tile in range(NUM_TILES):
            number = count if tile in shortened else ir.Constant(BYTE, SIDE)
            code.builder.store(ir.Constant(HALF_WORD, ROW_BYTES), code.at(self._layout, 16 + 2 * tile), align=2)
            code.builder.store(number, code.at(self._layout, 48 + tile), align=1)
        self._call("ldtilecfg", [], [self._layout])

    def release(self) -> None:
        self._call("tilerelease", [], [])

    def zero(self, tile: int) -> None:
        self._call("tilezero", [tile], [])

    def load(self, tile: int, address: Value, stride: Value) -> None:
        """A tile's rows from memory, so many bytes from one to the next."""
        self._call("tileloadd64", [tile], [address, stride])

    def load_once(self, tile: int, address: Value, stride: Value) -> None:
        """`load`, of rows that need not stay in a core's first cache."""
        self._call("tileloaddt164", [tile], [address, stride])

    def store(self, tile: int, address: Value, stride: Value) -> None:
        self._call("tilestored64", [tile], [address, stride])

    def multiply(self, total: int, a: int, b: int) -> None:
        self._call("tdpbf16ps", [total, a, b], [])

    def multiply_bytes(self, total: int, a: int, b: int) -> None:
        self._call("tdpbssd", [total, a, b], [])

    def _call(self, name: str, tiles: Sequence[int], operands: Sequence[Value]) -> None:
        numbers = [ir.Constant(BYTE, tile) for tile in tiles]
        kinds = [value.type for value in (*numbers, *operands)]
        self._code.builder.call(self._code.declared(f"llvm.x86.{name}", ir.VoidType(), kinds), [*numbers, *operands])


def halves_of(code: Code, rows: Sequence[Value], half: int, kind: ir.Type) -> list[Value]:
    """The first or the second eight numbers, of 32 bits, of sixteen rows at some addresses, for `turned`, which makes
    eight columns of them: those of each row and of the eighth behind it, <16 x kind>.
    """
    part = ir.VectorType(kind, SIDE // 2)
    halves = [code.load(code.at(row, ROW_BYTES // 2 * half), part, align=4) for row in rows]
    return [code.joined(*both) for both in zip(halves[: SIDE // 2], halves[SIDE // 2 :], strict=True)]


def turned(code: Code, vectors: Sequence[Value]) -> list[Value]:
    """Of eight vectors, both of whose halves are rows of a square, its columns: in each of three steps, pairs of
    vectors exchange what is off the diagonal of their blocks.
    """
    found = list(vectors)
    for size in (1, 2, 4):
        low = [i if not i & size else i - size + SIDE for i in range(SIDE)]
        high = [i + size if not i & size else i + SIDE for i in range(SIDE)]
        for i in (i for i in range(SIDE // 2) if not i & size):
            pair = found[i], found[i + size]
            found[i], found[i + size] = (code.chosen(*pair, places) for places in (low, high))
    return found
