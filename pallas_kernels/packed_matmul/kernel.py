"""The kernel of a product of rows with a packed weight, as LLVM code; the same for every format (`formats`).

Operands: x float32 [M, K]; layer i32 []; the weight's arrays, of all layers, read where they lie; the result float32
[M, N]. A tile of some rows of x and some of the weight is multiplied at a time: a run's numbers are made in registers,
once for the tile's rows of x, and multiplied and added up in `LANES` lanes, which are added to each other in the end.
What is added to what depends on the format alone, and not on the tile, so a row's result has the same bits beside any
others.
"""

from __future__ import annotations

from llvmlite import ir

from pallas_kernels.cpu_ffi.vectors import FLOAT, LANES, LONG, POINTER, WORD, Code, Value
from pallas_kernels.packed_matmul.formats import FORMATS, Format, Operand

#: (rows of x, rows of the weight) of a tile, best first: what registers hold
TILES = ((4, 1), (1, 4))


def module(name: str) -> ir.Module:
    """The kernel of a format, a function `kernel`."""
    made, form = ir.Module(name=name), FORMATS[name]
    sizes = {(rows, 1) for rows, _ in TILES} | set(TILES)
    tiles = {size: _tile(made, form, *size) for size in sorted(sizes)}
    code = Code(made, "kernel", [POINTER, LONG, LONG], public=True)
    table, begin, end = code.arguments
    num_x = code.load(_operand(code, table, 0).dims, LONG)
    done: Value = code.number(0)
    for num_rows, num_columns in TILES:
        behind = code.add(code.times(code.divided(code.subtract(num_x, done), num_rows), num_rows), done)
        whole = code.subtract(end, num_columns - 1)
        with code.loop(done, behind, num_rows) as rows:
            with code.loop(begin, whole, num_columns) as columns:
                code.builder.call(tiles[num_rows, num_columns], [table, rows.index, columns.index])
            if num_columns > 1:
                rest = code.divided(code.subtract(end, begin), num_columns)
                first = code.add(begin, code.times(rest, num_columns))
                with code.loop(first, end, 1) as columns:
                    code.builder.call(tiles[num_rows, 1], [table, rows.index, columns.index])
        done = behind
    code.end()
    return made


def _tile(made: ir.Module, form: Format, num_x: int, num_rows: int) -> ir.Function:
    """A function (table, first row of x, first row of the weight) that computes a tile of the result."""
    code = Code(made, f"tile_{num_x}_{num_rows}", [POINTER, LONG, LONG])
    table, first_x, first_row = code.arguments
    x, number = _operand(code, table, 0), _operand(code, table, 1)
    weight = [_operand(code, table, 2 + i) for i in range(form.num_arrays)]
    result = _operand(code, table, 2 + form.num_arrays)
    columns = code.load(code.at(x.dims, 8), LONG)
    layer = code.builder.sext(code.load(number.data, WORD), LONG)
    x_rows = [code.at(x.data, code.times(code.times(code.add(first_x, m), columns), 4)) for m in range(num_x)]
    rows = [form.row(code, weight, layer, code.add(first_row, r), columns) for r in range(num_rows)]
    zero = ir.Constant(ir.VectorType(FLOAT, LANES), [0.0] * LANES)
    with code.loop(code.number(0), columns, form.columns, [zero] * (num_rows * num_x)) as loop:
        offset = code.times(loop.index, 4)
        here = [code.at(start, offset) for start in x_rows]
        for r in range(num_rows):
            place = 0
            for run in form.runs(code, rows[r], loop.index):
                for m in range(num_x):
                    parts = [code.floats(code.at(here[m], 4 * (place + LANES * i))) for i in range(len(run.values))]
                    total = loop.next[r * num_x + m]
                    loop.next[r * num_x + m] = _added(code, total, run.values, parts, run.scale, run.minimum)
                place += LANES * len(run.values)
    num_out = code.load(code.at(result.dims, 8), LONG)
    for r in range(num_rows):
        for m in range(num_x):
            at = code.add(code.times(code.add(first_x, m), num_out), code.add(first_row, r))
            code.store(code.sum_of(loop.values[r * num_x + m]), code.at(result.data, code.times(at, 4)))
    code.end()
    return code.function


def _added(
    code: Code, total: Value, values: list[Value], x: list[Value], scale: Value | None, minimum: Value | None
) -> Value:
    """``total + (scale * values + minimum) * x``, lane by lane."""
    if scale is None:
        for part, numbers in zip(x, values, strict=True):
            total = code.multiply_add(part, numbers, total)
        return total
    products = code.multiplied(x[0], values[0])
    for part, numbers in zip(x[1:], values[1:], strict=True):
        products = code.multiply_add(part, numbers, products)
    total = code.multiply_add(products, code.splat(scale), total)
    if minimum is not None:
        alone = x[0]
        for part in x[1:]:
            alone = code.summed(alone, part)
        total = code.multiply_add(alone, code.splat(minimum), total)
    return total


def _operand(code: Code, table: Value, i: int) -> Operand:
    return Operand(code.load(code.at(table, 16 * i), POINTER), code.load(code.at(table, 16 * i + 8), POINTER))
