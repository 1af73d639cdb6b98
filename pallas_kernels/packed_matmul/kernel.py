"""The kernels of a product of rows with a packed weight, as LLVM code; the same for every format (`formats`).

Operands: x float32 [M, K]; layer i32 []; the weight's arrays, of all layers, read where they lie; the result, float32
[M, N]. Where rows have matrices of their own ("grouped_") layer is i32 [M], -1 for none. A row of the
weight is multiplied by some rows of x at a time: a run's numbers are made in registers, once for these rows, and
multiplied and added up in lanes, which are added to each other in the end. What is added to what depends on the format
alone, and not on how many rows there are, so a row's result has the same bits beside any others. What multiplies many
rows is told in `widened`.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from llvmlite import ir

from pallas_kernels.cpu_ffi.vectors import FLOAT, HALF_WORD, LANES, LONG, POINTER, WORD, Code, Value, has_wide_pairs
from pallas_kernels.dense_matmul.products import whole
from pallas_kernels.packed_matmul.cpu_ffi import sum_columns
from pallas_kernels.packed_matmul.formats import FORMATS
from pallas_kernels.packed_matmul.rounding import SPAN, rounding, spans
from pallas_kernels.packed_matmul.runs import WIDTH, Format, Operand, Run, operand, parts
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
    """A form in which x is multiplied."""

    #: arrays that x is
    arrays: int

    @abc.abstractmethod
    def prepared(self, code: Code, x: Operand) -> list[Value]:
        """The arrays' addresses; the first is of memory that is to be freed, if it is not x itself."""

    @abc.abstractmethod
    def row(self, code: Code, arrays: Sequence[Value], row: Value, columns: Value) -> Any:
        """What `products` needs of a row of x."""

    @abc.abstractmethod
    def products(self, code: Code, form: Format, of_row: Any, rows: Sequence[Any], columns: Value) -> Value:
        """Of a row of the weight with some rows of x, <rows x float>."""


class Exact(Inputs):
    """x float32 [M, K], multiplied as it is."""

    arrays = 1

    def prepared(self, code: Code, x: Operand) -> list[Value]:
        return [x.data]

    def row(self, code: Code, arrays: Sequence[Value], row: Value, columns: Value) -> Any:
        return code.at(arrays[0], code.times(code.times(row, columns), 4))

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
    """x in 16 bits (`rounding`): int16 [M, K]; of each `SPAN` columns a scale of every lane, float32 [M, spans, LANES];
    and where the weight has minima, sums of the columns that share one, float32 [M, K / sum_columns]. A lane has two
    neighbours of each `WIDTH` columns, whose products and their sum are one instruction. Integers are exact, and become
    float32 where a scale of the weight ends, or a span. Each item of a launch makes them for itself: nobody
    waits, and it is quick beside products with more than some ten rows of the weight.

    Args:
        sum_columns: columns of the weight that share a minimum, or parts of them; 0: none has one.
    """

    arrays = 3

    def __init__(self, made: ir.Module, sum_columns: int):
        self._sum_columns, self._rounding = sum_columns, rounding(made, sum_columns)

    def prepared(self, code: Code, x: Operand) -> list[Value]:
        count, columns = code.load(x.dims, LONG), _columns(code, x)
        sizes = self._row_sizes(code, columns)
        arrays = [code.allocated(code.times(count, code.add(code.add(sizes[0], sizes[1]), sizes[2])))]
        for size in sizes[:2]:
            arrays.append(code.at(arrays[-1], code.times(count, size)))
        with code.loop(code.number(0), count, 1) as rows:
            start = code.at(x.data, code.times(code.times(rows.index, columns), 4))
            integers, scales, sums = self.row(code, arrays, rows.index, columns)
            code.builder.call(self._rounding, [start, columns, integers, scales, sums])
        return arrays

    def row(self, code: Code, arrays: Sequence[Value], row: Value, columns: Value) -> Any:
        sizes = self._row_sizes(code, columns)
        return [code.at(array, code.times(row, size)) for array, size in zip(arrays, sizes, strict=True)]

    def _row_sizes(self, code: Code, columns: Value) -> tuple[Value, Value, Value]:
        """Bytes of a row of each array."""
        sums = code.divided(columns, self._sum_columns) if self._sum_columns else code.number(0)
        return code.times(columns, 2), code.times(spans(code, columns), 4 * LANES), code.times(sums, 4)

    def products(self, code: Code, form: Format, of_row: Any, rows: Sequence[Any], columns: Value) -> Value:
        count = len(rows)
        carried = [_zeros(LANES)] * count
        if self._sum_columns:
            carried += [_zeros(form.columns // self._sum_columns)] * count
        behind = code.times(code.divided(columns, SPAN), SPAN)
        with code.loop(code.number(0), behind, SPAN, carried) as loop:
            loop.next = self._added(code, form, of_row, rows, loop.index, SPAN, loop.values)
        if form.columns < SPAN:
            with code.loop(behind, columns, form.columns, loop.values) as loop:
                loop.next = self._added(code, form, of_row, rows, loop.index, form.columns, loop.values)
        sums = code.sums_of(loop.values[:count])
        return code.summed(sums, code.sums_of(loop.values[count:])) if self._sum_columns else sums

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
            found = lanes if run.scale is None else [None] * count
            # one vector of the weight after the other: registers hold few beside the rows' sums
            for i, number in enumerate(_numbers(code, run)):
                at = code.times(first, 2), 2 * (behind + WIDTH * i)
                for m, (values, _, _) in enumerate(rows):
                    products = code.pairs(number, code.half_words(code.at(code.at(values, at[0]), at[1]), WIDTH))
                    found[m] = products if found[m] is None else code.builder.add(found[m], products)
            if run.scale is not None:
                by, found = code.splat(run.scale), [code.signed(each) for each in found]
                lanes = [
                    code.multiplied(new, by) if old is None else code.multiply_add(new, by, old)
                    for new, old in zip(found, lanes, strict=True)
                ]
            if run.minimum is not None:
                minimum = code.splat(run.minimum, minima[0].type.count)
                if run.minima is not None:
                    minimum = code.multiplied(minimum, code.signed(run.minima))
                place = code.times(code.divided(first, self._sum_columns), 4)
                for m, (_, _, sums) in enumerate(rows):
                    own = code.at(code.at(sums, place), behind // self._sum_columns * 4)
                    minima[m] = code.multiply_add(code.floats(own, minimum.type.count), minimum, minima[m])
        place = code.times(code.divided(first, SPAN), 4 * LANES)
        for m, (_, scales, _) in enumerate(rows):
            found = lanes[m] if lanes[m].type.element == FLOAT else code.signed(lanes[m])
            totals[m] = code.multiply_add(found, code.floats(code.at(scales, place)), totals[m])
        return [*totals, *minima]


def _numbers(code: Code, run: Run) -> Iterator[Value]:
    """A run's integers with their factors, <WIDTH x i16>."""
    eights = [] if run.factors is None else [code.spread(part) for part in code.parts(run.factors, 8)]
    for i, value in enumerate(run.values):
        number = value if value.type.element == HALF_WORD else code.widened(value, HALF_WORD)
        if run.factors is not None:
            each = WIDTH * len(run.values) // run.factors.type.count
            places = [(WIDTH * i + column) // each for column in range(WIDTH)]
            of_each = code.spread_over(eights[places[0] // 8], [place % 8 for place in places])
            number = code.builder.mul(number, of_each)
        yield number


def module(name: str) -> ir.Module:
    """A kernel, a function `kernel`: "exact_Q8_0", "grouped_rounded_int8" or "wide_Q8_0", for example."""
    prefix, _, form_name = name.removeprefix(GROUPED).partition("_")
    made, form = ir.Module(name=name), FORMATS[form_name]
    if prefix == "wide":
        widened(made, form)
        return made
    inputs = Exact() if prefix == "exact" else Rounded(made, sum_columns(form_name))
    grouped = name.startswith(GROUPED)
    code = Code(made, "kernel", [POINTER, LONG, LONG], public=True)
    table, begin, end = code.arguments
    x, places, result = (operand(code, table, i) for i in (0, 1, 2 + form.num_arrays))
    num_x = code.load(x.dims, LONG)
    tiles = {size: _tile(made, inputs, form, size, by_row=grouped) for size in tile_sizes()}
    arrays = inputs.prepared(code, x)
    with code.loop(begin, end, BLOCK) as blocks:
        block = blocks.index, code.smaller(code.add(blocks.index, BLOCK), end)

        def multiply(size: int, row: Value) -> None:
            code.builder.call(tiles[size], [table, *arrays, row, *block])

        if grouped:
            _by_groups(code, multiply, places, num_x, result, block)
        else:
            done: Value = code.number(0)
            for size in tiles:
                behind = whole(code, done, num_x, size)
                with code.loop(done, behind, size) as rows:
                    multiply(size, rows.index)
                done = behind
    if arrays[0] is not x.data:
        code.free(arrays[0])
    code.end()
    return made


def _by_groups(
    code: Code,
    multiply: Callable[[int, Value], None],
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
        for size in tile_sizes()[-2::-1]:
            behind = code.add(rows.index, size)
            fits = builder.icmp_signed("<=", behind, num_x)
            last = place(builder.select(fits, code.subtract(behind, 1), rows.index))
            same = builder.and_(fits, builder.icmp_signed("==", own, last))
            count = builder.select(same, code.number(size), count)
        comes = builder.icmp_signed(">=", rows.index, rows.values[0])
        rows.next[0] = builder.select(comes, code.add(rows.index, count), rows.values[0])
        has_one = builder.icmp_signed(">=", own, code.all(0, own))
        for size in tile_sizes():
            wanted = builder.and_(builder.and_(comes, has_one), builder.icmp_signed("==", count, code.number(size)))
            with builder.if_then(wanted):
                multiply(size, rows.index)
        with builder.if_then(builder.not_(has_one)), code.loop(*block, 1) as column:
            to = code.add(code.times(rows.index, code.load(code.at(result.dims, 8), LONG)), column.index)
            code.store(ir.Constant(FLOAT, 0.0), code.at(result.data, code.times(to, 4)))


def _tile(made: ir.Module, inputs: Inputs, form: Format, size: int, *, by_row: bool) -> ir.Function:
    """A function (table, arrays of x, first row of x, begin and end of rows of the weight) that multiplies some rows of
    x.

    Args:
        by_row: whether each row of x has a number of a layer.
    """
    code = Code(made, f"tile_{size}", [*[POINTER] * (1 + inputs.arrays), LONG, LONG, LONG])
    table, *arrays, first, begin, end = code.arguments
    x, number, *weight, result = (operand(code, table, i) for i in range(3 + form.num_arrays))
    columns, num_out = _columns(code, x), _columns(code, result)
    at = code.at(number.data, code.times(first, 4)) if by_row else number.data
    layer = code.builder.sext(code.load(at, WORD), LONG)
    rows = [inputs.row(code, arrays, code.add(first, m), columns) for m in range(size)]
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
