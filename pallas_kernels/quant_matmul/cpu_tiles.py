"""Products of int8 numbers by tiles of Intel's AMX (`cpu_ffi.matrix_tiles`), as LLVM code.

Tiles of the weight are read where its rows lie, 16 rows by 64 columns. Tiles of x have fours of its columns as their
rows, which another kernel writes before, once for a whole launch (`dense_matmul.tiles.paired`). So sums of a tile are
of 16 rows of the weight, one below the other, and are turned when they are written. They stay in tiles for all columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llvmlite import ir

from pallas_kernels.cpu_ffi.matrix_tiles import ROW_BYTES, SIDE, TILE_BYTES, Tiles, halves_of, turned
from pallas_kernels.cpu_ffi.vectors import FLOAT, LONG, POINTER, WORD, Code, Value
from pallas_kernels.dense_matmul.products import LINE, whole

#: bytes of x's tiles that the weight's rows are multiplied by before the next ones are: a part of a core's second cache
BLOCK_BYTES = 2**20
#: tiles of sums, of the weight and of x, by their number
_SUMS, _WEIGHTS, _ROWS = (0, 1, 2, 3), (4, 5), (6, 7)
#: tiles that are multiplied at once, of the weight and of x, and their rows
_AT_ONCE = 2
_GROUP = _AT_ONCE * SIDE


def multiplied(made: ir.Module, scale_dtype: str) -> None:
    """Write the kernel of products, a function `kernel`, into a module.

    Operands: x's tiles; the others as `cpu_kernel` says.
    """
    code = Code(made, "kernel", [POINTER, LONG, LONG], public=True)
    table, begin, end = code.arguments
    x, layer, weight, scales, x_scales, result = (code.load(code.at(table, 16 * i), POINTER) for i in range(6))
    x_dims, result_dims = (code.load(code.at(table, 16 * i + 8), POINTER) for i in (0, 5))
    num_tiles, steps = (code.load(code.at(x_dims, 8 * i), LONG) for i in (0, 2))
    num_rows, out_features = (code.load(code.at(result_dims, 8 * i), LONG) for i in (0, 1))
    row_bytes, of_tiles = code.times(steps, ROW_BYTES), code.times(steps, TILE_BYTES)
    first_row = code.times(code.builder.sext(code.load(layer, WORD), LONG), out_features)
    weight = code.at(weight, code.times(first_row, row_bytes))
    sums = code.scratch(_AT_ONCE * _AT_ONCE * TILE_BYTES // 4)
    scaled = Scales(code, scale_dtype, scales, first_row, _GROUP)
    instructions = Tiles(code)
    products = {(n, m): _product(made, n, m) for n in (1, _AT_ONCE) for m in (1, _AT_ONCE)}
    writers = {n: _writer(made, n) for n in (1, _AT_ONCE)}
    # groups of rows of the weight belong to the item that their first one is in
    begin, end = (
        code.smaller(whole(code, code.number(0), code.add(at, _GROUP - 1), _GROUP), out_features) for at in (begin, end)
    )

    def multiply(n: int, first: Value, count: Value, block: tuple[Value, Value]) -> None:
        """A block of x's tiles by n tiles of the weight, which have `count` rows each, while the rows behind them are
        fetched.
        """
        starts = [code.at(weight, code.times(code.add(first, i * SIDE), row_bytes)) for i in range(n)]
        passes = code.divided(code.add(code.subtract(block[1], block[0]), _AT_ONCE - 1), _AT_ONCE)
        share = code.divided(code.add(passes, SIDE - 1), passes)
        share = code.builder.select(code.below(code.number(SIDE), passes), code.number(0), share)
        # lines of a tile's next rows, which each step asks for
        next_group = code.times(row_bytes, n * SIDE)
        scaled.take(first, code.add(count, (n - 1) * SIDE))
        done = block[0]
        for m in (_AT_ONCE, 1):
            last = whole(code, done, block[1], m)
            with code.loop(done, last, m) as tiles:
                taken = code.divided(code.subtract(tiles.index, block[0]), _AT_ONCE)
                ahead = code.add(next_group, code.times(code.times(code.times(taken, steps), share), LINE))
                own = code.at(x, code.times(tiles.index, of_tiles))
                fetched = [code.at(start, ahead) for start in starts]
                code.builder.call(products[n, m], [*starts, own, steps, sums, *fetched, share])
                for i in range(m):
                    row = code.times(code.add(tiles.index, i), SIDE)
                    left = code.smaller(code.subtract(num_rows, row), code.number(SIDE))
                    to = code.at(result, code.times(code.add(code.times(row, out_features), first), 4))
                    found = [code.at(sums, TILE_BYTES * (j * m + i)) for j in range(n)]
                    by = scaled.taken, code.at(x_scales, code.times(row, 4))
                    code.builder.call(writers[n], [*found, to, out_features, left, count, *by])
            done = last

    instructions.configure(code.number(SIDE))
    of_block = code.greater(code.divided(code.number(BLOCK_BYTES), of_tiles), code.number(_AT_ONCE))
    of_block = whole(code, code.number(0), of_block, _AT_ONCE)
    with code.loop(code.number(0), num_tiles, of_block) as blocks:
        block = blocks.index, code.smaller(code.add(blocks.index, of_block), num_tiles)
        first = whole(code, begin, end, _GROUP)
        with code.loop(begin, first, _GROUP) as columns:
            multiply(_AT_ONCE, columns.index, code.number(SIDE), block)
        with code.loop(first, end, SIDE) as columns:
            count = code.smaller(code.subtract(end, columns.index), code.number(SIDE))
            is_short = code.below(count, code.number(SIDE))
            with code.builder.if_then(is_short):
                instructions.configure(count, _SUMS + _WEIGHTS)
            multiply(1, columns.index, count, block)
            with code.builder.if_then(is_short):
                instructions.configure(code.number(SIDE))
    instructions.release()
    code.end()


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


def _product(made: ir.Module, n: int, m: int) -> ir.Function:
    """A function (n addresses of the weight's rows; of x's tiles; steps of 64 columns; where the tiles of sums are
    written, those of a tile of the weight one behind the other; n addresses of what is asked for, and how many lines
    of each in a step).
    """
    code = Code(made, f"product_{n}_{m}", [POINTER] * (n + 1) + [LONG] + [POINTER] * (n + 1) + [LONG])
    starts, (x, steps, sums), ahead, share = (
        code.arguments[:n],
        code.arguments[n : n + 3],
        code.arguments[n + 3 : -1],
        code.arguments[-1],
    )
    tiles = Tiles(code)
    stride, row_bytes, of_tiles = code.number(ROW_BYTES), code.times(steps, ROW_BYTES), code.times(steps, TILE_BYTES)
    pairs = [(j, i) for j in range(n) for i in range(m)]
    for j, i in pairs:
        tiles.zero(_SUMS[j * m + i])
    xs = [code.at(x, code.times(of_tiles, i)) for i in range(m)]
    with code.loop(code.number(0), steps, 1) as loop:
        for j, start in enumerate(starts):
            tiles.load(_WEIGHTS[j], code.at(start, code.times(loop.index, ROW_BYTES)), row_bytes)
        for i, start in enumerate(xs):
            tiles.load(_ROWS[i], code.at(start, code.times(loop.index, TILE_BYTES)), stride)
        for j, i in pairs:
            tiles.multiply_bytes(_SUMS[j * m + i], _WEIGHTS[j], _ROWS[i])
        line = code.times(loop.index, share)
        with code.loop(line, code.add(line, share), 1) as each:
            for start in ahead:
                code.prefetch(code.at(start, code.times(each.index, LINE)), 2)
    for j, i in pairs:
        tiles.store(_SUMS[j * m + i], code.at(sums, TILE_BYTES * (j * m + i)), stride)
    code.end()
    return code.function


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
