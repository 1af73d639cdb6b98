"""Products of rows by tiles of Intel's AMX (`cpu_ffi.matrix_tiles`), of bfloat16 or int8 numbers, as LLVM code.

Tiles of the weight are read where its rows lie, 16 rows by 64 bytes. Tiles of x are written before, once for a whole
launch (`tiles.paired`). So sums of a tile are of 16 rows of the weight, one below the other, and are turned when they
are written. They stay in tiles for all columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llvmlite import ir

from pallas_kernels.cpu_ffi.matrix_tiles import ROW_BYTES, SIDE, TILE_BYTES, Tiles
from pallas_kernels.cpu_ffi.vectors import LONG, POINTER, WORD, Code, Value
from pallas_kernels.dense_matmul.products import LINE, whole

#: bytes of x's tiles that the weight's rows are multiplied by before the next ones are: a part of a core's second cache
BLOCK_BYTES = 2**20
#: tiles that are multiplied at once, of the weight and of x, and their rows
AT_ONCE = 2
GROUP = AT_ONCE * SIDE
#: tiles of sums, of the weight and of x, by their number
_SUMS, _WEIGHTS, _ROWS = (0, 1, 2, 3), (4, 5), (6, 7)

#: adds to a tile of sums the product of two others, by their numbers
Multiply = Callable[[Tiles, int, int, int], None]
#: reads a tile by its number, rows at an address, so many bytes from one to the next
Load = Callable[[Tiles, int, Value, Value], None]
#: writes results: the addresses of tiles of sums, of the same rows of x; the first of these, and how many there are
Write = Callable[[Sequence[Value], Value, Value], None]
#: begins with tiles of the weight: their number, the first row, and how many rows each has
Writer = Callable[[int, Value, Value], Write]


def multiplied(
    made: ir.Module,
    multiply: Multiply,
    load: Load,
    num_operands: int,
    writer: Callable[[Code, Sequence[Value], Value, Value], Writer],
    *,
    is_gated: bool = False,
) -> None:
    """Write the kernel of products, a function `kernel`, into a module.

    Operands: x's tiles [ceil(M / 16), numbers of a tile, steps]; layer i32 []; the weight's stack [L, N, K], or
    [L, 2 N, K] of a gated product; what only the writer reads; the result [M, N].

    Args:
        load: reads tiles of x, where there are several at once.
        writer: gets the addresses of the operands behind the stack, the layer's first row in the stack, and N. Of a
            gated product it writes two tiles at a time, of gates and of what they are for.
    """
    code = Code(made, "kernel", [POINTER, LONG, LONG], public=True)
    table, begin, end = code.arguments
    operands = [code.load(code.at(table, 16 * i), POINTER) for i in range(num_operands)]
    x, layer, weight = operands[:3]
    x_dims, result_dims = (code.load(code.at(table, 16 * i + 8), POINTER) for i in (0, num_operands - 1))
    num_tiles, steps = (code.load(code.at(x_dims, 8 * i), LONG) for i in (0, 2))
    num_rows, out_features = (code.load(code.at(result_dims, 8 * i), LONG) for i in (0, 1))
    row_bytes, of_tiles = code.times(steps, ROW_BYTES), code.times(steps, TILE_BYTES)
    place = code.times(code.builder.sext(code.load(layer, WORD), LONG), 2 if is_gated else 1)
    first_row = code.times(place, out_features)
    weight = code.at(weight, code.times(first_row, row_bytes))
    # from one tile of the weight to the other, or from gates to what they are for
    apart = code.times(row_bytes, out_features if is_gated else SIDE)
    sums = code.scratch(AT_ONCE * AT_ONCE * TILE_BYTES // 4)
    instructions = Tiles(code)
    products = {(n, m): _product(made, multiply, load, n, m) for n in (1, AT_ONCE) for m in (1, AT_ONCE)}
    written = writer(code, operands[3:], first_row, out_features)

    # groups of rows of the weight belong to the item that their first one is in
    together = SIDE if is_gated else GROUP
    begin, end = (
        code.smaller(whole(code, code.number(0), code.add(at, together - 1), together), out_features)
        for at in (begin, end)
    )

    def multiply_group(n: int, first: Value, count: Value, block: tuple[Value, Value]) -> None:
        """A block of x's tiles by n tiles of the weight, which have `count` rows each, while the rows behind them are
        fetched.
        """
        start = code.at(weight, code.times(first, row_bytes))
        starts = [code.at(start, code.times(apart, i)) for i in range(n)]
        passes = code.divided(code.add(code.subtract(block[1], block[0]), AT_ONCE - 1), AT_ONCE)
        share = code.divided(code.add(passes, SIDE - 1), passes)
        share = code.builder.select(code.below(code.number(SIDE), passes), code.number(0), share)
        # lines of a tile's next rows, which each step asks for
        next_group = code.times(row_bytes, SIDE if is_gated else n * SIDE)
        write = written(n, first, count)
        done = block[0]
        for m in (AT_ONCE, 1):
            last = whole(code, done, block[1], m)
            with code.loop(done, last, m) as tiles:
                taken = code.divided(code.subtract(tiles.index, block[0]), AT_ONCE)
                ahead = code.add(next_group, code.times(code.times(code.times(taken, steps), share), LINE))
                own = code.at(x, code.times(tiles.index, of_tiles))
                fetched = [code.at(start, ahead) for start in starts]
                code.builder.call(products[n, m], [*starts, own, steps, sums, *fetched, share])
                for i in range(m):
                    row = code.times(code.add(tiles.index, i), SIDE)
                    left = code.smaller(code.subtract(num_rows, row), code.number(SIDE))
                    write([code.at(sums, TILE_BYTES * (j * m + i)) for j in range(n)], row, left)
            done = last

    instructions.configure(code.number(SIDE))
    of_block = code.greater(code.divided(code.number(BLOCK_BYTES), of_tiles), code.number(AT_ONCE))
    of_block = whole(code, code.number(0), of_block, AT_ONCE)
    with code.loop(code.number(0), num_tiles, of_block) as blocks:
        block = blocks.index, code.smaller(code.add(blocks.index, of_block), num_tiles)
        first = begin
        if not is_gated:
            first = whole(code, begin, end, GROUP)
            with code.loop(begin, first, GROUP) as columns:
                multiply_group(AT_ONCE, columns.index, code.number(SIDE), block)
        with code.loop(first, end, SIDE) as columns:
            count = code.smaller(code.subtract(end, columns.index), code.number(SIDE))
            is_short = code.below(count, code.number(SIDE))
            with code.builder.if_then(is_short):
                instructions.configure(count, _SUMS + _WEIGHTS)
            multiply_group(AT_ONCE if is_gated else 1, columns.index, count, block)
            with code.builder.if_then(is_short):
                instructions.configure(code.number(SIDE))
    instructions.release()
    code.end()


def _product(made: ir.Module, multiply: Multiply, load: Load, n: int, m: int) -> ir.Function:
    """A function (n addresses of the weight's rows; of x's tiles; steps of a tile's columns; where the tiles of sums
    are written, those of a tile of the weight one behind the other; n addresses of what is asked for, and how many
    lines of each in a step).
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
    load = load if m > 1 else Tiles.load
    with code.loop(code.number(0), steps, 1) as loop:
        for j, start in enumerate(starts):
            tiles.load(_WEIGHTS[j], code.at(start, code.times(loop.index, ROW_BYTES)), row_bytes)
        for i, start in enumerate(xs):
            load(tiles, _ROWS[i], code.at(start, code.times(loop.index, TILE_BYTES)), stride)
        for j, i in pairs:
            multiply(tiles, _SUMS[j * m + i], _WEIGHTS[j], _ROWS[i])
        line = code.times(loop.index, share)
        with code.loop(line, code.add(line, share), 1) as each:
            for start in ahead:
                code.prefetch(code.at(start, code.times(each.index, LINE)), 2)
    for j, i in pairs:
        tiles.store(_SUMS[j * m + i], code.at(sums, TILE_BYTES * (j * m + i)), stride)
    code.end()
    return code.function
