"""The kernels of a product of rows with a dense weight, as LLVM code.

Operands: x [M, K]; layer i32 []; the weight's stack [L, N, K]; i32 [], the bytes of a number of the result; the result,
float32 or bfloat16 [M, N]. Rows of the weight and of x both lie along K, and are multiplied in vectors, so nothing has
to be packed (`products`). What is added to what follows from K alone, so a row's result has the same bits whatever
other rows there are.

A gated kernel ("gated_silu_bfloat16_16") has a weight [L, 2 N, K], and of both halves' products makes the activation of
the first one times the second.
"""

from __future__ import annotations

from llvmlite import ir

from pallas_kernels.cpu_ffi.vectors import LANES, LONG, POINTER, WORD, Code, Value
from pallas_kernels.dense_matmul import tiles
from pallas_kernels.dense_matmul.activations import ACTIVATIONS
from pallas_kernels.dense_matmul.cpu_ffi import PAIRED, TILES
from pallas_kernels.dense_matmul.products import (
    BLOCK,
    COLUMNS,
    FORMS,
    Floats,
    Form,
    Place,
    Products,
    Read,
    Rows,
    Widen,
    WidenedProducts,
    pieces,
    whole,
    write,
)

#: rows of x from which on rows of a bfloat16 weight are widened once for all of them
WIDENED_FROM = 5


def module(name: str) -> ir.Module:
    """A kernel, a function `kernel`, by its name: "dense_bfloat16_16", "gated_silu_bfloat16_16"."""
    made = ir.Module(name=name)
    if name == PAIRED:
        tiles.paired(made)
        return made
    kind, _, rest = name.partition("_")
    activation, _, form_name = rest.partition("_") if kind == "gated" else ("", "", rest)
    if form_name == f"bfloat16_{TILES}":
        tiles.multiplied(made, activation)
        return made
    form = FORMS[form_name]

    code = Code(made, "kernel", [POINTER, LONG, LONG], public=True)
    builder = code.builder
    table, begin, end = code.arguments
    x, layer, weight, size, result = (code.load(code.at(table, 16 * i), POINTER) for i in range(5))
    x_dims, result_dims = (code.load(code.at(table, 16 * i + 8), POINTER) for i in (0, 4))
    num_rows, in_features = (code.load(code.at(x_dims, 8 * i), LONG) for i in (0, 1))
    out_features = code.load(code.at(result_dims, 8), LONG)
    size = builder.sext(code.load(size, WORD), LONG)
    row_bytes = code.times(in_features, form.weight_size)
    halves = 2 if activation else 1
    apart = code.times(out_features, row_bytes)  # of a gate and what it is for
    place = code.times(builder.sext(code.load(layer, WORD), LONG), halves)
    weight = code.at(weight, code.times(place, apart))
    direct = Products(made, code, form, x, in_features, COLUMNS, "tile", halves)
    widened = WidenedProducts(made, code, form.lanes, x, in_features, form.step, halves) if _widens(form) else None
    columns_of = COLUMNS if widened is None else widened.columns
    sums = code.scratch(halves * BLOCK * columns_of[0]) if activation else None

    def multiply(n: int, rows: Rows, column: Value, *, widens: bool) -> None:
        """A block of rows by n rows of the weight, of both halves."""
        to = code.at(result, code.times(code.add(code.times(rows[0], out_features), column), size))
        parts: list[tuple[int, Place]] = []
        for half in range(halves):
            ahead = stored(column, half, n, code.number(0)), form.weight_size
            if sums is None:
                place = Place(to, out_features, ahead, size)
            else:
                place = Place(code.at(sums, 4 * BLOCK * n * half), code.number(n), ahead)
            parts.append((half, place))
        if widens and widened is not None:
            widened.write(n, rows, [(widener(column, half), place) for half, place in parts])
        else:
            are_many = code.below(code.number(WIDENED_FROM - 1), code.subtract(rows[1], rows[0]))
            piece = builder.select(are_many, pieces(code, in_features, form.step), in_features)
            direct.write(n, rows, piece, [(reader(column, half), place) for half, place in parts])
        if sums is not None:
            _gate(code, activation, sums, n, code.subtract(rows[1], rows[0]), (to, out_features, size))

    def stored(column: Value, half: int, row: int, first: Value) -> Value:
        """Where a row of the weight is, some rows behind one, from a column on."""
        start = code.at(code.at(weight, code.times(apart, half)), code.times(code.add(column, row), row_bytes))
        return code.at(start, code.times(first, form.weight_size))

    def reader(column: Value, half: int) -> Read:
        return lambda first, _: (stored(column, half, 0, first), in_features)

    def widener(column: Value, half: int) -> Widen:
        return lambda first, row, count, to: _widen(code, form, stored(column, half, row, first), to, count)

    def multiply_all(rows: Rows, *, widens: bool) -> None:
        """A block of rows by all rows of the weight."""
        first: Value = begin
        for n in columns_of if widens else COLUMNS:
            last = widened.whole(first, end, n) if widens and widened is not None else whole(code, first, end, n)
            with code.loop(first, last, n) as columns:
                multiply(n, rows, columns.index, widens=widens)
            first = last

    with code.loop(code.number(0), num_rows, BLOCK) as blocks:
        rows = blocks.index, code.smaller(code.add(blocks.index, BLOCK), num_rows)
        if widened is None:
            multiply_all(rows, widens=False)
        else:
            are_many = code.below(code.number(WIDENED_FROM - 1), code.subtract(rows[1], rows[0]))
            with builder.if_else(are_many) as (many, few):
                with many:
                    multiply_all(rows, widens=True)
                with few:
                    multiply_all(rows, widens=False)
    code.end()
    return made


def _widens(form: Form) -> bool:
    """Whether rows of the weight are made float32 for many rows of x."""
    return isinstance(form, Floats) and form.weight_size == 2


def _gate(code: Code, activation: str, sums: Value, n: int, count: Value, to: tuple[Value, Value, Value]) -> None:
    """Write the activation of gates times the others, of `count` rows of n numbers.

    Args:
        to: where, how many numbers from a row to the next, and the bytes of a number.
    """
    result, stride, size = to
    with code.loop(code.number(0), count, LANES // n) as loop:
        here = code.at(sums, code.times(loop.index, 4 * n))
        gate, up = code.floats(here), code.floats(code.at(here, 4 * BLOCK * n))
        found = code.multiplied(ACTIVATIONS[activation](code, gate), up)
        for i in range(LANES // n):
            row = code.add(loop.index, i)
            with code.builder.if_then(code.below(row, count)):
                write(
                    code, code.part(found, i * n, n), [code.at(result, code.times(code.times(row, stride), size))], size
                )


def _widen(code: Code, form: Form, weight: Value, to: Value, count: Value) -> None:
    """Write numbers of the weight as float32."""
    with code.loop(code.number(0), count, form.step) as loop:
        numbers = form.weight(code, code.at(weight, code.times(loop.index, form.weight_size)))
        code.store(numbers, code.at(to, code.times(loop.index, 4)))
