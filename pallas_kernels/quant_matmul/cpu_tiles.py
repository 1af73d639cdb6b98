"""Products of int8 numbers by tiles of Intel's AMX (`dense_matmul.tile_products`), as LLVM code.

Tiles of x have fours of its columns as their rows, which `dense_matmul.tiles.paired` writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llvmlite import ir

from pallas_kernels.cpu_ffi.matrix_tiles import ROW_BYTES, SIDE, Tiles, halves_of, turned
from pallas_kernels.cpu_ffi.vectors import FLOAT, LONG, POINTER, WORD, Code, Value
from pallas_kernels.dense_matmul import tile_products
from pallas_kernels.dense_matmul.tile_products import AT_ONCE, GROUP, Write, Writer


def multiplied(made: ir.Module, scale_dtype: str) -> None:
    """Write the kernel of products, a function `kernel`, into a module.

    Operands: x's tiles; the others as `cpu_kernel` says.
    """

    def writer(code: Code, own: Sequence[Value], first_row: Value, out_features: Value) -> Writer:
        scales, x_scales, result = own
        scaled = Scales(code, scale_dtype, scales, first_row, GROUP)
        writers = {n: _writer(made, n) for n in (1, AT_ONCE)}

        def of_tiles(n: int, first: Value, count: Value) -> Write:
            scaled.take(first, code.add(count, (n - 1) * SIDE))

            def write(sums: Sequence[Value], row: Value, left: Value) -> None:
                to = code.at(result, code.times(code.add(code.times(row, out_features), first), 4))
                by = scaled.taken, code.at(x_scales, code.times(row, 4))
                code.builder.call(writers[n], [*sums, to, out_features, left, count, *by])

            return write

        return of_tiles

    tile_products.multiplied(made, Tiles.multiply_bytes, Tiles.load, 6, writer)


class Scales:
    """A weight's, of which some rows' are taken as float32 at a time.

    Args:
        first: of the rows before all others, whose scale is that of row 0 here.
        most: rows at a time.
    """

    def __init__(self, code: Code, dtype: str, scales: Value, first: Value, most: int):
        self._code, self._dtype, self._size = code, dtype, 4 if dtype == "float32" else 2
        self._start = code.at(scales, code.times(first, self._size))
        #: where those are that were taken
        self.taken = code.scratch(most)

    def take(self, first: Value, count: Value) -> None:
        code = self._code
        start = code.at(self._start, code.times(first, self._size))
        with code.loop(code.number(0), count, 1) as loop:
            number = code.number_of(code.at(start, code.times(loop.index, self._size)), self._dtype)
            code.store(number, code.at(self.taken, code.times(loop.index, 4)))


def _writer(made: ir.Module, n: int) -> ir.Function:
    """A function (n tiles of sums, of neighbouring rows of the weight; the place of the results, numbers from one row
    of them to the next; how many rows; how many numbers of each tile in a row, 16 of several; the scales of these rows
    of the weight, and of x's rows).
    """
    code = Code(made, f"write_{n}", [POINTER] * (n + 1) + [LONG] * 3 + [POINTER] * 2)
    sums, (result, stride, num_rows, count, *scales) = code.arguments[:n], code.arguments[n:]
    width = ROW_BYTES * n
    room = code.scratch(SIDE * width // 4)
    row_bytes = code.times(stride, 4)
    is_wide = code.builder.icmp_signed("==", count, code.number(SIDE))
    is_whole = code.builder.and_(is_wide, code.builder.icmp_signed("==", num_rows, code.number(SIDE)))
    # sixteen whole rows go to their place, others through `room`
    start, apart = (
        code.builder.select(is_whole, result, room),
        code.builder.select(is_whole, row_bytes, code.number(width)),
    )
    tiles = [[code.at(tile, ROW_BYTES * i) for i in range(SIDE)] for tile in sums]
    for half in (0, 1):
        columns = [turned(code, halves_of(code, tile, half, WORD)) for tile in tiles]
        found = [_scaled(code, each, half, j, num_rows, scales) for j, each in enumerate(columns)]
        for i, numbers in enumerate(zip(*found, strict=True)):
            place = code.at(start, code.times(apart, SIDE // 2 * half + i))
            for j, number in enumerate(numbers):
                code.store(number, code.at(place, ROW_BYTES * j))
    with code.builder.if_then(code.builder.not_(is_whole)), code.loop(code.number(0), num_rows, 1) as loop:
        start, to = code.at(room, code.times(loop.index, width)), code.at(result, code.times(loop.index, row_bytes))
        with code.builder.if_else(is_wide) as (wide, narrow):
            with wide:
                for i in range(0, width, ROW_BYTES):
                    code.store(code.floats(code.at(start, i)), code.at(to, i))
            with narrow, code.loop(code.number(0), count, 1) as each:
                at = code.times(each.index, 4)
                code.store(code.load(code.at(start, at), FLOAT, align=4), code.at(to, at))
    code.end()
    return code.function


def _scaled(
    code: Code, columns: Sequence[Value], half: int, tile: int, num_rows: Value, scales: Sequence[Value]
) -> Iterator[Value]:
    """Integers, <16 x i32> of each of eight rows of x, as float32, times the scales of a tile's rows of the weight, and
    times those of x's rows, of which those beyond the last are not read.
    """
    of_weight = code.floats(code.at(scales[0], ROW_BYTES * tile))
    last = code.subtract(num_rows, 1)
    for i, numbers in enumerate(columns):
        row = code.smaller(code.number(SIDE // 2 * half + i), last)
        of_x = code.splat(code.load(code.at(scales[1], code.times(row, 4)), FLOAT, align=4))
        yield code.multiplied(code.multiplied(code.signed(numbers), of_weight), of_x)
