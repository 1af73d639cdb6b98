"""The kernel of many rows with a packed weight: a few rows of the weight are widened to float32 at a time, for a block
of rows of x, which they are multiplied by as the rows of a dense weight are (`dense_matmul.products`). Nothing is
widened in memory but a piece of these few rows, and a row's result has the same bits beside any others.

Operands: x float32 [M, K]; layer i32 []; the weight's arrays; the result, float32 [M, N].
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from pallas_kernels.cpu_ffi.vectors import LANES, LONG, POINTER, WORD, Code, Value, has_wide_pairs
from pallas_kernels.dense_matmul.products import BLOCK, Place, WidenedProducts
from pallas_kernels.packed_matmul.runs import Format, operand, parts


def widened(made: ir.Module, form: Format) -> None:
    """Write the kernel, a function `kernel`, into a module."""
    code = Code(made, "kernel", [POINTER, LONG, LONG], public=True)
    table, begin, end = code.arguments
    x, number = operand(code, table, 0), operand(code, table, 1)
    weight = [operand(code, table, 2 + i) for i in range(form.num_arrays)]
    result = operand(code, table, 2 + form.num_arrays)
    num_rows, in_features = (code.load(code.at(x.dims, 8 * i), LONG) for i in (0, 1))
    out_features = code.load(code.at(result.dims, 8), LONG)
    layer = code.builder.sext(code.load(number.data, WORD), LONG)
    lanes = LANES if has_wide_pairs() else LANES // 2
    products = WidenedProducts(made, code, lanes, x.data, in_features, form.columns)
    with code.loop(code.number(0), num_rows, BLOCK) as blocks:
        rows = blocks.index, code.smaller(code.add(blocks.index, BLOCK), num_rows)
        first: Value = begin
        for n in products.columns:
            last = products.whole(first, end, n)
            with code.loop(first, last, n) as columns:

                def widen(column: Value, i: int, count: Value, to: Value, first: Value = columns.index) -> None:
                    of_row = form.row(code, weight, layer, code.add(first, i), in_features)
                    _widen(code, form, of_row, (column, count), to)

                place = code.add(code.times(rows[0], out_features), columns.index)
                products.write(n, rows, [(widen, Place(code.at(result.data, code.times(place, 4)), out_features))])
            first = last
    code.end()


def _widen(code: Code, form: Format, of_row: Any, columns: tuple[Value, Value], to: Value) -> None:
    """Write some columns of a row of the weight, the first and how many, as float32."""
    first, count = columns
    with code.loop(code.number(0), count, form.columns) as loop:
        column: Value = loop.index
        for run in parts(code, form.run(code, of_row, code.add(first, loop.index), 0)):
            for numbers in run.values:
                value = numbers
                if run.minimum is not None and run.scale is not None:
                    value = code.multiply_add(numbers, code.splat(run.scale), code.splat(run.minimum))
                elif run.scale is not None:
                    value = code.multiplied(numbers, code.splat(run.scale))
                code.store(value, code.at(to, code.times(column, 4)))
                column = code.add(column, LANES)
