"""The kernels of bfloat16 products by Intel's AMX, as LLVM code: the one that writes x's tiles, and the one that
multiplies them (`tile_products`).
"""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir

from pallas_kernels.cpu_ffi.matrix_tiles import ROW_BYTES, SIDE, TILE_BYTES, Tiles, halves_of, turned
from pallas_kernels.cpu_ffi.vectors import FLOAT, LONG, POINTER, WORD, Code, Value
from pallas_kernels.dense_matmul import tile_products
from pallas_kernels.dense_matmul.activations import ACTIVATIONS
from pallas_kernels.dense_matmul.tile_products import AT_ONCE, Write, Writer


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

    def writer(code: Code, own: Sequence[Value], _: Value, out_features: Value) -> Writer:
        size, result = code.builder.sext(code.load(own[0], WORD), LONG), own[1]
        result_bytes = code.times(out_features, size)
        writers = {n: _writer(made, n, activation) for n in ((AT_ONCE,) if activation else (1, AT_ONCE))}

        def of_tiles(n: int, first: Value, count: Value) -> Write:
            def write(sums: Sequence[Value], row: Value, left: Value) -> None:
                to = code.at(result, code.add(code.times(row, result_bytes), code.times(first, size)))
                code.builder.call(writers[n], [*sums, to, result_bytes, left, count, size])

            return write

        return of_tiles

    # many rows of x go by, and leave the first cache to the weight
    tile_products.multiplied(made, Tiles.multiply, Tiles.load_once, 5, writer, is_gated=bool(activation))


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
        rounded = (
            code.rounded(code.joined(*each[i : i + 2]), flushes=True) for each in rows for i in range(0, SIDE, 2)
        )
        places = [i // 2 + SIDE * (i % 2) for i in range(2 * SIDE)]
        pairs = [code.builder.bitcast(code.picked(each, places), ir.VectorType(WORD, SIDE)) for each in rounded]
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
