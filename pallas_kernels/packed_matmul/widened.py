"""The kernel of many rows with a packed weight: a few rows of the weight are widened to float32 at a time, for a block
of rows of x, which they are multiplied by as the rows of a dense weight are (`dense_matmul.kernel`). Nothing is widened
in memory but these few rows, and a row's result has the same bits beside any others.

Operands: x float32 [M, K]; layer i32 []; the weight's arrays; the result, float32 [M, N].
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from pallas_kernels.cpu_ffi.vectors import LANES, LONG, POINTER, WORD, Code, Value, has_wide_pairs
from pallas_kernels.dense_matmul.kernel import BLOCK, COLUMNS, Floats, tile, whole
from pallas_kernels.packed_matmul.formats import Format, operand, parts


def widened(made: ir.Module, form: Format) -> None:
    """Write the kernel, a function `kernel`, into a module."""
    wide = Floats(16 if has_wide_pairs() else 8, "float32")
    tiles = {(m, n): tile(made, wide, m, n, f"tile_{m}_{n}") for m in wide.rows for n in COLUMNS}
    code = Code(made, "kernel", [POINTER, LONG, LONG], public=True)
    table, begin, end = code.arguments
    x, number = operand(code, table, 0), operand(code, table, 1)
    weight = [operand(code, table, 2 + i) for i in range(form.num_arrays)]
    result = operand(code, table, 2 + form.num_arrays)
    num_rows, in_features = (code.load(code.at(x.dims, 8 * i), LONG) for i in (0, 1))
    out_features = code.load(code.at(result.dims, 8), LONG)
    layer = code.builder.sext(code.load(number.data, WORD), LONG)
    row_bytes = code.times(in_features, 4)
    room = code.allocated(code.times(row_bytes, COLUMNS[0]))
    with code.loop(code.number(0), num_rows, BLOCK) as blocks:
        stop = code.smaller(code.add(blocks.index, BLOCK), num_rows)
        first: Value = begin
        for n in COLUMNS:
            last = whole(code, first, end, n)
            with code.loop(first, last, n) as columns:
                for i in range(n):
                    of_row = form.row(code, weight, layer, code.add(columns.index, i), in_features)
                    _widen(code, form, of_row, in_features, code.at(room, code.times(row_bytes, i)))
                done: Value = blocks.index
                for m in wide.rows:
                    behind = whole(code, done, stop, m)
                    with code.loop(done, behind, m) as rows:
                        of_x = code.at(x.data, code.times(rows.index, row_bytes))
                        place = code.add(code.times(rows.index, out_features), columns.index)
                        to = code.at(result.data, code.times(place, 4))
                        code.builder.call(tiles[m, n], [of_x, room, to, in_features, out_features])
                    done = behind
            first = last
    code.free(room)
    code.end()


def _widen(code: Code, form: Format, of_row: Any, columns: Value, to: Value) -> None:
    """Write a row of the weight as float32."""
    with code.loop(code.number(0), columns, form.columns) as loop:
        column: Value = loop.index
        for run in parts(code, form.run(code, of_row, loop.index, 0)):
            for numbers in run.values:
                value = numbers
                if run.minimum is not None and run.scale is not None:
                    value = code.multiply_add(numbers, code.splat(run.scale), code.splat(run.minimum))
                elif run.scale is not None:
                    value = code.multiplied(numbers, code.splat(run.scale))
                code.store(value, code.at(to, code.times(column, 4)))
                column = code.add(column, LANES)
