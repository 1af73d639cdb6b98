"""The kernels of products by Intel's AMX (`cpu_ffi.matrix_tiles`), as LLVM code.

Tiles of the weight are read where its rows lie, 16 rows by 32 columns. Tiles of x have pairs of its columns as their
rows, which another kernel writes before, once for a whole launch (`paired`). So sums of a tile are of 16 rows of the
weight, one below the other, and are turned when they are written. They stay in tiles for all columns.
"""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir

from pallas_kernels.cpu_ffi.matrix_tiles import ROW_BYTES, SIDE, TILE_BYTES, Tiles, halves_of, turned
from pallas_kernels.cpu_ffi.vectors import FLOAT, LONG, POINTER, WORD, Code, Value
from pallas_kernels.dense_matmul.activations import ACTIVATIONS
from pallas_kernels.dense_matmul.products import LINE, whole

#: bytes of x's tiles that the weight's rows are multiplied by before the next ones are: a part of a core's second cache
BLOCK_BYTES = 2**20
#: tiles of sums, of the weight and of x, by their number
_SUMS, _WEIGHTS, _ROWS = (0, 1, 2, 3), (4, 5), (6, 7)
#: tiles that are multiplied at once, of the weight and of x
_AT_ONCE = 2


def paired(made: ir.Module) -> None:
    """Write the kernel of x's tiles, a function `kernel`, into a module.

    Operands: x bfloat16 [M, K]; the result, bfloat16 [ceil(M / 16), 512, K / 32], tile after tile, those of the same
    rows of x one behind the other. The last of them has x's last row as often as it has room. Words are moved as they
    are, so int8 x [M, K] becomes int8 [ceil(M / 16), 1024, K / 64], fours in place of pairs.
    """
    code = Code(made, "kernel", [POINTER, LONG, LONG], public=True)
    table, begin, end = code.arguments
    x, result = (code.load(code.at(table, 16 * i), POINTER) for i in (0, 1))
    x_dims, result_dims = (code.load(code.at(table, 16 * i + 8), POINTER) for i in (0, 1))
    num_rows = code.load(x_dims, LONG)
    num_tiles, steps = (code.load(code.at(result_dims, 8 * i), LONG) for i in (0, 2))
    with code.loop(code.number(0), num_tiles, 1) as tiles:
        first = code.times(tiles.index, SIDE)
        places = [code.smaller(code.add(first, i), code.subtract(num_rows, 1)) for i in range(SIDE)]
        rows = [code.at(x, code.times(code.times(place, steps), ROW_BYTES)) for place in places]
        to = code.at(result, code.times(code.times(tiles.index, steps), TILE_BYTES))
        with code.loop(begin, end, 1) as columns:
            starts = [code.at(row, code.times(columns.index, ROW_BYTES)) for row in rows]
            here = code.at(to, code.times(columns.index, TILE_BYTES))
            for half in (0, 1):
                for i, pairs in enumerate(turned(code, halves_of(code, starts, half, WORD))):
                    code.store(pairs, code.at(here, ROW_BYTES * (SIDE // 2 * half + i)))
    code.end()


def multiplied(made: ir.Module, activation: str) -> None:
    """Write the kernel of products, a function `kernel`, into a module.

    Operands: x's tiles (`paired`); layer i32 []; the weight's stack bfloat16 [L, N, K], or [L, 2 N, K] of a gated
    product; i32 [], the bytes of a number of the result; the result, float32 or bfloat16 [M, N].
    """
    code = Code(made, "kernel", [POINTER, LONG, LONG], public=True)
    table, begin, end = code.arguments
    x, layer, weight, size, result = (code.load(code.at(table, 16 * i), POINTER) for i in range(5))
    x_dims, result_dims = (code.load(code.at(table, 16 * i + 8), POINTER) for i in (0, 4))
    num_tiles, steps = (code.load(code.at(x_dims, 8 * i), LONG) for i in (0, 2))
    num_rows, out_features = (code.load(code.at(result_dims, 8 * i), LONG) for i in (0, 1))
    size = code.builder.sext(code.load(size, WORD), LONG)
    row_bytes, result_bytes = code.times(steps, ROW_BYTES), code.times(out_features, size)
    of_tiles = code.times(steps, TILE_BYTES)
    apart = code.times(out_features, row_bytes)  # of a gate and what it is for
    place = code.times(code.builder.sext(code.load(layer, WORD), LONG), 2 if activation else 1)
    weight = code.at(weight, code.times(place, apart))
    sums = code.scratch(_AT_ONCE * _AT_ONCE * TILE_BYTES // 4)
    instructions = Tiles(code)
    products = {(n, m): _product(made, n, m) for n in (1, _AT_ONCE) for m in (1, _AT_ONCE)}
    writers = {n: _writer(made, n, activation) for n in ((_AT_ONCE,) if activation else (1, _AT_ONCE))}

    # groups of rows of the weight belong to the item that their first one is in
    together = SIDE if activation else _AT_ONCE * SIDE
    begin, end = (
        code.smaller(whole(code, code.number(0), code.add(at, together - 1), together), out_features)
        for at in (begin, end)
    )

    def multiply(first: Value, starts: Sequence[Value], count: Value, block: tuple[Value, Value]) -> None:
        """A block of x's tiles by tiles of the weight, which have `count` rows each, while the rows behind them are
        fetched.
        """
        n = len(starts)
        passes = code.divided(code.add(code.subtract(block[1], block[0]), _AT_ONCE - 1), _AT_ONCE)
        share = code.divided(code.add(passes, SIDE - 1), passes)
        share = code.builder.select(code.below(code.number(SIDE), passes), code.number(0), share)
        # lines of a tile's next rows, which each step asks for
        next_group = code.times(row_bytes, SIDE if activation else n * SIDE)
        done = block[0]
        for m in (_AT_ONCE, 1):
            last = whole(code, done, block[1], m)
            with code.loop(done, last, m) as tiles:
                taken = code.divided(code.subtract(tiles.index, block[0]), _AT_ONCE)
                asked = code.times(code.times(code.times(taken, steps), share), LINE)
                ahead = code.add(next_group, asked)
                own = code.at(x, code.times(tiles.index, of_tiles))
                fetched = [code.at(start, ahead) for start in starts]
                code.builder.call(products[n, m], [*starts, own, steps, sums, *fetched, share])
                for i in range(m):
                    row = code.times(code.add(tiles.index, i), SIDE)
                    left = code.smaller(code.subtract(num_rows, row), code.number(SIDE))
                    to = code.at(result, code.add(code.times(row, result_bytes), code.times(first, size)))
                    found = [code.at(sums, TILE_BYTES * (j * m + i)) for j in range(n)]
                    code.builder.call(writers[n], [*found, to, result_bytes, left, count, size])
            done = last

    def at_row(row: Value) -> Value:
        return code.at(weight, code.times(row, row_bytes))

    instructions.configure(code.number(SIDE))
    of_block = code.greater(code.divided(code.number(BLOCK_BYTES), of_tiles), code.number(_AT_ONCE))
    of_block = whole(code, code.number(0), of_block, _AT_ONCE)
    with code.loop(code.number(0), num_tiles, of_block) as blocks:
        block = blocks.index, code.smaller(code.add(blocks.index, of_block), num_tiles)
        first = begin
        if not activation:
            first = whole(code, begin, end, together)
            with code.loop(begin, first, together) as columns:
                starts = [at_row(code.add(columns.index, i * SIDE)) for i in range(_AT_ONCE)]
                multiply(columns.index, starts, code.number(SIDE), block)
        with code.loop(first, end, SIDE) as columns:
            count = code.smaller(code.subtract(end, columns.index), code.number(SIDE))
            is_short = code.below(count, code.number(SIDE))
            with code.builder.if_then(is_short):
                instructions.configure(count, _SUMS + _WEIGHTS)
            start = at_row(columns.index)
            multiply(columns.index, [start, code.at(start, apart)] if activation else [start], count, block)
            with code.builder.if_then(is_short):
                instructions.configure(code.number(SIDE))
    instructions.release()
    code.end()


def _product(made: ir.Module, n: int, m: int) -> ir.Function:
    """A function (n addresses of the weight's rows; of x's tiles; steps of 32 columns; where the tiles of sums are
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
    # many rows of x go by, and leave the first cache to the weight
    load = tiles.load_once if m > 1 else tiles.load
    with code.loop(code.number(0), steps, 1) as loop:
        for j, start in enumerate(starts):
            tiles.load(_WEIGHTS[j], code.at(start, code.times(loop.index, ROW_BYTES)), row_bytes)
        for i, start in enumerate(xs):
            load(_ROWS[i], code.at(start, code.times(loop.index, TILE_BYTES)), stride)
        for j, i in pairs:
            tiles.multiply(_SUMS[j * m + i], _WEIGHTS[j], _ROWS[i])
        line = code.times(loop.index, share)
        with code.loop(line, code.add(line, share), 1) as each:
            for start in ahead:
                code.prefetch(code.at(start, code.times(each.index, LINE)), 2)
    for j, i in pairs:
        tiles.store(_SUMS[j * m + i], code.at(sums, TILE_BYTES * (j * m + i)), stride)
    code.end()
    return code.function


def _writer(made: ir.Module, n: int, activation: str) -> ir.Function:
    """A function (n tiles of sums, of neighbouring rows of the weight, or of gates and what they are for; the place of
    the results, bytes from one row of them to the next; how many rows; how many numbers of each tile in a row, 16 of
    several; bytes of a number).
    """
    code = Code(made, f"write_{n}", [POINTER] * (n + 1) + [LONG] * 4)
    sums, (result, result_bytes, num_rows, count, size) = code.arguments[:n], code.arguments[n:]
    width = SIDE if activation else SIDE * n
    room, turning = code.scratch(SIDE * width), code.scratch(SIDE * SIDE)
    is_wide = code.builder.icmp_signed("==", count, code.number(SIDE))
    is_whole = code.builder.and_(is_wide, code.builder.icmp_signed("==", num_rows, code.number(SIDE)))
    # sixteen whole rows go to their place, others through `room`
    start, apart = (
        code.builder.select(is_whole, result, room),
        code.builder.select(is_whole, result_bytes, code.times(size, width)),
    )

    def at(row: int) -> Value:
        return code.at(start, code.times(apart, row))

    def gated(gate: Value, up: Value) -> Value:
        return code.multiplied(ACTIVATIONS[activation](code, gate), up)

    def write_floats() -> None:
        for half in (0, 1):
            rows = [halves_of(code, [code.at(tile, ROW_BYTES * i) for i in range(SIDE)], half, FLOAT) for tile in sums]
            if activation:
                rows = [[gated(*both) for both in zip(*rows, strict=True)]]
            for j, columns in enumerate(turned(code, each) for each in rows):
                for i, numbers in enumerate(columns):
                    code.store(numbers, code.at(at(SIDE // 2 * half + i), ROW_BYTES * j))

    def write_bfloat16() -> None:
        rows = [[code.floats(code.at(tile, ROW_BYTES * i)) for i in range(SIDE)] for tile in sums]
        if activation:
            rows = [[gated(*both) for both in zip(*rows, strict=True)]]
        # two rows of sums are one of pairs, which is turned as one of float32 is
        pairs = [code.rounded_pairs(*each[i : i + 2]) for each in rows for i in range(0, SIDE, 2)]
        if len(pairs) < SIDE:
            for i, both in enumerate(turned(code, pairs)):
                for half in (0, 1):
                    code.store(code.part(both, SIDE // 2 * half, SIDE // 2), at(SIDE // 2 * half + i))
            return
        places = [code.at(turning, ROW_BYTES * i) for i in range(SIDE)]
        for each, place in zip(pairs, places, strict=True):
            code.store(each, place)
        for half in (0, 1):
            for i, numbers in enumerate(turned(code, halves_of(code, places, half, WORD))):
                code.store(numbers, at(SIDE // 2 * half + i))

    is_narrow = code.builder.icmp_signed("==", size, code.number(2))
    with code.builder.if_else(is_narrow) as (narrow, wide):
        with narrow:
            write_bfloat16()
        with wide:
            write_floats()
    in_row = code.builder.select(is_wide, code.number(width), count)
    with code.builder.if_then(code.builder.not_(is_whole)), code.loop(code.number(0), num_rows, 1) as loop:
        start, to = (
            code.at(room, code.times(loop.index, code.times(size, width))),
            code.at(result, code.times(loop.index, result_bytes)),
        )
        with code.builder.if_else(is_narrow) as (narrow, wide):
            with narrow:
                code.store_first(in_row, code.half_words(start, width), to)
            with wide:
                for i in range(0, width, SIDE):
                    numbers = code.floats(code.at(start, 4 * i))
                    code.store_first(code.subtract(in_row, i), numbers, code.at(to, 4 * i))
    code.end()
    return code.function
