"""The kernels of a product of rows with a packed weight, as LLVM code; the same for every format (`formats`).

Operands: x [M, K] in a form of `INPUTS`; layer i32 []; the weight's arrays, of all layers, read where they lie; the
result, float32 [M, N]. Where rows have matrices of their own ("grouped_") layer is i32 [M], -1 for none. A row of the
weight is multiplied by some rows of x at a time: a run's numbers are made in registers, once for these rows, and
multiplied and added up in lanes, which are added to each other in the end. What is added to what depends on the format
alone, and not on how many rows there are, so a row's result has the same bits beside any others. What multiplies many
rows is told in `widened`.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from pallas_kernels.cpu_ffi.vectors import FLOAT, HALF_WORD, LANES, LONG, POINTER, WORD, Code, Value, has_wide_pairs
from pallas_kernels.dense_matmul.kernel import whole
from pallas_kernels.packed_matmul.cpu_ffi import SPAN, minimum_columns
from pallas_kernels.packed_matmul.formats import FORMATS, WIDTH, Format, Operand, Run, operand, parts
from pallas_kernels.packed_matmul.widened import widened

#: rows of the weight that all rows of x are multiplied by before the next ones are; a cache near the core has them
BLOCK = 16
#: the beginning of the names of kernels whose rows have matrices of their own
GROUPED = "grouped_"


def tile_sizes() -> tuple[int, ...]:
    """Rows of x that are multiplied at once by one row of the weight, most first: what registers hold. Rows of the
    weight come one after the other, as they lie: four at a time took 1.5 times as long to read (int8, Zen 3).
    """
    return (8, 4, 2, 1) if has_wide_pairs() else (4, 2, 1)


class Inputs(abc.ABC):
    """A form of x."""

    #: arrays that x is
    arrays: int

    @abc.abstractmethod
    def row(self, code: Code, x: list[Operand], row: Value) -> Any:
        """What `products` needs of a row of x."""

    @abc.abstractmethod
    def products(self, code: Code, form: Format, of_row: Any, rows: Sequence[Any], columns: Value) -> Value:
        """Of a row of the weight with some rows of x, <rows x float>."""


class Exact(Inputs):
    """x float32 [M, K], multiplied as it is."""

    arrays = 1

    def row(self, code: Code, x: list[Operand], row: Value) -> Any:
        return code.at(x[0].data, code.times(code.times(row, _columns(code, x[0])), 4))

    def products(self, code: Code, form: Format, of_row: Any, rows: Sequence[Any], columns: Value) -> Value:
        with code.loop(code.number(0), columns, form.columns, [_zeros(LANES)] * len(rows)) as loop:
            column: Value = loop.index
            for run in parts(code, form.run(code, of_row, loop.index, 0)):
                for m, row in enumerate(rows):
                    loop.next[m] = self._added(code, loop.next[m], code.at(row, code.times(column, 4)), run)
                column = code.add(column, LANES * len(run.values))
        return code.sums_of(loop.values)

    @staticmethod
    def _added(code: Code, lanes: Value, start: Value, run: Run) -> Value:
        """The sums with the products of a run."""
        x = [code.floats(code.at(start, 4 * LANES * i)) for i in range(len(run.values))]
        products = code.multiplied(x[0], run.values[0])
        for part, values in zip(x[1:], run.values[1:], strict=True):
            products = code.multiply_add(part, values, products)
        if run.scale is None:
            return code.summed(lanes, products)
        lanes = code.multiply_add(products, code.splat(run.scale), lanes)
        if run.minimum is not None:
            alone = x[0]
            for part in x[1:]:
                alone = code.summed(alone, part)
            lanes = code.multiply_add(alone, code.splat(run.minimum), lanes)
        return lanes


class Rounded(Inputs):
    """x in 16 bits: int16 [M, K]; of each `SPAN` columns a scale of every lane, float32 [M, spans * LANES]; and where
    the weight has minima, the sums of the columns that share one, float32 [M, K / minimum_columns]. A lane has two
    neighbours of each `WIDTH` columns, whose products and their sum are one instruction. Integers are exact, and become
    float32 where a scale of the weight ends, or a span.

    Args:
        minimum_columns: columns of the weight that share a minimum; 0: none has one.
    """

    def __init__(self, minimum_columns: int):
        self._minimum_columns, self.arrays = minimum_columns, 3 if minimum_columns else 2

    def row(self, code: Code, x: list[Operand], row: Value) -> Any:
        return [
            code.at(each.data, code.times(code.times(row, _columns(code, each)), 4 if i else 2))
            for i, each in enumerate(x)
        ]

    def products(self, code: Code, form: Format, of_row: Any, rows: Sequence[Any], columns: Value) -> Value:
        count = len(rows)
        carried = [_zeros(LANES)] * count
        if self._minimum_columns:
            carried += [_zeros(form.columns // self._minimum_columns)] * count
        spans = code.times(code.divided(columns, SPAN), SPAN)
        with code.loop(code.number(0), spans, SPAN, carried) as loop:
            loop.next = self._added(code, form, of_row, rows, loop.index, SPAN, loop.values)
        if form.columns < SPAN:
            with code.loop(spans, columns, form.columns, loop.values) as loop:
                loop.next = self._added(code, form, of_row, rows, loop.index, form.columns, loop.values)
        sums = code.sums_of(loop.values[:count])
        return code.summed(sums, code.sums_of(loop.values[count:])) if self._minimum_columns else sums

    def _added(
        self,
        code: Code,
        form: Format,
        of_row: Any,
        rows: Sequence[Any],
        first: Value,
        columns: int,
        carried: list[Value],
    ) -> list[Value]:
        """The sums of each row, and those of its minima, with the products of columns of one span."""
        count = len(rows)
        totals, minima = carried[:count], carried[count:]
        lanes: list[Value] = [None] * count
        for behind in range(0, columns, form.columns):
            run = form.run(code, of_row, first, behind)
            numbers = _numbers(code, run)
            for m, (values, *_) in enumerate(rows):
                start = code.at(code.at(values, code.times(first, 2)), 2 * behind)
                found = lanes[m] if run.scale is None else None
                for i, number in enumerate(numbers):
                    products = code.pairs(number, code.half_words(code.at(start, 2 * WIDTH * i), WIDTH))
                    found = products if found is None else code.builder.add(found, products)
                if run.scale is not None:
                    by, found = code.splat(run.scale), code.signed(found)
                    found = code.multiplied(found, by) if lanes[m] is None else code.multiply_add(found, by, lanes[m])
                lanes[m] = found
            if run.minimum is not None:
                minimum = code.splat(run.minimum, minima[0].type.count)
                if run.minima is not None:
                    minimum = code.multiplied(minimum, code.signed(run.minima))
                place = code.times(code.divided(first, self._minimum_columns), 4)
                for m, (*_, sums) in enumerate(rows):
                    own = code.at(code.at(sums, place), behind // self._minimum_columns * 4)
                    minima[m] = code.multiply_add(code.floats(own, minimum.type.count), minimum, minima[m])
        place = code.times(code.divided(first, SPAN), 4 * LANES)
        for m, (_, scales, *_) in enumerate(rows):
            found = lanes[m] if lanes[m].type.element == FLOAT else code.signed(lanes[m])
            totals[m] = code.multiply_add(found, code.floats(code.at(scales, place)), totals[m])
        return [*totals, *minima]


def _numbers(code: Code, run: Run) -> list[Value]:
    """A run's integers with their factors, <WIDTH x i16>."""
    numbers = [value if value.type.element == HALF_WORD else code.widened(value, HALF_WORD) for value in run.values]
    if run.factors is None:
        return numbers
    each = WIDTH * len(numbers) // run.factors.type.count
    places = [[(WIDTH * i + column) // each for column in range(WIDTH)] for i in range(len(numbers))]
    return [code.builder.mul(number, code.picked(run.factors, at)) for number, at in zip(numbers, places, strict=True)]


def module(name: str) -> ir.Module:
    """A kernel, a function `kernel`: "exact_Q8_0", "grouped_rounded_int8" or "wide_Q8_0", for example."""
    prefix, _, form_name = name.removeprefix(GROUPED).partition("_")
    made, form = ir.Module(name=name), FORMATS[form_name]
    if prefix == "wide":
        widened(made, form)
        return made
    inputs = Exact() if prefix == "exact" else Rounded(minimum_columns(form_name))
    grouped = name.startswith(GROUPED)
    code = Code(made, "kernel", [POINTER, LONG, LONG], public=True)
    table, begin, end = code.arguments
    num_x = code.load(operand(code, table, 0).dims, LONG)
    tiles = {size: _tile(made, inputs, form, size, by_row=grouped) for size in tile_sizes()}
    places = inputs.arrays
    with code.loop(begin, end, BLOCK) as blocks:
        block = blocks.index, code.smaller(code.add(blocks.index, BLOCK), end)
        if grouped:
            _by_groups(
                code,
                tiles,
                operand(code, table, places),
                num_x,
                operand(code, table, places + 1 + form.num_arrays),
                block,
            )
        else:
            done: Value = code.number(0)
            for size in tiles:
                behind = whole(code, done, num_x, size)
                with code.loop(done, behind, size) as rows:
                    code.builder.call(tiles[size], [table, rows.index, *block])
                done = behind
    code.end()
    return made


def _by_groups(
    code: Code,
    tiles: dict[int, ir.Function],
    places: Operand,
    num_x: Value,
    result: Operand,
    block: tuple[Value, Value],
) -> None:
    """Each row of x by rows of the matrix at its own place, as many at once as have the same; without one: zeros."""
    builder = code.builder

    def place(row: Value) -> Value:
        return code.load(code.at(places.data, code.times(row, 4)), WORD)

    # the rows in front of the carried number have been multiplied
    with code.loop(code.number(0), num_x, 1, [code.number(0)]) as rows:
        own = place(rows.index)
        count: Value = code.number(1)
        for size in sorted(tiles)[1:]:
            behind = code.add(rows.index, size)
            fits = builder.icmp_signed("<=", behind, num_x)
            last = place(builder.select(fits, code.subtract(behind, 1), rows.index))
            same = builder.and_(fits, builder.icmp_signed("==", own, last))
            count = builder.select(same, code.number(size), count)
        comes = builder.icmp_signed(">=", rows.index, rows.values[0])
        rows.next[0] = builder.select(comes, code.add(rows.index, count), rows.values[0])
        has_one = builder.icmp_signed(">=", own, code.all(0, own))
        for size in tiles:
            wanted = builder.and_(builder.and_(comes, has_one), builder.icmp_signed("==", count, code.number(size)))
            with builder.if_then(wanted):
                builder.call(tiles[size], [code.arguments[0], rows.index, *block])
        with builder.if_then(builder.not_(has_one)), code.loop(*block, 1) as column:
            to = code.add(code.times(rows.index, code.load(code.at(result.dims, 8), LONG)), column.index)
            code.store(ir.Constant(FLOAT, 0.0), code.at(result.data, code.times(to, 4)))


def _tile(made: ir.Module, inputs: Inputs, form: Format, size: int, *, by_row: bool) -> ir.Function:
    """A function (table, first row of x, begin and end of rows of the weight) that multiplies some rows of x.

    Args:
        by_row: whether each row of x has a number of a layer.
    """
    code = Code(made, f"tile_{size}", [POINTER, LONG, LONG, LONG])
    table, first, begin, end = code.arguments
    count = inputs.arrays
    x = [operand(code, table, i) for i in range(count)]
    number, result = (operand(code, table, i) for i in (count, count + 1 + form.num_arrays))
    weight = [operand(code, table, count + 1 + i) for i in range(form.num_arrays)]
    columns, num_out = _columns(code, x[0]), _columns(code, result)
    at = code.at(number.data, code.times(first, 4)) if by_row else number.data
    layer = code.builder.sext(code.load(at, WORD), LONG)
    rows = [inputs.row(code, x, code.add(first, m)) for m in range(size)]
    to = [code.at(result.data, code.times(code.times(code.add(first, m), num_out), 4)) for m in range(size)]
    with code.loop(begin, end, 1) as loop:
        of_row = form.row(code, weight, layer, loop.index, columns)
        found = code.numbers(inputs.products(code, form, of_row, rows, columns))
        for value, place in zip(found, to, strict=True):
            code.store(value, code.at(place, code.times(loop.index, 4)))
    code.end()
    return code.function


def _columns(code: Code, array: Operand) -> Value:
    return code.load(code.at(array.dims, 8), LONG)


def _zeros(count: int) -> Value:
    return ir.Constant(ir.VectorType(FLOAT, count), [0.0] * count)
